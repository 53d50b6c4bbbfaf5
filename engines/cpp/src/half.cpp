#include "half.hpp"

#include <cstring>

namespace export_engine::detail {
namespace {

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint16_t half_of(float value) {
  const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000)
    return static_cast<std::uint16_t>(sign | 0x7c00 | (size >> 13 & 0x3ff) | !(size >> 13 & 0x3ff));
  if (size >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // from 65520 on: infinity
  if (size < 0x38800000) {
    // A subnormal: adding 1/2 to it leaves multiples of 2^-24, rounded to even, in the low bits.
    const std::uint32_t sum = bits_of(from_bits(size) + 0.5f);
    return static_cast<std::uint16_t>(sign | (sum - 0x3f000000));
  }
  const std::uint32_t rounded = size + 0xfff + (size >> 13 & 1);  // ties to the even one
  return static_cast<std::uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

float float_of(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half} << 16 & 0x80000000, exponent = half >> 10 & 31,
                      mantissa = half & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return from_bits(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

}  // namespace

void to_half(const float* from, std::uint16_t* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = half_of(from[i]);
}

void to_float(const std::uint16_t* from, float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = float_of(from[i]);
}

}  // namespace export_engine::detail
