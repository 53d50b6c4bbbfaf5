// manifest.json: what a bundle is, and which files it holds.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "export_engine/info.hpp"

namespace export_engine::detail {

constexpr std::int64_t FORMAT_VERSION = 1;
constexpr std::uint64_t MOST_MANIFEST_BYTES = std::uint64_t{64} << 20;
inline const char* const MANIFEST = "manifest.json";
inline const char* const GOLDEN = "golden.safetensors";

struct Listed {
  std::uint64_t bytes;
  std::string sha256;
};

struct Manifest {
  std::map<std::string, Listed> files;
  Info info;
};

// Parses a manifest, checks its own digest and that all it names is among its files.
Manifest parse_manifest(std::string_view text, const std::string& where);

}  // namespace export_engine::detail
