// A graph or plan that a backend has loaded: tensors in, tensors out, in its own types.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "export_engine/engine.hpp"

namespace export_engine::detail {

struct TypedName {
  std::string name;
  DType dtype;
};

struct Fed {
  std::string name;
  Tensor tensor;
};

// Memory that an output is written to.
struct Place {
  DType dtype;
  Shape shape;
  void* data;
};

class Session {
 public:
  virtual ~Session() = default;

  virtual const std::vector<TypedName>& inputs() const = 0;
  virtual const std::vector<TypedName>& outputs() const = 0;

  // Feeds every input; may be called from several threads at once.
  virtual void run(const std::vector<Fed>& feeds, const std::string& output, const Place& into) const = 0;

  // The same for outputs whose shape is not known before.
  virtual std::vector<Array> run(const std::vector<Fed>& feeds, const std::vector<std::string>& outputs) const = 0;
};

struct SessionRequest {
  std::string model;        // path
  const SessionInfo* info;  // null: no options of its own
  bool codebook_ops;        // registers the native kernels
  EngineOptions options;
};

std::unique_ptr<Session> open_ort(const SessionRequest& request);

// Says why an engine of TensorRT's, built for `gpu` or any, cannot run on a device here, or nothing.
std::string why_no_tensorrt(const std::string& gpu, int device);
std::unique_ptr<Session> open_tensorrt(const std::string& plan, const EngineOptions& options);

}  // namespace export_engine::detail
