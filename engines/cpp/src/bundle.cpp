#include <algorithm>
#include <atomic>
#include <exception>
#include <future>
#include <thread>

#include "arrays.hpp"
#include "bundle_impl.hpp"
#include "fault.hpp"
#include "text.hpp"
#include "zip.hpp"

namespace export_engine {
namespace detail {
namespace {

constexpr std::uint64_t MOST_GOLDEN_BYTES = std::uint64_t{4} << 30;

// In messages, `where` stands for the folder: what a zip was unpacked into says nothing to the caller.
void check_names(const Manifest& manifest, const std::string& folder, const std::string& where) {
  const auto found = files_under(folder);
  for (const auto& [name, bytes] : found)
    if (name != MANIFEST && !manifest.files.count(name))
      damaged(where + ": holds '" + name + "', which its manifest does not list");
  for (const auto& [name, listed] : manifest.files) {
    const auto file = found.find(name);
    if (file == found.end()) damaged(where + ": its file '" + name + "' is missing");
    if (file->second != listed.bytes)
      damaged(where + "/" + name + ": " + std::to_string(file->second) + " bytes, its manifest says " +
              std::to_string(listed.bytes));
  }
}

void check_file(const std::string& path, const Listed& listed, const std::string& where) {
  const File file(path);
  const std::string digest = file.bytes() == listed.bytes ? file.digest(0, listed.bytes) : "of another length";
  if (digest != listed.sha256)
    damaged(where + ": sha256 " + digest.substr(0, 16) + "…, its manifest says " + listed.sha256.substr(0, 16) +
            "…: changed after it was made");
}

// Hashes files on several threads, the largest first.
void check_files(const Manifest& manifest, const std::string& folder, const std::string& where, int threads) {
  std::vector<const std::pair<const std::string, Listed>*> order;
  for (const auto& entry : manifest.files) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->second.bytes > b->second.bytes; });
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < order.size(); i = next++) {
      const std::string name = "/" + order[i]->first;
      check_file(folder + name, order[i]->second, where + name);
    }
  };
  constexpr unsigned MOST_THREADS = 8;  // a disk feeds no more
  const unsigned wanted = threads > 0 ? static_cast<unsigned>(threads) : std::thread::hardware_concurrency();
  std::vector<std::future<void>> others;
  for (unsigned i = 1; i < std::min(wanted, MOST_THREADS) && i < order.size(); ++i)
    others.push_back(std::async(std::launch::async, work));
  work();
  for (std::future<void>& other : others) other.get();
}

std::string manifest_of(const std::string& folder, const std::string& where) {
  const std::string path = folder + "/" + MANIFEST;
  if (is_missing(path))
    throw Fault(Code::not_found, where + ": not a bundle (no " + MANIFEST + ")",
                "give the folder or the zip that `export-engine bundle` wrote");
  return File(path).all(MOST_MANIFEST_BYTES);
}

std::shared_ptr<const Bundle::Impl> open(const std::string& path, const BundleOptions& options) {
  auto bundle = std::make_shared<Bundle::Impl>();
  bundle->folder = path;
  if (!is_folder(path)) {
    const File zip(path);  // refused before a folder is made for what it holds
    bundle->unpacked = std::make_unique<TemporaryFolder>(options.temporary_folder);
    bundle->folder = bundle->unpacked->path();
    unpack(path, bundle->folder);
  }
  bundle->text = manifest_of(bundle->folder, path);
  bundle->manifest = parse_manifest(bundle->text, path + "/" + MANIFEST);
  check_names(bundle->manifest, bundle->folder, path);
  check_files(bundle->manifest, bundle->folder, path, options.threads);
  return bundle;
}

}  // namespace
}  // namespace detail

std::string Bundle::Impl::path(const std::string& name) const {
  if (!manifest.files.count(name))
    throw detail::Fault(Code::not_found, folder + ": its manifest lists no file '" + name + "'",
                        "it holds " + detail::keys_of(manifest.files));
  return folder + "/" + name;
}

Result<Bundle> Bundle::open(const std::string& path, const BundleOptions& options) noexcept {
  return detail::guarded([&] { return Bundle(detail::open(path, options)); });
}

const Info& Bundle::info() const noexcept { return impl_->manifest.info; }

const std::string& Bundle::manifest() const noexcept { return impl_->text; }

Result<Arrays> Bundle::golden() const noexcept {
  return detail::guarded([&] {
    const detail::File file(impl_->path(detail::GOLDEN));
    return detail::parse_safetensors(file.all(detail::MOST_GOLDEN_BYTES), file.path());
  });
}

Result<std::string> Bundle::file(const std::string& name) const noexcept {
  return detail::guarded([&] { return impl_->path(name); });
}

}  // namespace export_engine
