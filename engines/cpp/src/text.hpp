// Small pieces of messages.
#pragma once

#include <cstdio>
#include <string>

#include "export_engine/info.hpp"
#include "export_engine/tensor.hpp"

namespace export_engine::detail {

inline std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

inline const char* name_of(DType dtype) {
  return dtype == DType::fp32 ? "fp32" : dtype == DType::fp16 ? "fp16" : "int64";
}

template <class List, class Say>
std::string joined(const List& list, Say say, const char* between = ", ") {
  std::string text;
  for (const auto& item : list) text += (text.empty() ? "" : between) + std::string(say(item));
  return text;
}

template <class Map>
std::string keys_of(const Map& map) {
  return map.empty() ? "none" : joined(map, [](const auto& item) { return item.first; });
}

inline std::string text_of(const Shape& shape) {
  return "[" + joined(shape, [](std::int64_t size) { return std::to_string(size); }) + "]";
}

inline std::string text_of(const std::vector<Dimension>& shape) {
  return "[" + joined(shape, [](const Dimension& d) { return d.axis.empty() ? std::to_string(d.size) : d.axis; }) + "]";
}

}  // namespace export_engine::detail
