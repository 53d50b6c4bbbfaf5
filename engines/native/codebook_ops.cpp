// ONNX Runtime ops for weights that are looked up: CodebookDequantizeLinear and CodebookMatMul, fp32, on the CPU.
//
// What they compute stands in the bodies of standard nodes that a graph carries under the same names; a session that
// has this library registered runs these instead. Codes stay as they lie in the graph.

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr uint32_t API = 21;  // the oldest with all that is called here; newer headers have it too
static_assert(ORT_API_VERSION >= API, "ONNX Runtime's headers must be of version 1.21 or later");

constexpr int64_t PART = 32;               // codes of an output whose dots lie in L1: 32 · 256 floats
constexpr int64_t TILE_BYTES = 256 << 10;  // of decoded weights: a quarter to half of an L2, beside a panel of x
constexpr int64_t FEW_OUTPUTS = 512;       // that share one table of dots, which costs as much as 64 outputs do

// Codewords by the bits of a code, so that no code there can be reads beyond them; those of no code are 0.
struct Table {
  int64_t entries, size;
  const float* words;    // [entries, size]
  const float* columns;  // [size, entries]
};

// Codes [outputs, count] as they lie in the graph, of `bits` each: bytes, nibbles, or pairs of 6 bits in three nibbles.
struct Weight {
  const uint8_t* packed;
  int bits;
  int64_t outputs, count;
  const Table* table;

  int64_t depth() const { return count * table->size; }

  // Returns an output's codes [first, first + n), `first` even, a byte each: in `buffer` where they lie in less.
  const uint8_t* codes_of(int64_t output, int64_t first, int64_t n, uint8_t* buffer) const {
    const int64_t start = output * count + first;
    if (bits == 8) return packed + start;
    const bool odd = (bits == 4 ? start : start / 2 * 3) % 2;  // whether they begin in the middle of a byte
    const uint8_t* at = packed + (bits == 4 ? start : start / 2 * 3) / 2;
    return bits == 4 ? nibbles(at, odd, n, buffer) : sextets(at, odd, n, buffer);
  }

 private:
  static const uint8_t* nibbles(const uint8_t* at, bool odd, int64_t n, uint8_t* buffer) {
    if (odd && n) buffer[0] = *at++ >> 4;
    uint8_t* to = buffer + odd;
    const int64_t pairs = (n - odd) / 2;
    for (int64_t i = 0; i < pairs; ++i) {
      to[2 * i] = at[i] & 15;
      to[2 * i + 1] = at[i] >> 4;
    }
    if (odd + 2 * pairs < n) to[2 * pairs] = at[pairs] & 15;
    return buffer;
  }

  // Two codes of 6 bits in nibbles a, b, c that lie there less 8: a and the upper half of b, the lower half and c.
  static void pair(int a, int b, int c, uint8_t* to) {
    to[0] = static_cast<uint8_t>((a << 2 | b >> 2) ^ 34);
    to[1] = static_cast<uint8_t>(((b & 3) << 4 | c) ^ 8);
  }

  static const uint8_t* sextets(const uint8_t* at, bool odd, int64_t n, uint8_t* buffer) {
    uint8_t* to = buffer;
    if (odd && n) {
      pair(at[0] >> 4, at[1] & 15, at[1] >> 4, to);
      at += 2, to += 2, n -= 2;
    }
    const int64_t quads = n / 4;
    for (int64_t i = 0; i < quads; ++i) {
      const int first = at[3 * i], middle = at[3 * i + 1], last = at[3 * i + 2];
      pair(first & 15, first >> 4, middle & 15, to + 4 * i);
      pair(middle >> 4, last & 15, last >> 4, to + 4 * i + 2);
    }
    if (n % 4) pair(at[3 * quads] & 15, at[3 * quads] >> 4, at[3 * quads + 1] & 15, to + 4 * quads);
    return buffer;
  }
};

// One matmul: y [rows, outputs] = x [rows, depth] times the weight's transpose, times scale [outputs], [1] or none.
struct Call {
  const Weight* weight;
  const float* x;
  const float* panels;  // x as the many-rows path reads it
  const float* scale;
  int64_t scale_stride;
  float* y;
  int64_t rows;

  float scale_of(int64_t output) const { return scale ? scale[output * scale_stride] : 1.0f; }
};

struct Kernels {
  int lanes, group;
  void (*pack)(const float* x, int64_t rows, int64_t depth, int64_t padded, int64_t width, float* panel);
  void (*many_rows)(const Call& call, int64_t first, int64_t last, float* tile, uint8_t* codes);
  void (*few_rows)(const Call& call, int64_t first, int64_t last, float* dots, float* sums, uint8_t* codes);
};

namespace portable {
constexpr int LANES = 4, GROUP = 6;  // SSE2 has 16 registers
#include "kernels.inc"
}  // namespace portable

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int LANES = 8, GROUP = 6;  // 16 registers
#include "kernels.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,fma")
#endif
namespace avx512 {
constexpr int LANES = 16, GROUP = 14;  // 32 registers
#include "kernels.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

const Kernels& best_kernels() {
#if defined(__x86_64__)
  const char* named = std::getenv("EXPORT_ENGINE_SIMD");  // so that one machine can test all: avx2 or none
  if (!named && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return avx512::KERNELS;
  if ((!named || std::strcmp(named, "avx2") == 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::KERNELS;
#endif
  return portable::KERNELS;
}

const Kernels& kernels() {
  static const Kernels& best = best_kernels();
  return best;
}

using Shape = std::vector<int64_t>;

int64_t product(const Shape& shape) {
  int64_t found = 1;
  for (const int64_t n : shape) found *= n;
  return found;
}

std::string text(const Shape& shape) {
  std::string found;
  for (const int64_t n : shape) found += (found.empty() ? "[" : ", ") + std::to_string(n);
  return (found.empty() ? "[" : found) + "]";
}

// What an op knows of its weight: the table, and how codes lie. Made once where codes and codebook are constants.
class Codebook {
 public:
  Codebook(const std::string& name, const Ort::ConstValue& codes, const Ort::ConstValue& codebook) {
    const auto codes_info = codes.GetTensorTypeAndShapeInfo();
    const Shape stored = codes_info.GetShape(), shape = codebook.GetTensorTypeAndShapeInfo().GetShape();
    const bool vectors = shape.size() == 2;
    if (shape.empty() || shape.size() > 2 || (vectors && stored.size() != 2 && stored.size() != 3))
      refuse(name, "codes " + text(stored) + " and a codebook " + text(shape) + " do not go together");
    const bool six = vectors && stored.size() == 3;
    const bool bytes = codes_info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    bits = six ? 6 : bytes ? 8 : 4;
    if (six && (bytes || stored[2] != 3))
      refuse(name, "codes " + text(stored) + ": those of 6 bits are INT4, three nibbles to two codes");
    outputs = vectors ? stored[0] : 1;
    count = vectors ? (six ? stored[1] * 2 : stored[1]) : product(stored);
    decoded = vectors ? Shape{outputs, count * shape[1]} : stored;
    fill(name, codebook.GetTensorData<float>(), shape[0], vectors ? shape[1] : 1);
    if (shape[0] < table_.entries) check(name, codes, shape[0]);
  }

  Weight weight(const Ort::ConstValue& codes) const {
    return {static_cast<const uint8_t*>(codes.GetTensorRawData()), bits, outputs, count, &table_};
  }

  int bits;
  int64_t outputs, count;
  Shape decoded;

  [[noreturn]] static void refuse(const std::string& name, const std::string& what) {
    throw Ort::Exception(name + ": " + what, ORT_INVALID_ARGUMENT);
  }

 private:
  // The number in the codebook of a code as `Weight::codes_of` returns it: what lies in bytes and nibbles is signed.
  int64_t entry_of(int64_t code, int64_t entries) const {
    if (bits == 6) return code;
    const int64_t half = table_.entries / 2;
    return (code ^ half) - half + entries / 2;
  }

  void fill(const std::string& name, const float* codebook, int64_t entries, int64_t size) {
    table_ = {int64_t{1} << bits, size, nullptr, nullptr};
    if (entries < 1 || entries > table_.entries || size < 1)
      refuse(name, "a codebook of " + std::to_string(entries) + " words of " + std::to_string(size) +
                       " numbers for codes of " + std::to_string(bits) + " bits");
    words_.resize(table_.entries * size);
    columns_.resize(table_.entries * size);
    for (int64_t code = 0; code < table_.entries; ++code) {
      const int64_t entry = entry_of(code, entries);
      if (entry < 0 || entry >= entries) continue;
      for (int64_t i = 0; i < size; ++i)
        words_[code * size + i] = columns_[i * table_.entries + code] = codebook[entry * size + i];
    }
    table_.words = words_.data();
    table_.columns = columns_.data();
  }

  void check(const std::string& name, const Ort::ConstValue& codes, int64_t entries) const {
    const Weight found = weight(codes);
    std::vector<uint8_t> buffer(count + 1);
    for (int64_t o = 0; o < outputs; ++o) {
      const uint8_t* row = found.codes_of(o, 0, count, buffer.data());
      for (int64_t j = 0; j < count; ++j)
        if (const int64_t entry = entry_of(row[j], entries); entry < 0 || entry >= entries)
          refuse(name, "the code of sub-vector " + text({o, j}) + " names word " + std::to_string(entry) +
                           " of a codebook of " + std::to_string(entries));
    }
  }

  Table table_;
  std::vector<float> words_, columns_;
};

// Runs `body` for every task on the session's threads, which an exception must not leave: the first is thrown here.
template <typename F>
void parallel(const Ort::KernelContext& context, int64_t total, F body) {
  struct Tasks {
    F& body;
    std::mutex mutex;
    std::exception_ptr failed;
  } tasks{body, {}, nullptr};
  const auto run = [](void* raw, size_t i) {
    auto& own = *static_cast<Tasks*>(raw);
    try {
      own.body(static_cast<int64_t>(i));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(own.mutex);
      if (!own.failed) own.failed = std::current_exception();
    }
  };
  if (total > 0) context.ParallelFor(run, static_cast<size_t>(total), static_cast<size_t>(total), &tasks);
  if (tasks.failed) std::rethrow_exception(tasks.failed);
}

// A thread's own memory for decoded weights, which it keeps: at most a tile of the widest layer.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

uint8_t* code_buffer(int64_t codes) {
  thread_local std::vector<uint8_t> memory;
  if (static_cast<int64_t>(memory.size()) < codes) memory.resize(codes);
  return memory.data();
}

// Memory of the session's arena, which gives the same pages again at the next call.
class ArenaMemory {
 public:
  ArenaMemory(const OrtKernelContext* context, size_t bytes) {
    const auto info = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(context, info, &allocator_));
    memory_ = allocator_->Alloc(allocator_, bytes);
    if (!memory_ && bytes) {
      Ort::GetApi().ReleaseAllocator(allocator_);
      throw Ort::Exception("no " + std::to_string(bytes) + " bytes for the input of a codebook's matmul", ORT_FAIL);
    }
  }
  ~ArenaMemory() {
    allocator_->Free(allocator_, memory_);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  ArenaMemory(const ArenaMemory&) = delete;
  ArenaMemory& operator=(const ArenaMemory&) = delete;

  float* get() const { return static_cast<float*>(memory_); }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

class Kernel {
 public:
  Kernel(const OrtKernelInfo* raw, size_t codes, size_t codebook) : codes_(codes), codebook_(codebook) {
    const Ort::ConstKernelInfo info(raw);
    name_ = info.GetNodeName();
    int constant_codes = 0, constant_codebook = 0;
    const auto found_codes = info.GetTensorConstantInput(codes, &constant_codes);
    const auto found_codebook = info.GetTensorConstantInput(codebook, &constant_codebook);
    if (constant_codes && constant_codebook) held_ = std::make_unique<Codebook>(name_, found_codes, found_codebook);
  }

 protected:
  // Calls `run` with what is known of the weight, which is looked at anew where it is no constant.
  template <typename F>
  OrtStatusPtr with_weight(OrtKernelContext* raw, F run) const {
    try {
      const Ort::KernelContext context(raw);
      const auto codes = context.GetInput(codes_);
      if (held_) {
        run(context, *held_, held_->weight(codes));
      } else {
        const Codebook fresh(name_, codes, context.GetInput(codebook_));
        run(context, fresh, fresh.weight(codes));
      }
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    }
  }

  std::string name_;

 private:
  size_t codes_, codebook_;
  std::unique_ptr<Codebook> held_;
};

struct Dequantize : Kernel {
  explicit Dequantize(const OrtKernelInfo* info) : Kernel(info, 0, 1) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) const {
    return with_weight(raw, [](const Ort::KernelContext& context, const Codebook& codebook, const Weight& weight) {
      constexpr int64_t SHARE = 4096;  // codes to a task
      const int64_t total = weight.outputs * weight.count, size = weight.table->size;
      float* out = context.GetOutput(0, codebook.decoded).GetTensorMutableData<float>();
      parallel(context, (total + SHARE - 1) / SHARE, [&](int64_t task) {
        uint8_t buffer[SHARE + 1];
        const int64_t first = task * SHARE, n = std::min(SHARE, total - first);
        const uint8_t* codes = weight.codes_of(0, first, n, buffer);
        for (int64_t j = 0; j < n; ++j)
          std::memcpy(out + (first + j) * size, weight.table->words + codes[j] * size, sizeof(float) * size);
      });
    });
  }
};

struct MatMul : Kernel {
  explicit MatMul(const OrtKernelInfo* info) : Kernel(info, 1, 2) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) const {
    return with_weight(raw, [this, raw](const Ort::KernelContext& context, const Codebook&, const Weight& weight) {
      const auto x = context.GetInput(0);
      Shape shape = x.GetTensorTypeAndShapeInfo().GetShape();
      if (shape.empty() || shape.back() != weight.depth())
        Codebook::refuse(name_, "an input " + text(shape) + " for a weight of " + std::to_string(weight.outputs) +
                                    " outputs and " + std::to_string(weight.depth()) + " inputs");
      const auto scale = context.GetInputCount() > 3 ? context.GetInput(3) : Ort::ConstValue(nullptr);
      const int64_t scales = scale ? scale.GetTensorTypeAndShapeInfo().GetElementCount() : 1;
      if (scales != 1 && scales != weight.outputs)
        Codebook::refuse(name_, std::to_string(scales) + " scales for " + std::to_string(weight.outputs) + " outputs");
      shape.back() = weight.outputs;
      float* y = context.GetOutput(0, shape).GetTensorMutableData<float>();
      const Call call{&weight,
                      x.GetTensorData<float>(),
                      nullptr,
                      scale ? scale.GetTensorData<float>() : nullptr,
                      scales == 1 ? 0 : 1,
                      y,
                      weight.depth() ? product(shape) / std::max<int64_t>(weight.outputs, 1) : 0};
      // Measured with 256 × 4: one row 0.25 against 0.66 ms, two 0.46 against 0.65, three the same. Unpacking nibbles
      // for so little is slower than the tile.
      if (weight.bits == 8 && 2 * call.rows <= weight.table->size)
        few_rows(context, call);
      else
        many_rows(raw, context, call);
    });
  }

 private:
  static void few_rows(const Ort::KernelContext& context, const Call& call) {
    const Weight& weight = *call.weight;
    parallel(context, (weight.outputs + FEW_OUTPUTS - 1) / FEW_OUTPUTS, [&](int64_t task) {
      float* memory = scratch(PART * weight.table->entries + FEW_OUTPUTS);
      uint8_t buffer[PART];
      const int64_t first = task * FEW_OUTPUTS, last = std::min(first + FEW_OUTPUTS, weight.outputs);
      kernels().few_rows(call, first, last, memory, memory + PART * weight.table->entries, buffer);
    });
  }

  static void many_rows(OrtKernelContext* raw, const Ort::KernelContext& context, Call call) {
    const Weight& weight = *call.weight;
    const Kernels& kernel = kernels();
    const int64_t depth = weight.depth(), padded = (depth + 3) / 4 * 4, width = 2 * kernel.lanes;
    const int64_t panels = (call.rows + width - 1) / width;
    const ArenaMemory memory(raw, sizeof(float) * panels * width * padded);
    float* packed = memory.get();
    parallel(context, panels, [&](int64_t panel) {
      const int64_t row = panel * width, left = std::min(width, call.rows - row);
      kernel.pack(call.x + row * depth, left, depth, padded, left <= kernel.lanes ? kernel.lanes : width,
                  packed + row * padded);
    });
    call.panels = packed;
    const int64_t group_bytes = static_cast<int64_t>(sizeof(float)) * padded * kernel.group;
    const int64_t outputs = std::max<int64_t>(1, TILE_BYTES / group_bytes) * kernel.group;
    parallel(context, (weight.outputs + outputs - 1) / outputs, [&](int64_t task) {
      const int64_t first = task * outputs, last = std::min(first + outputs, weight.outputs);
      kernel.many_rows(call, first, last, scratch(outputs * padded), code_buffer(weight.count + 1));
    });
  }
};

template <typename K>
struct Op : Ort::CustomOpBase<Op<K>, K, true> {
  static constexpr bool MATMUL = std::is_same_v<K, MatMul>;

  explicit Op(ONNXTensorElementDataType codes) : codes_(codes) { this->version = API; }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = new K(info);
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    }
  }

  const char* GetName() const { return MATMUL ? "CodebookMatMul" : "CodebookDequantizeLinear"; }
  size_t GetInputTypeCount() const { return MATMUL ? 4 : 2; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == (MATMUL ? 1 : 0) ? codes_ : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i == 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return 1; }

  // Without it fusions of what follows, such as a bias and its activation, would not be found.
  static Ort::Status InferOutputShape(Ort::ShapeInferContext& context) {
    constexpr size_t CODES = MATMUL ? 1 : 0;
    auto codes = context.GetInputShape(CODES);
    const auto codebook = context.GetInputShape(CODES + 1);
    if (MATMUL) {
      auto shape = context.GetInputShape(0);
      if (shape.empty() || codes.empty()) return Ort::Status(nullptr);
      shape.back() = codes[0];
      return context.SetOutputShape(0, shape);
    }
    if (codebook.size() == 2 && (codes.size() == 2 || codes.size() == 3)) {
      if (!codes[1].IsInt() || !codebook[1].IsInt()) return Ort::Status(nullptr);
      codes = {codes[0], codes[1].AsInt() * codebook[1].AsInt() * (codes.size() == 3 ? 2 : 1)};
    }
    return codes.empty() ? Ort::Status(nullptr) : context.SetOutputShape(0, codes);
  }

  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

 private:
  ONNXTensorElementDataType codes_;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  Ort::InitApi(base->GetApi(API));
  try {
    static const Op<Dequantize> dequantize_bytes(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
    static const Op<Dequantize> dequantize_nibbles(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4);
    static const Op<MatMul> matmul_bytes(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
    static const Op<MatMul> matmul_nibbles(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4);
    static Ort::CustomOpDomain domain("export_engine");
    static const bool filled = [] {
      for (const OrtCustomOp* op : {static_cast<const OrtCustomOp*>(&dequantize_bytes),
                                    static_cast<const OrtCustomOp*>(&dequantize_nibbles),
                                    static_cast<const OrtCustomOp*>(&matmul_bytes),
                                    static_cast<const OrtCustomOp*>(&matmul_nibbles)})
        domain.Add(op);
      return true;
    }();
    static_cast<void>(filled);
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
  return nullptr;
}
