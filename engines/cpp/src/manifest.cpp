#include "manifest.hpp"

#include "fault.hpp"
#include "files.hpp"
#include "info.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace export_engine::detail {
namespace {

bool is_digest(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

void check_version(const Cursor& manifest) {
  const std::string& kind = manifest["kind"].text();
  if (kind != "bundle")
    throw Fault(Code::invalid_argument, manifest.path() + ": a folder of kind '" + kind + "', where a bundle is wanted",
                "make one of a run: export-engine bundle RUN --out DIR");
  const std::int64_t version = manifest["info"]["format_version"].integer(1, INT64_MAX);
  if (version > FORMAT_VERSION)
    throw Fault(Code::newer_version,
                manifest.path() + ": a bundle of format version " + std::to_string(version) +
                    "; this library reads versions up to " + std::to_string(FORMAT_VERSION),
                "update the library export_engine, or make the bundle with an older export-engine");
}

// The digest is that of the file with zeros in the digest's place.
void check_digest(std::string_view text, const std::string& digest, const std::string& where) {
  const std::size_t at = is_digest(digest) ? text.find(digest) : std::string_view::npos;
  if (at == std::string_view::npos || text.find(digest, at + 1) != std::string_view::npos)
    damaged(where + ": its digest is none");
  Sha256 sha;
  sha.add(text.data(), at);
  sha.add(std::string(digest.size(), '0').data(), digest.size());
  sha.add(text.data() + at + digest.size(), text.size() - at - digest.size());
  if (sha.hex() != digest) damaged(where + ": changed after it was written: its sha256 is not its digest");
}

std::map<std::string, Listed> files_of(const Cursor& manifest) {
  std::map<std::string, Listed> files;
  for (const auto& [name, entry] : manifest["files"].members()) {
    check_name(name, manifest.path());
    if (name == MANIFEST) entry.refuse("a file that a manifest lists");
    const std::string& sha256 = entry["sha256"].text();
    if (!is_digest(sha256)) entry["sha256"].refuse("a sha256");
    files[name] = {static_cast<std::uint64_t>(entry["bytes"].integer(0, INT64_MAX)), sha256};
  }
  return files;
}

void check_listed(const Manifest& manifest, const std::string& name, const std::string& where) {
  if (!manifest.files.count(name)) damaged(where + ": names the file '" + name + "', which it does not list");
}

void check_files_named(const Manifest& manifest, const std::string& where) {
  check_listed(manifest, GOLDEN, where);
  for (const auto& [name, engine] : manifest.info.engines)
    check_listed(manifest, engine.folder + "/" + engine.file, where);
  if (!manifest.info.pipeline) return;
  for (const TokensInfo& input : manifest.info.pipeline->text.inputs) check_listed(manifest, input.tokenizer, where);
  for (const auto& [dtype, file] : manifest.info.pipeline->text.encoders) check_listed(manifest, file, where);
  if (const auto& vae = manifest.info.pipeline->vae)
    for (const auto& [dtype, file] : vae->decoders) check_listed(manifest, file, where);
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& where) {
  const Json json = parse_json(text, where);
  const Cursor cursor(json, where);
  check_version(cursor);
  check_digest(text, cursor["digest"].text(), where);
  Manifest manifest{files_of(cursor), info_of(cursor["info"])};
  check_files_named(manifest, where);
  return manifest;
}

}  // namespace export_engine::detail
