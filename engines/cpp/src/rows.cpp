#include "rows.hpp"

#include <algorithm>
#include <cstring>

#include "fault.hpp"
#include "text.hpp"

namespace export_engine::detail {
namespace {

std::size_t bytes_of(const Tensor& tensor) { return static_cast<std::size_t>(tensor.count()) * size_of(tensor.dtype); }

}  // namespace

Tensor rows_of(const Tensor& tensor, std::int64_t first, std::int64_t last) {
  Tensor part = tensor;
  part.shape[0] = last - first;
  const std::size_t each = bytes_of(tensor) / static_cast<std::size_t>(std::max<std::int64_t>(1, tensor.shape[0]));
  part.data = static_cast<const std::byte*>(tensor.data) + each * static_cast<std::size_t>(first);
  return part;
}

Feeds rows_of(const Feeds& feeds, std::int64_t first, std::int64_t last) {
  Feeds part;
  for (const auto& [name, tensor] : feeds) part.emplace(name, rows_of(tensor, first, last));
  return part;
}

Arrays stacked(const Feeds& above, const Feeds& below) {
  Arrays arrays;
  for (const auto& [name, top] : above) {
    const auto found = below.find(name);
    const bool alike = found != below.end() && found->second.dtype == top.dtype && found->second.shape == top.shape;
    if (!alike)
      throw Fault(Code::invalid_argument,
                  "sampling: the unwanted '" + name + "' is not " + name_of(top.dtype) + " " + text_of(top.shape) +
                      ", as the wanted one is",
                  "feed both alike");
    Shape shape = top.shape;
    shape[0] *= 2;
    Array array(top.dtype, std::move(shape));
    std::memcpy(array.data(), top.data, bytes_of(top));
    std::memcpy(static_cast<std::byte*>(array.data()) + bytes_of(top), found->second.data, bytes_of(top));
    arrays.emplace(name, std::move(array));
  }
  return arrays;
}

Array repeated(const Array& row, std::int64_t count) {
  Shape shape = row.shape();
  shape[0] = count;
  Array rows(row.dtype(), std::move(shape));
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(static_cast<std::byte*>(rows.data()) + static_cast<std::size_t>(i) * row.bytes(), row.data(),
                row.bytes());
  return rows;
}

}  // namespace export_engine::detail
