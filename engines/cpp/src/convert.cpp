#include "convert.hpp"

#include "fault.hpp"
#include "half.hpp"
#include "text.hpp"

namespace export_engine::detail {

Tensor Converted::to(const Tensor& tensor, DType dtype, const std::string& name) {
  if (tensor.dtype == dtype) return tensor;
  if (tensor.dtype == DType::int64 || dtype == DType::int64)
    throw Fault(Code::invalid_argument,
                "the input '" + name + "' is " + name_of(tensor.dtype) + ", where " + name_of(dtype) + " is wanted",
                "convert it before");
  Array& made = made_.emplace_back(dtype, tensor.shape);
  if (dtype == DType::fp16)
    to_half(static_cast<const float*>(tensor.data), static_cast<std::uint16_t*>(made.data()), made.count());
  else
    to_float(static_cast<const std::uint16_t*>(tensor.data), made.floats(), made.count());
  return made.view();
}

Array widened(Array array) {
  if (array.dtype() != DType::fp16) return array;
  Array floats(DType::fp32, array.shape());
  to_float(static_cast<const std::uint16_t*>(array.data()), floats.floats(), floats.count());
  return floats;
}

std::vector<Fed> fed(const Session& session, const Feeds& feeds, Converted& converted) {
  std::vector<Fed> given;
  for (const TypedName& input : session.inputs()) {
    const auto found = feeds.find(input.name);
    if (found == feeds.end())
      throw Fault(Code::invalid_argument, "the feeds hold no '" + input.name + "'", "feed it too");
    given.push_back({input.name, converted.to(found->second, input.dtype, input.name)});
  }
  return given;
}

}  // namespace export_engine::detail
