// An engine of a bundle, ready to run: one call of the denoiser.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "export_engine/bundle.hpp"

namespace export_engine {

struct EngineOptions {
  std::string name;            // of the engine in the bundle; empty: the best that can run here
  std::string backend;         // ort or trt; empty: any
  std::string device = "cpu";  // of ONNX Runtime: cpu, cuda, or tensorrt (its execution provider)
  int device_id = 0;           // which GPU
  int threads = 0;             // of ONNX Runtime; 0: all cores, and waiting threads sleep
};

// How an engine did on one recorded call, or on the recorded samples.
struct GoldenRow {
  std::string what;
  double value_db, limit_db;
  bool passed;
};

struct SelfTest {
  std::vector<GoldenRow> rows;
  bool passed() const {
    for (const GoldenRow& row : rows)
      if (!row.passed) return false;
    return !rows.empty();
  }
};

// Copies share one session; every member may be called from several threads at once.
class EXPORT_ENGINE_API Engine {
 public:
  static Result<Engine> open(const Bundle& bundle, const EngineOptions& options = {}) noexcept;

  // Feeds every input of `info().inputs`, and `step`, which engines without per-step scales ignore; returns the
  // output as fp32. Shapes, the batch and steps are checked first.
  Result<Array> run(const Feeds& feeds) const noexcept;

  // The same into the caller's memory: fp32, `count` elements.
  Status run(const Feeds& feeds, float* output, std::int64_t count) const noexcept;

  // Returns the shape that the output has for these feeds.
  Result<Shape> output_shape(const Feeds& feeds) const noexcept;

  // Runs the bundle's golden feeds, draws its samples, and compares with what was recorded when it was made.
  Result<SelfTest> self_test() const noexcept;

  const EngineInfo& info() const noexcept;
  const Bundle& bundle() const noexcept;

  struct Impl;
  explicit Engine(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  const Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<const Impl> impl_;
};

}  // namespace export_engine
