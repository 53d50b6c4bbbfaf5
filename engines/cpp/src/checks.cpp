#include "checks.hpp"

#include "fault.hpp"
#include "steps.hpp"
#include "text.hpp"

namespace export_engine::detail {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& fix) {
  throw Fault(Code::invalid_argument, what, fix);
}

void check_type(const EngineInfo& engine, const Port& port, const Tensor& tensor) {
  const std::string where = engine.name + ": '" + port.name + "'";
  const bool whole = port.dtype == "int64";
  if (whole != (tensor.dtype == DType::int64))
    refuse(where + " is " + name_of(tensor.dtype) + ", where " + (whole ? "int64" : "fp32 or fp16") + " is wanted",
           "convert it before");
  if (tensor.shape.size() != port.shape.size())
    refuse(where + " has shape " + text_of(tensor.shape) + ", where " + text_of(port.shape) + " is wanted",
           port.means.empty() ? "feed that shape" : "feed " + port.means);
}

std::string range_of(const Axis& axis) {
  const std::string range = std::to_string(axis.min) + " … " + std::to_string(axis.max);
  return axis.multiple > 1 ? range + ", multiples of " + std::to_string(axis.multiple) : range;
}

void check_axis(const EngineInfo& engine, const Port& port, const std::string& name, const Axis& axis,
                std::int64_t size, Sizes& sizes) {
  const std::string where = engine.name + ": '" + port.name + "' has " + name + " " + std::to_string(size);
  if (size < axis.min || size > axis.max || size % axis.multiple)
    refuse(where + ", and " + name + " may be " + range_of(axis),
           name == "batch" ? "feed so many rows at once: " + range_of(axis)
                           : "feed another size, or build an engine for this one");
  const auto [known, first] = sizes.emplace(name, size);
  if (!first && known->second != size)
    refuse(where + ", and inputs before it have " + std::to_string(known->second), "feed the same for every input");
}

void check_shape(const Info& info, const EngineInfo& engine, const Port& port, const Tensor& tensor, Sizes& sizes) {
  for (std::size_t i = 0; i < port.shape.size(); ++i) {
    const Dimension& wanted = port.shape[i];
    if (!wanted.axis.empty())
      check_axis(engine, port, wanted.axis, info.axes.at(wanted.axis), tensor.shape[i], sizes);
    else if (wanted.size != tensor.shape[i])
      refuse(engine.name + ": '" + port.name + "' has shape " + text_of(tensor.shape) + ", where " +
                 text_of(port.shape) + " is wanted",
             port.means.empty() ? "feed that shape" : "feed " + port.means);
  }
}

// Refuses whole numbers beyond those that the model looks up: a GPU would read whatever lies there.
void check_values(const EngineInfo& engine, const Port& port, const Tensor& tensor) {
  const auto* values = static_cast<const std::int64_t*>(tensor.data);
  for (std::int64_t i = 0; port.largest >= 0 && i < tensor.count(); ++i)
    if (values[i] < 0 || values[i] > port.largest)
      refuse(engine.name + ": '" + port.name + "' holds " + std::to_string(values[i]),
             "feed 0 … " + std::to_string(port.largest) + (port.means.empty() ? "" : ": " + port.means));
}

// Callers give `step` alone: its row is looked up, and an engine without scales for steps ignores it.
bool is_step(const std::string& name) { return name == STEP || name == STEP_ROW; }

}  // namespace

Sizes check_feeds(const Info& info, const EngineInfo& engine, const Feeds& feeds) {
  Sizes sizes;
  std::size_t known = feeds.count(STEP);
  for (const Port& port : info.inputs) {
    if (is_step(port.name)) continue;
    const auto found = feeds.find(port.name);
    if (found == feeds.end())
      refuse(engine.name + ": the feeds hold no '" + port.name + "'",
             port.means.empty() ? "feed it too" : "feed " + port.means);
    check_type(engine, port, found->second);
    check_shape(info, engine, port, found->second, sizes);
    if (!found->second.data)
      refuse(engine.name + ": '" + port.name + "' has no data",
             "point it to " + std::to_string(found->second.count()) + " elements");
    check_values(engine, port, found->second);
    ++known;
  }
  if (known == feeds.size()) return sizes;
  for (const auto& [name, tensor] : feeds) {
    bool wanted = name == STEP;
    for (const Port& port : info.inputs) wanted = wanted || (port.name == name && !is_step(name));
    if (!wanted)
      refuse(engine.name + ": has no input '" + name + "'",
             "feed " + joined(info.inputs, [](const Port& port) { return port.name; }));
  }
  return sizes;
}

Shape resolved(const std::vector<Dimension>& shape, const Sizes& sizes) {
  Shape numbers;
  for (const Dimension& d : shape) {
    const auto found = d.axis.empty() ? sizes.end() : sizes.find(d.axis);
    if (!d.axis.empty() && found == sizes.end()) damaged("no input gives the size of the axis '" + d.axis + "'");
    numbers.push_back(d.axis.empty() ? d.size : found->second);
  }
  if (count_of(numbers) == 0) refuse("a shape of " + text_of(numbers) + " is too large", "feed fewer rows at once");
  return numbers;
}

}  // namespace export_engine::detail
