# Finds ONNX Runtime's headers and library: in ONNXRUNTIME_ROOT, an unpacked official release, or where the system has
# them. ONNXRUNTIME_INCLUDE_DIR and ONNXRUNTIME_LIBRARY name them one by one. Defines OnnxRuntime::OnnxRuntime.
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
  HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT} PATH_SUFFIXES include include/onnxruntime onnxruntime)
find_library(ONNXRUNTIME_LIBRARY onnxruntime
  HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT} PATH_SUFFIXES lib lib64)

if(ONNXRUNTIME_INCLUDE_DIR)
  file(STRINGS ${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h line REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX REPLACE ".* " "1." OnnxRuntime_VERSION "${line}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime
  REQUIRED_VARS ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE_DIR VERSION_VAR OnnxRuntime_VERSION
  REASON_FAILURE_MESSAGE "unpack a release of ONNX Runtime and give its folder: -DONNXRUNTIME_ROOT=…")

if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::OnnxRuntime)
  add_library(OnnxRuntime::OnnxRuntime UNKNOWN IMPORTED)
  set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES
    IMPORTED_LOCATION ${ONNXRUNTIME_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${ONNXRUNTIME_INCLUDE_DIR})
endif()
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY)
