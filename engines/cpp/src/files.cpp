#include "files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "fault.hpp"
#include "sha256.hpp"

namespace export_engine::detail {
namespace fs = std::filesystem;
namespace {

[[noreturn]] void refused(const std::string& path, const char* what, int error) {
  throw Fault(error == ENOENT ? Code::not_found : Code::runtime,
              path + ": cannot be " + what + " (" + std::strerror(error) + ")", "check the path and its permissions");
}

}  // namespace

File::File(std::string path) : path_(std::move(path)) {
  // Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
  handle_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (handle_ < 0 && errno == ELOOP) damaged(path_ + ": is a link, where a file is wanted");
  if (handle_ < 0) refused(path_, "opened", errno);
  struct stat found{};
  const bool regular = ::fstat(handle_, &found) == 0 && S_ISREG(found.st_mode);
  if (!regular) {
    ::close(handle_);
    damaged(path_ + ": is no regular file");
  }
  bytes_ = static_cast<std::uint64_t>(found.st_size);
}

File::~File() { ::close(handle_); }

void File::read(std::uint64_t offset, void* to, std::size_t bytes) const {
  auto* at = static_cast<char*>(to);
  while (bytes) {
    const ssize_t got = ::pread(handle_, at, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) refused(path_, "read", errno);
    if (got == 0) damaged(path_ + ": ends before its " + std::to_string(bytes_) + " bytes");
    at += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
}

std::string File::all(std::uint64_t most) const {
  if (bytes_ > most) damaged(path_ + ": " + std::to_string(bytes_) + " bytes, more than " + std::to_string(most));
  std::string text(bytes_, '\0');
  read(0, text.data(), text.size());
  return text;
}

std::string File::digest(std::uint64_t first, std::uint64_t last) const {
  constexpr std::uint64_t PART = 1 << 20;  // beyond this, reading got no faster
  std::vector<char> buffer(static_cast<std::size_t>(std::min(PART, last - first)));
  Sha256 sha;
  for (; first < last; first += buffer.size()) {
    const auto bytes = static_cast<std::size_t>(std::min<std::uint64_t>(buffer.size(), last - first));
    read(first, buffer.data(), bytes);
    sha.add(buffer.data(), bytes);
  }
  return sha.hex();
}

void check_name(const std::string& name, const std::string& where) {
  constexpr std::size_t LONGEST = 1024;
  bool good = !name.empty() && name.size() <= LONGEST && name.find('\\') == std::string::npos;
  for (const char c : name) good = good && static_cast<unsigned char>(c) >= 32;
  for (std::size_t first = 0; good && first <= name.size();) {
    const std::size_t last = std::min(name.find('/', first), name.size());
    const std::string part = name.substr(first, last - first);
    good = !part.empty() && part != "." && part != "..";
    first = last + 1;
  }
  if (!good) damaged(where + ": the file name '" + name.substr(0, LONGEST) + "' leaves the folder, or is none");
}

std::map<std::string, std::uint64_t> files_under(const std::string& folder) {
  std::map<std::string, std::uint64_t> found;
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const fs::file_status status = entry->symlink_status(error);
    if (error) break;
    const std::string name = entry->path().lexically_relative(folder).generic_string();
    if (fs::is_directory(status)) continue;
    if (!fs::is_regular_file(status)) damaged(folder + ": '" + name + "' is a link or no regular file");
    found.emplace(name, entry->file_size());
  }
  if (error) refused(folder, "listed whole", error.value());
  return found;
}

bool is_folder(const std::string& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

bool is_missing(const std::string& path) {
  std::error_code ignored;
  return fs::status(path, ignored).type() == fs::file_type::not_found;
}

TemporaryFolder::TemporaryFolder(const std::string& parent) {
  const char* named = std::getenv("TMPDIR");
  const std::string place = !parent.empty() ? parent : named && *named ? named : "/tmp";
  path_ = place + "/export-engine-XXXXXX";
  if (!::mkdtemp(path_.data())) refused(place, "written to", errno);
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

NewFile::NewFile(const std::string& folder, const std::string& name) : path_(folder + "/" + name) {
  std::error_code error;
  fs::create_directories(fs::path(path_).parent_path(), error);
  handle_ = error ? -1 : ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (handle_ < 0) refused(path_, "written", error ? error.value() : errno);
}

NewFile::~NewFile() { ::close(handle_); }

void NewFile::write(const char* data, std::size_t bytes) {
  while (bytes) {
    const ssize_t done = ::write(handle_, data, bytes);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) refused(path_, "written", errno);
    data += done;
    bytes -= static_cast<std::size_t>(done);
  }
}

}  // namespace export_engine::detail
