// Files that may have been tampered with: regular ones alone, never through a link, and no name that leaves its folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace export_engine::detail {

// A regular file, open for reading; refuses links, devices and folders.
class File {
 public:
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::uint64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }
  int handle() const { return handle_; }

  void read(std::uint64_t offset, void* to, std::size_t bytes) const;
  std::string all(std::uint64_t most) const;                          // its text, of at most `most` bytes
  std::string digest(std::uint64_t first, std::uint64_t last) const;  // sha256 of the bytes [first, last)

 private:
  std::string path_;
  int handle_ = -1;
  std::uint64_t bytes_ = 0;
};

// Refuses a name that is absolute, holds `..`, `.` or an empty part, or a character that no file of ours has.
void check_name(const std::string& name, const std::string& where);

// Returns every file under a folder and its bytes, names relative and with `/`; refuses links and devices.
std::map<std::string, std::uint64_t> files_under(const std::string& folder);

bool is_folder(const std::string& path);
bool is_missing(const std::string& path);  // not so where a folder above it lets nobody look

// A folder of this process alone that is removed with all it holds.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& parent);  // empty: the system's
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Writes a new file in a folder of our own, and the folders above it.
class NewFile {
 public:
  NewFile(const std::string& folder, const std::string& name);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const char* data, std::size_t bytes);

 private:
  std::string path_;
  int handle_;
};

}  // namespace export_engine::detail
