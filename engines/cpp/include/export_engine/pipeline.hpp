// A whole text-to-image pipeline: token ids and noise to pictures.
#pragma once

#include <memory>

#include "export_engine/sampler.hpp"

namespace export_engine {

struct DrawOptions : SampleOptions {
  Tensor unwanted_tokens;  // int64 [count, tokens]; without data: the empty caption
  Feeds wanted, unwanted;  // further inputs that the text encoder does not give
};

class EXPORT_ENGINE_API Pipeline {
 public:
  // Opens the denoiser by `options`, and the text encoder and the decoder in its float type on the same device.
  static Result<Pipeline> open(const Bundle& bundle, const EngineOptions& options = {}) noexcept;

  // Returns pictures in [−1, 1], fp32 [count, channels, height, width]. `tokens` is int64 [count, tokens], padded;
  // `noise` is fp32 [count, …].
  Result<Array> draw(const Tensor& tokens, const Tensor& noise, const DrawOptions& options = {}) const noexcept;

  const Engine& engine() const noexcept;

  struct Impl;
  explicit Pipeline(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<const Impl> impl_;
};

}  // namespace export_engine
