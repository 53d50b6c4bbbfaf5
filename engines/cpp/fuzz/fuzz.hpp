// What every fuzzer does: hands bytes to a loader, which reads them or refuses them as a Fault, and does nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fault.hpp"

#define FUZZ(loader)                                                                  \
  extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) { \
    const std::string_view bytes(reinterpret_cast<const char*>(data), size);          \
    try {                                                                             \
      loader(bytes);                                                                  \
    } catch (const export_engine::detail::Fault&) {                                   \
    }                                                                                 \
    return 0;                                                                         \
  }
