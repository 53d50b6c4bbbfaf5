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

Array repeated(const Tensor& row, std::int64_t count) {
  Shape shape = row.shape;
  shape[0] = count;
  Array rows(row.dtype, std::move(shape));
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(static_cast<std::byte*>(rows.data()) + static_cast<std::size_t>(i) * bytes_of(row), row.data,
                bytes_of(row));
  return rows;
}

Array concatenated(const std::vector<Array>& parts) {
  Shape shape = parts.front().shape();
  shape[0] = 0;
  for (const Array& part : parts) {
    Shape one = part.shape();
    if (!one.empty()) shape[0] += std::exchange(one[0], shape[0]);
    if (one.size() != shape.size() || !std::equal(one.begin() + 1, one.end(), shape.begin() + 1) ||
        part.dtype() != parts.front().dtype())
      damaged("a graph gives " + text_of(part.shape()) + " after " + text_of(parts.front().shape()));
  }
  Array all(parts.front().dtype(), shape);
  auto* to = static_cast<std::byte*>(all.data());
  for (const Array& part : parts) {
    std::memcpy(to, part.data(), part.bytes());
    to += part.bytes();
  }
  return all;
}

}  // namespace export_engine::detail
