/* The C interface, for other languages: handles, and a status for every call that can fail.
 *
 * A function that returns ee_status* returns NULL when all went well, and else a status that ee_status_free releases;
 * what it was to make is then left as it was. Handles are released by their own close or free, which take NULL too, and
 * may be closed in any order. All may be used from several threads at once.
 */
#ifndef EXPORT_ENGINE_H
#define EXPORT_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(EXPORT_ENGINE_SHARED) && defined(__GNUC__)
#define EE_API __attribute__((visibility("default")))
#else
#define EE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ee_code {
  EE_OK = 0,
  EE_INVALID_ARGUMENT = 1, /* the call's own arguments: a shape, a name, a step */
  EE_NOT_FOUND = 2,        /* a file, an engine or a device that is not there */
  EE_DAMAGED = 3,          /* the bundle is not what its manifest says */
  EE_NEWER_VERSION = 4,    /* the bundle's format is newer than this library */
  EE_UNSUPPORTED = 5,      /* built without it, or the bundle does not have it */
  EE_RUNTIME = 6,          /* ONNX Runtime, TensorRT or the operating system refused */
  EE_MEMORY = 7,           /* out of memory */
  EE_INTERNAL = 8          /* a fault of this library */
} ee_code;

typedef enum ee_dtype { EE_FP32 = 0, EE_FP16 = 1, EE_INT64 = 2 } ee_dtype;

/* A view of the caller's memory, rows one after the other. */
typedef struct ee_tensor {
  ee_dtype dtype;
  size_t rank;
  const int64_t* shape;
  const void* data;
} ee_tensor;

/* A named tensor, to be fed. */
typedef struct ee_feed {
  const char* name;
  ee_tensor tensor;
} ee_feed;

/* All zero: the defaults. */
typedef struct ee_engine_options {
  const char* name;    /* of the engine in the bundle; NULL: the best that can run here */
  const char* backend; /* "ort" or "trt"; NULL: any */
  const char* device;  /* of ONNX Runtime: "cpu" (NULL), "cuda" or "tensorrt" */
  int device_id;
  int threads; /* 0: all cores */
} ee_engine_options;

typedef struct ee_status ee_status;
typedef struct ee_bundle ee_bundle;
typedef struct ee_engine ee_engine;
typedef struct ee_sampler ee_sampler;
typedef struct ee_pipeline ee_pipeline;
typedef struct ee_array ee_array;

EE_API ee_code ee_status_code(const ee_status* status); /* of NULL: EE_OK */
EE_API const char* ee_status_message(const ee_status* status);
EE_API const char* ee_status_fix(const ee_status* status);
EE_API void ee_status_free(ee_status* status);

/* An array's view lives as long as the array. */
EE_API ee_tensor ee_array_view(const ee_array* array);
EE_API void ee_array_free(ee_array* array);

/* Opens a folder or a zip and checks every byte of it. */
EE_API ee_status* ee_bundle_open(const char* path, ee_bundle** bundle);
EE_API const char* ee_bundle_manifest(const ee_bundle* bundle); /* JSON, as docs/bundle.md describes it */
EE_API ee_status* ee_bundle_golden(const ee_bundle* bundle, const char* name, ee_array** array);
EE_API void ee_bundle_close(ee_bundle* bundle);

EE_API ee_status* ee_engine_open(const ee_bundle* bundle, const ee_engine_options* options, ee_engine** engine);
EE_API const char* ee_engine_name(const ee_engine* engine);
/* Runs the denoiser once; the output is fp32. */
EE_API ee_status* ee_engine_run(const ee_engine* engine, const ee_feed* feeds, size_t count, ee_array** output);
/* The same into the caller's memory, of `elements` floats. */
EE_API ee_status* ee_engine_run_into(const ee_engine* engine, const ee_feed* feeds, size_t count, float* output,
                                     int64_t elements);
/* Runs the recorded feeds; `passed` becomes 1 or 0. */
EE_API ee_status* ee_engine_self_test(const ee_engine* engine, int* passed);
EE_API void ee_engine_close(ee_engine* engine);

EE_API ee_status* ee_sampler_open(const ee_engine* engine, ee_sampler** sampler);
/* Noise to finished latents, fp32; models without guidance take no unwanted feeds. */
EE_API ee_status* ee_sampler_sample(const ee_sampler* sampler, const ee_tensor* noise, const ee_feed* wanted,
                                    size_t wanted_count, const ee_feed* unwanted, size_t unwanted_count,
                                    ee_array** latents);
EE_API void ee_sampler_close(ee_sampler* sampler);

EE_API ee_status* ee_pipeline_open(const ee_bundle* bundle, const ee_engine_options* options, ee_pipeline** pipeline);
/* Token ids, by the encoder's inputs, and noise to pictures in [-1, 1], fp32; no unwanted ones: what the bundle says.
 */
EE_API ee_status* ee_pipeline_draw(const ee_pipeline* pipeline, const ee_feed* tokens, size_t tokens_count,
                                   const ee_feed* unwanted, size_t unwanted_count, const ee_tensor* noise,
                                   ee_array** pictures);
EE_API void ee_pipeline_close(ee_pipeline* pipeline);

#ifdef __cplusplus
}
#endif

#endif
