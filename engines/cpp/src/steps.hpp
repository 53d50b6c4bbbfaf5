// Engines whose activations have a scale for every sampling step: which step of its own schedule one is called at.
#pragma once

#include <optional>
#include <vector>

#include "export_engine/engine.hpp"

namespace export_engine::detail {

inline const char* const STEP = "step";
inline const char* const STEP_ROW = "step_row";

class Steps {
 public:
  // `timesteps`: what the model is fed at each step; `table`: fp32 [steps, n], of engines that are told its rows.
  Steps(std::string engine, std::vector<double> timesteps, std::optional<Array> table);

  // Refuses steps out of range, and timesteps of another schedule than the engine was calibrated for.
  void check(const Feeds& feeds, std::int64_t batch) const;

  // Returns the table's rows, fp32 [batch, n], that the feeds' steps name; nothing without a table.
  std::optional<Array> rows(const Tensor& step) const;

 private:
  void check_schedule(const Tensor& timestep, const std::int64_t* step) const;

  std::string engine_;
  std::vector<double> timesteps_;
  double slack_ = 0;
  std::optional<Array> table_;
};

}  // namespace export_engine::detail
