// Tensors in the caller's memory, and arrays that own theirs; rows lie one after the other, the last axis fastest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace export_engine {

enum class DType { fp32 = 0, fp16 = 1, int64 = 2 };  // the values of ee_dtype in export_engine.h

constexpr std::size_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : dtype == DType::fp16 ? 2 : 8; }

using Shape = std::vector<std::int64_t>;

// Returns the number of elements; a shape with a negative size, or of more than memory can hold, has none.
inline std::int64_t count_of(const Shape& shape) {
  constexpr std::int64_t MOST = std::int64_t{1} << 48;
  std::int64_t count = 1;
  for (const std::int64_t size : shape) {
    if (size < 0 || (size > 0 && count > MOST / size)) return 0;
    count *= size;
  }
  return count;
}

// A view of memory that the caller keeps alive and unchanged during a call.
struct Tensor {
  DType dtype = DType::fp32;
  Shape shape;
  const void* data = nullptr;

  static Tensor of(const float* data, Shape shape) { return {DType::fp32, std::move(shape), data}; }
  static Tensor of(const std::int64_t* data, Shape shape) { return {DType::int64, std::move(shape), data}; }
  static Tensor half(const std::uint16_t* bits, Shape shape) { return {DType::fp16, std::move(shape), bits}; }

  std::int64_t count() const { return count_of(shape); }
};

// An array with memory of its own, not set to any value when it is made.
class Array {
 public:
  Array() = default;
  Array(DType dtype, Shape shape)
      : dtype_(dtype),
        shape_(std::move(shape)),
        data_(new std::byte[size_of(dtype) * static_cast<std::size_t>(count_of(shape_))]) {}

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  std::int64_t count() const { return data_ ? count_of(shape_) : 0; }
  std::size_t bytes() const { return size_of(dtype_) * static_cast<std::size_t>(count()); }

  void* data() { return data_.get(); }
  const void* data() const { return data_.get(); }
  float* floats() { return reinterpret_cast<float*>(data_.get()); }  // of an fp32 array
  const float* floats() const { return reinterpret_cast<const float*>(data_.get()); }
  std::int64_t* integers() { return reinterpret_cast<std::int64_t*>(data_.get()); }  // of an int64 array
  const std::int64_t* integers() const { return reinterpret_cast<const std::int64_t*>(data_.get()); }

  Tensor view() const { return {dtype_, shape_, data_.get()}; }

 private:
  DType dtype_ = DType::fp32;
  Shape shape_;
  std::unique_ptr<std::byte[]> data_;
};

using Feeds = std::map<std::string, Tensor>;
using Arrays = std::map<std::string, Array>;

// Returns views of named arrays, as feeds.
inline Feeds views(const Arrays& arrays) {
  Feeds feeds;
  for (const auto& [name, array] : arrays) feeds.emplace(name, array.view());
  return feeds;
}

}  // namespace export_engine
