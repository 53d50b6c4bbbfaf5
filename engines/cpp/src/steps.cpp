#include "steps.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "convert.hpp"
#include "fault.hpp"
#include "text.hpp"

namespace export_engine::detail {
namespace {

constexpr double TOLERANCE = 1e-3;  // of a timestep, relative: schedulers compute them in fp32
constexpr double LEAST = 1e-6;

double value_of(const Tensor& tensor, std::int64_t at) {
  return tensor.dtype == DType::int64 ? static_cast<double>(static_cast<const std::int64_t*>(tensor.data)[at])
                                      : static_cast<double>(static_cast<const float*>(tensor.data)[at]);
}

}  // namespace

Steps::Steps(std::string engine, std::vector<double> timesteps, std::optional<Array> table)
    : engine_(std::move(engine)), timesteps_(std::move(timesteps)), table_(std::move(table)) {
  double largest = 0;
  for (const double timestep : timesteps_) largest = std::max(largest, std::abs(timestep));
  slack_ = TOLERANCE * std::max(LEAST, largest);
  if (table_ && table_->shape()[0] != static_cast<std::int64_t>(timesteps_.size()))
    damaged(engine_ + ": its table has " + std::to_string(table_->shape()[0]) + " rows for " +
            std::to_string(timesteps_.size()) + " steps");
}

void Steps::check(const Feeds& feeds, std::int64_t batch) const {
  const auto found = feeds.find(STEP);
  const auto steps = static_cast<std::int64_t>(timesteps_.size());
  const std::string last = std::to_string(steps - 1);
  if (found == feeds.end())
    throw Fault(Code::invalid_argument, engine_ + ": the feeds hold no 'step'", "feed each row's, 0 … " + last);
  const Tensor& step = found->second;
  if (step.dtype != DType::int64 || step.shape != Shape{batch} || !step.data)
    throw Fault(Code::invalid_argument,
                engine_ + ": 'step' is " + name_of(step.dtype) + " " + text_of(step.shape) + ", where int64 [" +
                    std::to_string(batch) + "] is wanted",
                "feed each row's, 0 … " + last);
  const auto* values = static_cast<const std::int64_t*>(step.data);
  for (std::int64_t i = 0; i < batch; ++i)
    if (values[i] < 0 || values[i] >= steps)
      throw Fault(
          Code::invalid_argument,
          engine_ + ": step " + std::to_string(values[i]) + ", and activations have scales for the steps 0 … " + last,
          "feed the position in the schedule that the engine was calibrated for");
  const auto timestep = feeds.find("timestep");
  if (timestep != feeds.end()) check_schedule(timestep->second, values);
}

void Steps::check_schedule(const Tensor& timestep, const std::int64_t* step) const {
  Converted converted;
  const Tensor fed = timestep.dtype == DType::fp16 ? converted.to(timestep, DType::fp32, "timestep") : timestep;
  for (std::int64_t row = 0; row < fed.count(); ++row) {
    const double value = value_of(fed, row);
    double nearest = INFINITY;
    for (const double own : timesteps_) nearest = std::min(nearest, std::abs(own - value));
    const double own = timesteps_[static_cast<std::size_t>(step[row])];
    if (std::isfinite(value) && std::abs(own - value) <= nearest + slack_) continue;
    throw Fault(Code::invalid_argument,
                engine_ + ": timestep " + number(value) + " at step " + std::to_string(step[row]) +
                    ", whose scales are for timestep " + number(own) + ": another schedule than the " +
                    std::to_string(timesteps_.size()) + " steps it was calibrated for",
                "sample with those, or feed the step that is nearest to each timestep");
  }
}

std::optional<Array> Steps::rows(const Tensor& step) const {
  if (!table_) return std::nullopt;
  const std::int64_t width = table_->shape()[1];
  Array rows(DType::fp32, {step.shape[0], width});
  const auto* values = static_cast<const std::int64_t*>(step.data);
  for (std::int64_t i = 0; i < step.shape[0]; ++i)
    std::memcpy(rows.floats() + i * width, table_->floats() + values[i] * width,
                static_cast<std::size_t>(width) * sizeof(float));
  return rows;
}

}  // namespace export_engine::detail
