// ONNX Runtime's C API, its statuses as faults and its objects owned.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>

#include "fault.hpp"

namespace export_engine::detail {

// Returns the API of the headers this was built with; refuses a library that is older.
const OrtApi& ort();

// Returns the library's version, such as 1.31.1.
std::string ort_version();

// The process's environment; ONNX Runtime has one, and it is never released, since sessions may outlive any owner.
OrtEnv* ort_env();

void check(OrtStatus* status, const std::string& what, const char* fix);

inline void release(OrtSessionOptions* object) { ort().ReleaseSessionOptions(object); }
inline void release(OrtSession* object) { ort().ReleaseSession(object); }
inline void release(OrtValue* object) { ort().ReleaseValue(object); }
inline void release(OrtTypeInfo* object) { ort().ReleaseTypeInfo(object); }
inline void release(OrtTensorTypeAndShapeInfo* object) { ort().ReleaseTensorTypeAndShapeInfo(object); }
inline void release(OrtMemoryInfo* object) { ort().ReleaseMemoryInfo(object); }
inline void release(OrtCUDAProviderOptionsV2* object) { ort().ReleaseCUDAProviderOptions(object); }
inline void release(OrtTensorRTProviderOptionsV2* object) { ort().ReleaseTensorRTProviderOptions(object); }

struct Releaser {
  template <class T>
  void operator()(T* object) const {
    release(object);
  }
};

template <class T>
using Owned = std::unique_ptr<T, Releaser>;

// Calls a function of the API whose last argument is where the new object goes.
template <class T, class Make>
Owned<T> make(Make&& call, const std::string& what, const char* fix) {
  T* made = nullptr;
  check(call(&made), what, fix);
  return Owned<T>(made);
}

}  // namespace export_engine::detail
