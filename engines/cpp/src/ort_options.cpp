#include "ort_options.hpp"

#include <onnxruntime_session_options_config_keys.h>

#include <algorithm>
#include <fstream>

#include "text.hpp"

// Of engines/native/codebook_ops.cpp, which is compiled into this library.
extern "C" OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

namespace export_engine::detail {
namespace {

const char* const REPORT = "report this with ONNX Runtime's version";
const char* const CUDA = "install an ONNX Runtime built for CUDA and the CUDA libraries it needs, or ask for the cpu";

// Whether this CPU's fastest INT8 kernels add pairs of products in saturating 16 bits, which is wrong: x86 ones do
// unless they have VNNI; where nobody can tell, they are taken to. (engines/backends/ort.py asks the same way.)
bool sums_saturate() {
#if defined(__x86_64__)
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line;
  while (std::getline(cpuinfo, line))
    if (line.compare(0, 5, "flags") == 0)
      return (line + " ").find(" avx512_vnni ") == std::string::npos &&
             (line + " ").find(" avx_vnni ") == std::string::npos;
  return true;
#else
  return false;
#endif
}

void set(OrtSessionOptions* options, const char* key, const std::string& value) {
  check(ort().AddSessionConfigEntry(options, key, value.c_str()), std::string("ONNX Runtime refuses ") + key, REPORT);
}

void set_all(OrtSessionOptions* options, const std::map<std::string, std::string>& config) {
  for (const auto& [key, value] : config) set(options, key.c_str(), value);
}

void set_graph_options(OrtSessionOptions* options, const SessionInfo& info, bool shared) {
  set_all(options, info.config);
  if (shared) set_all(options, info.config_if_shared);
  if (sums_saturate()) set_all(options, info.config_if_sums_saturate);
  const auto itself = [](const std::string& name) { return name; };
  if (!info.disabled_optimizers.empty())
    set(options, kOrtSessionOptionsDisableSpecifiedOptimizers, joined(info.disabled_optimizers, itself, ";"));
}

void check_provider(const char* wanted) {
  char** names = nullptr;
  int count = 0;
  check(ort().GetAvailableProviders(&names, &count), "ONNX Runtime does not say what it runs on", REPORT);
  const std::vector<std::string> found(names, names + count);
  check(ort().ReleaseAvailableProviders(names, count), "ONNX Runtime", REPORT);
  if (std::find(found.begin(), found.end(), wanted) == found.end())
    throw Fault(Code::not_found,
                "this ONNX Runtime has no " + std::string(wanted) + ", only " +
                    joined(found, [](const std::string& name) { return name; }),
                CUDA);
}

void add_cuda(OrtSessionOptions* options, const std::string& device) {
  check_provider("CUDAExecutionProvider");
  const auto cuda = make<OrtCUDAProviderOptionsV2>(ort().CreateCUDAProviderOptions, "CUDA", CUDA);
  const char* const keys[] = {"device_id", "use_tf32"};
  const char* const values[] = {device.c_str(), "0"};  // fp32 is fp32: TF32 has 10 bits of mantissa
  check(ort().UpdateCUDAProviderOptions(cuda.get(), keys, values, 2), "CUDA device " + device, CUDA);
  check(ort().SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()), "CUDA device " + device, CUDA);
}

void add_tensorrt(OrtSessionOptions* options, const std::string& device) {
  check_provider("TensorrtExecutionProvider");
  const auto tensorrt = make<OrtTensorRTProviderOptionsV2>(ort().CreateTensorRTProviderOptions, "TensorRT", CUDA);
  const char *key = "device_id", *value = device.c_str();
  check(ort().UpdateTensorRTProviderOptions(tensorrt.get(), &key, &value, 1), "TensorRT on device " + device, CUDA);
  check(ort().SessionOptionsAppendExecutionProvider_TensorRT_V2(options, tensorrt.get()), "TensorRT", CUDA);
}

void add_device(OrtSessionOptions* options, const EngineOptions& asked) {
  const std::string device = std::to_string(asked.device_id);
  if (asked.device == "cpu") return;
  if (asked.device != "cuda" && asked.device != "tensorrt")
    throw Fault(Code::invalid_argument, "ONNX Runtime has no device '" + asked.device + "' here",
                "ask for cpu, cuda or tensorrt");
  if (asked.device == "tensorrt") add_tensorrt(options, device);
  add_cuda(options, device);  // which also takes what TensorRT leaves
}

}  // namespace

Owned<OrtSessionOptions> ort_options(const SessionRequest& request) {
  const int threads = request.options.threads;
  if (threads < 0) throw Fault(Code::invalid_argument, "threads: " + std::to_string(threads), "ask for 0 or more");
  ort_env();  // before all else: options log to it
  auto made = make<OrtSessionOptions>(ort().CreateSessionOptions, "ONNX Runtime", REPORT);
  OrtSessionOptions* options = made.get();
  check(ort().SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_ERROR), "ONNX Runtime", REPORT);
  check(ort().SetIntraOpNumThreads(options, threads), "ONNX Runtime", REPORT);
  // With all cores: threads that spin while they wait keep those of the application from running.
  if (threads == 0) set(options, kOrtSessionOptionsConfigAllowIntraOpSpinning, "0");
  if (request.info) set_graph_options(options, *request.info, threads == 0);
  if (request.codebook_ops) check(RegisterCustomOps(options, OrtGetApiBase()), "the codebook ops", REPORT);
  add_device(options, request.options);
  return made;
}

}  // namespace export_engine::detail
