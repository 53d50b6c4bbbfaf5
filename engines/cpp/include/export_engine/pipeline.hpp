// A whole text-to-image pipeline: token ids and noise to pictures.
#pragma once

#include <memory>

#include "export_engine/sampler.hpp"

namespace export_engine {

struct DrawOptions : SampleOptions {
  Feeds unwanted_tokens;  // as the wanted ones, or one row of each; empty: what the bundle says
};

class EXPORT_ENGINE_API Pipeline {
 public:
  // Opens the denoiser by `options`, and the text encoder and the decoder in its float type on the same device.
  static Result<Pipeline> open(const Bundle& bundle, const EngineOptions& options = {}) noexcept;

  // Returns pictures in [−1, 1], fp32 [count, channels, height, width]. `tokens` are int64 [count, tokens], padded, by
  // the inputs of `info().pipeline->text`; `noise` is fp32 [count, …].
  Result<Array> draw(const Feeds& tokens, const Tensor& noise, const DrawOptions& options = {}) const noexcept;

  // Encodes the recorded tokens and decodes the recorded latents; the denoiser is tested by `engine().self_test()`.
  Result<SelfTest> self_test() const noexcept;

  const Engine& engine() const noexcept;

  struct Impl;
  explicit Pipeline(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<const Impl> impl_;
};

}  // namespace export_engine
