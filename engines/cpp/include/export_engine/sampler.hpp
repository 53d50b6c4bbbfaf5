// The sampling loop: noise to finished latents, by the steps that the bundle holds.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "export_engine/engine.hpp"

namespace export_engine {

struct SampleOptions {
  std::optional<float> guidance_scale;        // in place of the bundle's; of guided models alone
  std::function<bool(std::int64_t)> on_step;  // called before each step of each batch; false ends the sampling
};

class EXPORT_ENGINE_API Sampler {
 public:
  // Refuses a bundle whose scheduler has no portable steps (`info().sampler->why_not_portable`).
  static Result<Sampler> open(const Engine& engine) noexcept;

  // Returns finished latents, fp32 [count, …]. `noise` is standard normal, fp32 [count, …]; `wanted` holds every input
  // but latent, timestep and step, `count` rows of each, and `unwanted` the same for guided models, empty for others.
  // More samples than the engine takes at once are drawn in several batches.
  Result<Array> sample(const Tensor& noise, const Feeds& wanted, const Feeds& unwanted = {},
                       const SampleOptions& options = {}) const noexcept;

  const Engine& engine() const noexcept;

  struct Impl;
  explicit Sampler(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<const Impl> impl_;
};

// Returns the peak signal-to-noise ratio, 10 log₁₀(peak² / mean square error), in dB; infinite for equal values.
EXPORT_ENGINE_API double psnr_db(const Tensor& expected, const Tensor& found, double peak) noexcept;

}  // namespace export_engine
