// In place of tensorrt_session.cpp, in a library that was built without TensorRT.
#include "fault.hpp"
#include "session.hpp"

namespace export_engine::detail {

std::string why_no_tensorrt(const std::string&, int) {
  return "this library was built without -DEXPORT_ENGINE_TENSORRT=ON";
}

std::unique_ptr<Session> open_tensorrt(const std::string& plan, const EngineOptions&) {
  throw Fault(Code::unsupported, plan + ": " + why_no_tensorrt("", 0),
              "build it with that, or ask for the backend ort");
}

}  // namespace export_engine::detail
