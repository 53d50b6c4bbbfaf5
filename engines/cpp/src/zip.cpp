#include "zip.hpp"

#include <sys/stat.h>
#include <unistd.h>
#include <zip.h>

#include <memory>
#include <vector>

#include "fault.hpp"
#include "files.hpp"

namespace export_engine::detail {
namespace {

constexpr char PREFIX[] = "export-engine sha256 ";
constexpr std::size_t DIGEST = 64;
constexpr std::size_t COMMENT = sizeof PREFIX - 1 + DIGEST;
constexpr std::size_t END = 22;  // bytes of a zip's end record, which the comment follows

using Archive = std::unique_ptr<zip_t, decltype(&zip_discard)>;
using Entry = std::unique_ptr<zip_file_t, decltype(&zip_fclose)>;

// The comment is the file's last bytes, so what it says is checked before anything else of the zip is read.
void check_digest(const File& file) {
  char tail[END + COMMENT];
  if (file.bytes() < sizeof tail) damaged(file.path() + ": no zip of ours, it is too short");
  file.read(file.bytes() - sizeof tail, tail, sizeof tail);
  const std::string found(tail, sizeof tail);
  const bool ours = found.compare(0, 4, "PK\5\6") == 0 && found.compare(END, sizeof PREFIX - 1, PREFIX) == 0 &&
                    found[END - 2] == static_cast<char>(COMMENT) && found[END - 1] == 0;
  if (!ours) damaged(file.path() + ": no zip that `export-engine bundle` wrote, or not all of it");
  if (file.digest(0, file.bytes() - DIGEST) != found.substr(END + sizeof PREFIX - 1))
    damaged(file.path() + ": changed after it was made: its sha256 is not the one in its comment");
}

Archive open(const File& file) {
  int error = 0;
  const int handle = ::dup(file.handle());  // of the very file whose digest was checked
  Archive archive(handle < 0 ? nullptr : zip_fdopen(handle, ZIP_CHECKCONS, &error), &zip_discard);
  if (!archive) {
    if (handle >= 0) ::close(handle);
    damaged(file.path() + ": its entries cannot be read (libzip's error " + std::to_string(error) + ")");
  }
  return archive;
}

bool is_plain(zip_t* archive, zip_uint64_t index) {
  zip_uint8_t system = 0;
  zip_uint32_t attributes = 0;
  if (zip_file_get_external_attributes(archive, index, 0, &system, &attributes)) return false;
  const unsigned mode = system == ZIP_OPSYS_UNIX ? attributes >> 16 : 0;
  return (mode & S_IFMT) == 0 || (mode & S_IFMT) == S_IFREG;
}

// Returns an entry's name and size, or refuses one that is packed, encrypted, a folder, a link, or too large.
zip_stat_t checked(zip_t* archive, zip_uint64_t index, const File& file, std::uint64_t& left) {
  constexpr zip_uint64_t NEEDED = ZIP_STAT_NAME | ZIP_STAT_SIZE | ZIP_STAT_COMP_SIZE | ZIP_STAT_COMP_METHOD;
  zip_stat_t stat;
  if (zip_stat_index(archive, index, 0, &stat) || (stat.valid & NEEDED) != NEEDED)
    damaged(file.path() + ": an entry cannot be read");
  check_name(stat.name, file.path());
  const bool stored = stat.comp_method == ZIP_CM_STORE && stat.size == stat.comp_size;
  const bool open = !(stat.valid & ZIP_STAT_ENCRYPTION_METHOD) || stat.encryption_method == ZIP_EM_NONE;
  if (!stored || !open || !is_plain(archive, index))
    damaged(file.path() + ": '" + stat.name + "' is packed, encrypted or no plain file");
  if (stat.size > left) damaged(file.path() + ": its entries say that they hold more than the file does");
  left -= stat.size;
  return stat;
}

void unpack_entry(zip_t* archive, zip_uint64_t index, const zip_stat_t& stat, const std::string& folder) {
  std::vector<char> buffer(1 << 20);
  NewFile to(folder, stat.name);
  const Entry entry(zip_fopen_index(archive, index, 0), &zip_fclose);
  std::uint64_t done = 0;
  for (zip_int64_t got = 1; entry && got > 0; done += static_cast<std::uint64_t>(got)) {
    got = zip_fread(entry.get(), buffer.data(), buffer.size());
    if (got < 0) break;
    to.write(buffer.data(), static_cast<std::size_t>(got));
  }
  if (done != stat.size) damaged(std::string(stat.name) + ": cannot be read from its zip");
}

}  // namespace

void unpack(const std::string& path, const std::string& folder) {
  constexpr zip_int64_t MOST_ENTRIES = 1 << 16;
  const File file(path);
  check_digest(file);
  const Archive archive = open(file);
  const zip_int64_t entries = zip_get_num_entries(archive.get(), 0);
  if (entries < 1 || entries > MOST_ENTRIES) damaged(path + ": " + std::to_string(entries) + " entries");
  std::vector<zip_stat_t> stats;
  std::uint64_t left = file.bytes();
  for (zip_int64_t i = 0; i < entries; ++i)
    stats.push_back(checked(archive.get(), static_cast<zip_uint64_t>(i), file, left));
  for (zip_int64_t i = 0; i < entries; ++i)
    unpack_entry(archive.get(), static_cast<zip_uint64_t>(i), stats[static_cast<std::size_t>(i)], folder);
}

}  // namespace export_engine::detail
