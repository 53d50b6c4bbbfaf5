// How far something is from what was recorded.
#pragma once

#include <cmath>
#include <cstdint>

namespace export_engine::detail {

// The signal-to-noise ratio: infinite where all is equal.
struct Ratio {
  double signal = 0, noise = 0;

  template <class T>
  void add(const T* expected, const T* found, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const auto wanted = static_cast<double>(expected[i]), apart = wanted - static_cast<double>(found[i]);
      signal += wanted * wanted;
      noise += apart * apart;
    }
  }

  double db() const { return noise == 0 ? INFINITY : 10 * std::log10(signal / noise); }
};

}  // namespace export_engine::detail
