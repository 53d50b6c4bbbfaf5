#include <cstring>

#include "ort_options.hpp"
#include "text.hpp"

namespace export_engine::detail {
namespace {

const char* const OPERATOR = "see the operator it names; a newer ONNX Runtime may have it";
const char* const CALL = "see what ONNX Runtime says; report it if the feeds are as the bundle describes them";
const char* const RUN =
    "an input's value may be out of the model's range, see `means` of each of the bundle's inputs; else report it";

ONNXTensorElementDataType type_of(DType dtype) {
  return dtype == DType::fp32   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
         : dtype == DType::fp16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

DType dtype_of(ONNXTensorElementDataType type, const std::string& name) {
  for (const DType dtype : {DType::fp32, DType::fp16, DType::int64})
    if (type_of(dtype) == type) return dtype;
  throw Fault(Code::unsupported, "the graph's '" + name + "' is of ONNX type " + std::to_string(type),
              "fp32, fp16 and int64 are served: report this");
}

// Returns a view of a tensor; ONNX Runtime reads inputs and writes outputs through the same type.
Owned<OrtValue> value_over(const OrtMemoryInfo* memory, const Tensor& tensor) {
  const std::size_t bytes = static_cast<std::size_t>(tensor.count()) * size_of(tensor.dtype);
  return make<OrtValue>(
      [&](OrtValue** out) {
        return ort().CreateTensorWithDataAsOrtValue(memory, const_cast<void*>(tensor.data), bytes, tensor.shape.data(),
                                                    tensor.shape.size(), type_of(tensor.dtype), out);
      },
      "a tensor of shape " + text_of(tensor.shape), CALL);
}

Array copied(OrtValue* value, DType dtype) {
  const auto info = make<OrtTensorTypeAndShapeInfo>(
      [&](OrtTensorTypeAndShapeInfo** out) { return ort().GetTensorTypeAndShape(value, out); }, "an output", CALL);
  std::size_t axes = 0;
  check(ort().GetDimensionsCount(info.get(), &axes), "an output", CALL);
  Shape shape(axes);
  check(ort().GetDimensions(info.get(), shape.data(), axes), "an output", CALL);
  Array array(dtype, std::move(shape));
  void* data = nullptr;
  check(ort().GetTensorMutableData(value, &data), "an output", CALL);
  std::memcpy(array.data(), data, array.bytes());
  return array;
}

class OrtBackend : public Session {
 public:
  explicit OrtBackend(const SessionRequest& request)
      : memory_(make<OrtMemoryInfo>(
            [](OrtMemoryInfo** out) { return ort().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, out); },
            "memory", CALL)),
        session_(open(request)) {
    OrtAllocator* allocator = nullptr;
    check(ort().GetAllocatorWithDefaultOptions(&allocator), "memory", CALL);
    name_all(ort().SessionGetInputCount, ort().SessionGetInputName, ort().SessionGetInputTypeInfo, allocator, inputs_);
    name_all(ort().SessionGetOutputCount, ort().SessionGetOutputName, ort().SessionGetOutputTypeInfo, allocator,
             outputs_);
  }

  const std::vector<TypedName>& inputs() const override { return inputs_; }
  const std::vector<TypedName>& outputs() const override { return outputs_; }

  void run(const std::vector<Fed>& feeds, const std::string& output, const Place& into) const override {
    std::vector<Owned<OrtValue>> values;
    values.push_back(value_over(memory_.get(), {into.dtype, into.shape, into.data}));
    call(feeds, {output}, values);
  }

  std::vector<Array> run(const std::vector<Fed>& feeds, const std::vector<std::string>& outputs) const override {
    std::vector<Owned<OrtValue>> values(outputs.size());
    call(feeds, outputs, values);
    std::vector<Array> arrays;
    for (std::size_t i = 0; i < outputs.size(); ++i) arrays.push_back(copied(values[i].get(), dtype_named(outputs[i])));
    return arrays;
  }

 private:
  static Owned<OrtSession> open(const SessionRequest& request) {
    const auto options = ort_options(request);
    return make<OrtSession>(
        [&](OrtSession** out) { return ort().CreateSession(ort_env(), request.model.c_str(), options.get(), out); },
        "ONNX Runtime " + ort_version() + " cannot open " + request.model, OPERATOR);
  }

  template <class Count, class Name, class Type>
  void name_all(Count count, Name name, Type type, OrtAllocator* allocator, std::vector<TypedName>& names) {
    std::size_t found = 0;
    check(count(session_.get(), &found), "the graph", CALL);
    for (std::size_t i = 0; i < found; ++i) {
      char* text = nullptr;
      check(name(session_.get(), i, allocator, &text), "the graph", CALL);
      const std::string copy = text;
      check(ort().AllocatorFree(allocator, text), "the graph", CALL);
      const auto info = make<OrtTypeInfo>([&](OrtTypeInfo** out) { return type(session_.get(), i, out); }, copy, CALL);
      const OrtTensorTypeAndShapeInfo* tensor = nullptr;
      ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
      check(ort().CastTypeInfoToTensorInfo(info.get(), &tensor), copy, CALL);
      if (tensor) check(ort().GetTensorElementType(tensor, &element), copy, CALL);
      names.push_back({copy, dtype_of(element, copy)});
    }
  }

  DType dtype_named(const std::string& output) const {
    for (const TypedName& named : outputs_)
      if (named.name == output) return named.dtype;
    throw Fault(Code::damaged, "the graph has no output '" + output + "'", GET_AGAIN);
  }

  // Values that are null are made by ONNX Runtime.
  void call(const std::vector<Fed>& feeds, const std::vector<std::string>& outputs,
            std::vector<Owned<OrtValue>>& values) const {
    std::vector<Owned<OrtValue>> fed;
    std::vector<const char*> from, to;
    std::vector<const OrtValue*> given;
    std::vector<OrtValue*> made;
    for (const Fed& feed : feeds) {
      fed.push_back(value_over(memory_.get(), feed.tensor));
      from.push_back(feed.name.c_str());
      given.push_back(fed.back().get());
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      to.push_back(outputs[i].c_str());
      made.push_back(values[i].get());
    }
    OrtStatus* status =
        ort().Run(session_.get(), nullptr, from.data(), given.data(), from.size(), to.data(), to.size(), made.data());
    for (std::size_t i = 0; i < outputs.size(); ++i)
      if (!values[i]) values[i].reset(made[i]);
    check(status, "ONNX Runtime", RUN);
  }

  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSession> session_;
  std::vector<TypedName> inputs_, outputs_;
};

}  // namespace

std::unique_ptr<Session> open_ort(const SessionRequest& request) { return std::make_unique<OrtBackend>(request); }

}  // namespace export_engine::detail
