// TensorRT's engines, through its C++ API, of version 10 or later. Compiled against its headers; not run on a GPU so
// far.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <mutex>

#include "fault.hpp"
#include "files.hpp"
#include "session.hpp"
#include "text.hpp"

namespace export_engine::detail {
namespace {

const char* const DRIVER = "check the driver and the GPU (nvidia-smi), or ask for the backend ort";

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw Fault(Code::runtime, std::string(what) + ": " + cudaGetErrorString(error), DRIVER);
}

// Keeps the last thing that TensorRT complained of, which its calls do not return.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      last_ = text;
    } catch (...) {  // without memory for it there is nothing to keep
    }
  }

  [[noreturn]] void fail(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    throw Fault(Code::runtime, what + (last_.empty() ? "" : ": " + last_),
                "build the engine with this GPU and TensorRT, and bundle it: export-engine bundle RUN --engine ENGINE "
                "--out DIR");
  }

 private:
  std::mutex mutex_;
  std::string last_;
};

Log& logger() {
  static Log log;
  return log;
}

struct FreeStream {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};

// Memory of the GPU that grows to the largest call.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { cudaFree(data_); }

  void* of(std::size_t bytes) {
    if (bytes > bytes_) {
      cudaFree(std::exchange(data_, nullptr));
      bytes_ = 0;
      check(cudaMalloc(&data_, bytes), "memory of the GPU");
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// What one call needs for itself; calls at once have a lane each.
struct Lane {
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  std::unique_ptr<CUstream_st, FreeStream> stream;
  std::map<std::string, Buffer> buffers;
};

DType dtype_of(nvinfer1::DataType type, const std::string& name) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return DType::fp32;
    case nvinfer1::DataType::kHALF:
      return DType::fp16;
    case nvinfer1::DataType::kINT64:
      return DType::int64;
    default:
      throw Fault(Code::unsupported, "the engine's '" + name + "' is of a type of TensorRT's that is not served",
                  "fp32, fp16 and int64 are: report this");
  }
}

nvinfer1::Dims dims_of(const Shape& shape, const std::string& name) {
  nvinfer1::Dims dims{};
  if (shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS))
    throw Fault(Code::invalid_argument, "'" + name + "' has " + std::to_string(shape.size()) + " axes", "feed fewer");
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
  return dims;
}

std::size_t bytes_of(const Shape& shape, DType dtype) {
  return static_cast<std::size_t>(count_of(shape)) * size_of(dtype);
}

// Copies to the host; `Array` or the caller's memory.
void fetch(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "an output");
}

class TensorrtBackend : public Session {
 public:
  TensorrtBackend(const std::string& plan, int device) : device_(device) {
    check(cudaSetDevice(device_), "the GPU");
    constexpr std::uint64_t MOST = std::uint64_t{1} << 40;
    const std::string bytes = File(plan).all(MOST);
    runtime_.reset(nvinfer1::createInferRuntime(logger()));
    if (!runtime_) logger().fail("TensorRT does not start");
    engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (!engine_) logger().fail("TensorRT cannot open " + plan);
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string name = engine_->getIOTensorName(i);
      const bool input = engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
      (input ? inputs_ : outputs_).push_back({name, dtype_of(engine_->getTensorDataType(name.c_str()), name)});
    }
  }

  const std::vector<TypedName>& inputs() const override { return inputs_; }
  const std::vector<TypedName>& outputs() const override { return outputs_; }

  void run(const std::vector<Fed>& feeds, const std::string& output, const Place& into) const override {
    call(feeds, [&](const std::string& name, const Shape& shape, const void* from, cudaStream_t stream) {
      if (name != output) return;
      if (shape != into.shape)
        throw Fault(Code::runtime, "TensorRT gives " + text_of(shape) + " for " + text_of(into.shape), DRIVER);
      fetch(into.data, from, bytes_of(shape, into.dtype), stream);
    });
  }

  std::vector<Array> run(const std::vector<Fed>& feeds, const std::vector<std::string>& outputs) const override {
    std::map<std::string, Array> found;
    call(feeds, [&](const std::string& name, const Shape& shape, const void* from, cudaStream_t stream) {
      Array& array = found.emplace(name, Array(dtype_named(name), shape)).first->second;
      fetch(array.data(), from, array.bytes(), stream);
    });
    std::vector<Array> arrays;
    for (const std::string& name : outputs) arrays.push_back(std::move(found.at(name)));
    return arrays;
  }

 private:
  DType dtype_named(const std::string& name) const {
    for (const TypedName& output : outputs_)
      if (output.name == name) return output.dtype;
    throw Fault(Code::damaged, "the engine has no output '" + name + "'", GET_AGAIN);
  }

  template <class Fetch>
  void call(const std::vector<Fed>& feeds, Fetch&& each_output) const {
    check(cudaSetDevice(device_), "the GPU");  // which is set for each thread
    std::unique_ptr<Lane> lane = taken_lane();
    cudaStream_t stream = lane->stream.get();
    for (const Fed& feed : feeds) {
      const std::size_t bytes = bytes_of(feed.tensor.shape, feed.tensor.dtype);
      void* to = lane->buffers[feed.name].of(bytes);
      check(cudaMemcpyAsync(to, feed.tensor.data, bytes, cudaMemcpyHostToDevice, stream), "an input");
      const bool set = lane->context->setInputShape(feed.name.c_str(), dims_of(feed.tensor.shape, feed.name)) &&
                       lane->context->setTensorAddress(feed.name.c_str(), to);
      if (!set) logger().fail("TensorRT refuses '" + feed.name + "' of shape " + text_of(feed.tensor.shape));
    }
    std::vector<Shape> shapes;
    for (const TypedName& output : outputs_) shapes.push_back(placed(*lane, output));
    if (!lane->context->enqueueV3(stream)) logger().fail("TensorRT could not run the engine");
    for (std::size_t i = 0; i < outputs_.size(); ++i)
      each_output(outputs_[i].name, shapes[i], lane->buffers[outputs_[i].name].of(0), stream);
    check(cudaStreamSynchronize(stream), "the call");
    const std::lock_guard<std::mutex> lock(mutex_);  // after a fault a lane is not used again
    lanes_.push_back(std::move(lane));
  }

  // Gives an output memory, and returns its shape for the inputs that were set.
  static Shape placed(Lane& lane, const TypedName& output) {
    const nvinfer1::Dims dims = lane.context->getTensorShape(output.name.c_str());
    const Shape shape(dims.d, dims.d + std::max(0, dims.nbDims));
    void* to = lane.buffers[output.name].of(bytes_of(shape, output.dtype));
    if (!lane.context->setTensorAddress(output.name.c_str(), to))
      logger().fail("TensorRT refuses '" + output.name + "'");
    return shape;
  }

  std::unique_ptr<Lane> taken_lane() const {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!lanes_.empty()) {
        std::unique_ptr<Lane> lane = std::move(lanes_.back());
        lanes_.pop_back();
        return lane;
      }
    }
    auto lane = std::make_unique<Lane>();
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    lane->stream.reset(stream);
    lane->context.reset(engine_->createExecutionContext());
    if (!lane->context) logger().fail("TensorRT has no room for another call");
    return lane;
  }

  int device_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<TypedName> inputs_, outputs_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Lane>> lanes_;  // of no call just now
};

}  // namespace

std::string why_no_tensorrt(const std::string& gpu, int device) {
  cudaDeviceProp properties{};
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return "no GPU " + std::to_string(device) + " here: " + cudaGetErrorString(error);
  const std::string here = "sm" + std::to_string(properties.major) + std::to_string(properties.minor);
  return gpu.empty() || gpu == here ? "" : "it was built for " + gpu + ", and this GPU is " + here;
}

std::unique_ptr<Session> open_tensorrt(const std::string& plan, const EngineOptions& options) {
  return std::make_unique<TensorrtBackend>(plan, options.device_id);
}

}  // namespace export_engine::detail
