#include <cstdio>
#include <cstring>

#include "arrays.hpp"
#include "fault.hpp"

namespace export_engine::detail {
namespace {

// Returns the header's text and moves `bytes` on to the data.
std::string header_of(std::string_view& bytes, const std::string& where) {
  constexpr std::size_t LONGEST = 512;  // numpy writes 118
  if (bytes.size() < 12 || bytes.substr(0, 6) != "\x93NUMPY") damaged(where + ": no .npy file");
  const auto byte = [&](std::size_t i) { return static_cast<std::size_t>(static_cast<unsigned char>(bytes[i])); };
  const bool first = byte(6) == 1;
  std::size_t length = byte(8) | byte(9) << 8;
  if (!first) length |= byte(10) << 16 | byte(11) << 24;
  const std::size_t start = first ? 10 : 12;
  if (length > LONGEST || length > bytes.size() - start) damaged(where + ": no .npy file, or not all of it");
  const std::string text(bytes.substr(start, length));
  bytes.remove_prefix(start + length);
  return text;
}

}  // namespace

Array parse_npy(std::string_view bytes, const std::string& where) {
  const std::string header = header_of(bytes, where);
  char steps[10], width[10];
  int end = 0;
  std::sscanf(header.c_str(), "{'descr': '<f4', 'fortran_order': False, 'shape': (%9[0-9], %9[0-9]), }%n", steps, width,
              &end);
  if (!end || header.find_first_not_of(" \n", static_cast<std::size_t>(end)) != std::string::npos)
    damaged(where + ": not fp32 in rows, [steps, n]");
  const Shape shape{std::stoll(steps), std::stoll(width)};
  if (static_cast<std::uint64_t>(shape[0] * shape[1]) * sizeof(float) != bytes.size())
    damaged(where + ": " + std::to_string(bytes.size()) + " bytes do not fit its shape");
  Array array(DType::fp32, shape);
  std::memcpy(array.data(), bytes.data(), array.bytes());
  return array;
}

}  // namespace export_engine::detail
