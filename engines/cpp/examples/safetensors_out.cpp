#include "safetensors_out.hpp"

#include <fstream>

using namespace export_engine;

namespace {

std::string entry(const std::string& name, const Array& array, std::size_t first) {
  const char* dtype = array.dtype() == DType::fp32 ? "F32" : array.dtype() == DType::fp16 ? "F16" : "I64";
  std::string shape;
  for (const std::int64_t size : array.shape()) shape += (shape.empty() ? "" : ",") + std::to_string(size);
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
         std::to_string(first) + "," + std::to_string(first + array.bytes()) + "]}";
}

}  // namespace

bool write_safetensors(const std::string& path, const Arrays& arrays) {
  std::string header;
  std::size_t at = 0;
  for (const auto& [name, array] : arrays) {
    header += (header.empty() ? "{" : ",") + entry(name, array, at);
    at += array.bytes();
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::ofstream file(path, std::ios::binary);
  const std::uint64_t length = header.size();
  for (int i = 0; i < 8; ++i) file.put(static_cast<char>(length >> (8 * i) & 255));
  file << header;
  for (const auto& [name, array] : arrays)
    file.write(static_cast<const char*>(array.data()), static_cast<std::streamsize>(array.bytes()));
  return static_cast<bool>(file.flush());
}
