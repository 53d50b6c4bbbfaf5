# Finds TensorRT's headers and library, in TENSORRT_ROOT or where the system has them, and CUDA's runtime, in
# CUDAToolkit_ROOT or where the system has it. Defines TensorRT::TensorRT.
find_path(TENSORRT_INCLUDE_DIR NvInfer.h HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES include)
find_library(TENSORRT_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
find_package(CUDAToolkit QUIET)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TENSORRT_LIBRARY TENSORRT_INCLUDE_DIR CUDAToolkit_FOUND
  REASON_FAILURE_MESSAGE "give TensorRT's folder, -DTENSORRT_ROOT=…, and CUDA's, -DCUDAToolkit_ROOT=…")

if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT UNKNOWN IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES
    IMPORTED_LOCATION ${TENSORRT_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${TENSORRT_INCLUDE_DIR}
    INTERFACE_LINK_LIBRARIES CUDA::cudart)
endif()
mark_as_advanced(TENSORRT_INCLUDE_DIR TENSORRT_LIBRARY)
