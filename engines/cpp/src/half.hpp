// fp16 and back, as numpy converts: to the nearest, ties to the even one, too large ones to infinity.
#pragma once

#include <cstdint>

namespace export_engine::detail {

void to_half(const float* from, std::uint16_t* to, std::int64_t count);
void to_float(const std::uint16_t* from, float* to, std::int64_t count);

}  // namespace export_engine::detail
