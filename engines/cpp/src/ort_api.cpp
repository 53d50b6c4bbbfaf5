#include "ort_api.hpp"

namespace export_engine::detail {
namespace {

const char* const UPDATE = "link the ONNX Runtime release whose headers were used, or a newer one";

}  // namespace

const OrtApi& ort() {
  static const OrtApi* const api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!api)
    throw Fault(Code::newer_version,
                "ONNX Runtime's library is version " + ort_version() + "; this was built with headers of version 1." +
                    std::to_string(ORT_API_VERSION),
                UPDATE);
  return *api;
}

std::string ort_version() { return OrtGetApiBase()->GetVersionString(); }

OrtEnv* ort_env() {
  static OrtEnv* const env = [] {
    OrtEnv* made = nullptr;
    check(ort().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "export_engine", &made), "ONNX Runtime does not start", UPDATE);
    return made;
  }();
  return env;
}

void check(OrtStatus* status, const std::string& what, const char* fix) {
  if (!status) return;
  const std::unique_ptr<OrtStatus, decltype(ort().ReleaseStatus)> owned(status, ort().ReleaseStatus);
  throw Fault(Code::runtime, what + ": " + ort().GetErrorMessage(status), fix);
}

}  // namespace export_engine::detail
