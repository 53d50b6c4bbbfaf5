// A zip that is sealed first: its comment's digest is made to fit, where it has one.
#include <fstream>

#include "files.hpp"
#include "fuzz.hpp"
#include "sha256.hpp"
#include "zip.hpp"

using namespace export_engine::detail;

static void load(std::string_view bytes) {
  constexpr std::size_t DIGEST = 64;
  static const TemporaryFolder root("/dev/shm");  // memory: a disk would be what is measured
  static const std::string path = root.path() + "/input.zip";
  if (bytes.size() < DIGEST) return;
  const std::string_view sealed = bytes.substr(0, bytes.size() - DIGEST);
  Sha256 sha;
  sha.add(sealed.data(), sealed.size());
  std::ofstream(path, std::ios::binary) << sealed << sha.hex();
  const TemporaryFolder folder(root.path());
  unpack(path, folder.path());
}

FUZZ(load)
