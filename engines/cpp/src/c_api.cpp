#include "export_engine.h"

#include <new>

#include "export_engine/export_engine.hpp"
#include "fault.hpp"

using namespace export_engine;
using export_engine::detail::Fault;
using export_engine::detail::taken;

struct ee_status {
  Status status;
};

struct ee_array {
  Array array;
};

struct ee_bundle {
  Bundle bundle;
};

struct ee_engine {
  Engine engine;
};

struct ee_sampler {
  Sampler sampler;
};

struct ee_pipeline {
  Pipeline pipeline;
};

namespace {

static_assert(static_cast<int>(Code::internal) == EE_INTERNAL && static_cast<int>(DType::int64) == EE_INT64);

// The status for when there is no memory for one.
ee_status full{Status(Code::memory, "out of memory", "free some")};

// Does a call's work, and returns its status as the C interface does.
template <class Work>
ee_status* done(Work&& work) noexcept {
  const Status status = detail::guarded(work);
  if (status.ok()) return nullptr;
  ee_status* made = new (std::nothrow) ee_status{status};
  return made ? made : &full;
}

template <class T>
T& given(T* handle, const char* what) {
  if (!handle) throw Fault(Code::invalid_argument, std::string(what) + " is NULL", "give one");
  return *handle;
}

Tensor tensor_of(const ee_tensor& tensor) {
  constexpr std::size_t MOST_AXES = 8;
  if (tensor.dtype != EE_FP32 && tensor.dtype != EE_FP16 && tensor.dtype != EE_INT64)
    throw Fault(Code::invalid_argument, "a tensor of type " + std::to_string(tensor.dtype), "see ee_dtype");
  if (tensor.rank > MOST_AXES || (tensor.rank && !tensor.shape))
    throw Fault(Code::invalid_argument, "a tensor of rank " + std::to_string(tensor.rank), "give its shape");
  return {static_cast<DType>(tensor.dtype), Shape(tensor.shape, tensor.shape + tensor.rank), tensor.data};
}

Feeds feeds_of(const ee_feed* feeds, std::size_t count) {
  Feeds named;
  for (std::size_t i = 0; i < count; ++i) {
    const ee_feed& feed = (&given(feeds, "the feeds"))[i];
    named[&given(feed.name, "a feed's name")] = tensor_of(feed.tensor);
  }
  return named;
}

EngineOptions options_of(const ee_engine_options* options) {
  EngineOptions named;
  if (!options) return named;
  if (options->name) named.name = options->name;
  if (options->backend) named.backend = options->backend;
  if (options->device) named.device = options->device;
  named.device_id = options->device_id;
  named.threads = options->threads;
  return named;
}

}  // namespace

ee_code ee_status_code(const ee_status* status) { return status ? static_cast<ee_code>(status->status.code()) : EE_OK; }

const char* ee_status_message(const ee_status* status) { return status ? status->status.message().c_str() : "ok"; }

const char* ee_status_fix(const ee_status* status) { return status ? status->status.fix().c_str() : ""; }

void ee_status_free(ee_status* status) {
  if (status != &full) delete status;
}

ee_tensor ee_array_view(const ee_array* array) {
  if (!array) return {EE_FP32, 0, nullptr, nullptr};
  const Shape& shape = array->array.shape();
  return {static_cast<ee_dtype>(array->array.dtype()), shape.size(), shape.data(), array->array.data()};
}

void ee_array_free(ee_array* array) { delete array; }

ee_status* ee_bundle_open(const char* path, ee_bundle** bundle) {
  return done([&] { given(bundle, "bundle") = new ee_bundle{taken(Bundle::open(&given(path, "path")))}; });
}

const char* ee_bundle_manifest(const ee_bundle* bundle) { return bundle ? bundle->bundle.manifest().c_str() : ""; }

ee_status* ee_bundle_golden(const ee_bundle* bundle, const char* name, ee_array** array) {
  return done([&] {
    Arrays arrays = taken(given(bundle, "bundle").bundle.golden());
    const auto found = arrays.find(&given(name, "name"));
    if (found == arrays.end())
      throw Fault(Code::not_found, std::string("golden.safetensors: has no '") + name + "'", "see docs/bundle.md");
    given(array, "array") = new ee_array{std::move(found->second)};
  });
}

void ee_bundle_close(ee_bundle* bundle) { delete bundle; }

ee_status* ee_engine_open(const ee_bundle* bundle, const ee_engine_options* options, ee_engine** engine) {
  return done([&] {
    given(engine, "engine") = new ee_engine{taken(Engine::open(given(bundle, "bundle").bundle, options_of(options)))};
  });
}

const char* ee_engine_name(const ee_engine* engine) { return engine ? engine->engine.info().name.c_str() : ""; }

ee_status* ee_engine_run(const ee_engine* engine, const ee_feed* feeds, size_t count, ee_array** output) {
  return done([&] {
    given(output, "output") = new ee_array{taken(given(engine, "engine").engine.run(feeds_of(feeds, count)))};
  });
}

ee_status* ee_engine_run_into(const ee_engine* engine, const ee_feed* feeds, size_t count, float* output,
                              int64_t elements) {
  return done([&] {
    const Status status = given(engine, "engine").engine.run(feeds_of(feeds, count), output, elements);
    if (!status.ok()) throw Fault(status.code(), status.message(), status.fix());
  });
}

ee_status* ee_engine_self_test(const ee_engine* engine, int* passed) {
  return done([&] { given(passed, "passed") = taken(given(engine, "engine").engine.self_test()).passed(); });
}

void ee_engine_close(ee_engine* engine) { delete engine; }

ee_status* ee_sampler_open(const ee_engine* engine, ee_sampler** sampler) {
  return done(
      [&] { given(sampler, "sampler") = new ee_sampler{taken(Sampler::open(given(engine, "engine").engine))}; });
}

ee_status* ee_sampler_sample(const ee_sampler* sampler, const ee_tensor* noise, const ee_feed* wanted,
                             size_t wanted_count, const ee_feed* unwanted, size_t unwanted_count, ee_array** latents) {
  return done([&] {
    given(latents, "latents") =
        new ee_array{taken(given(sampler, "sampler")
                               .sampler.sample(tensor_of(given(noise, "noise")), feeds_of(wanted, wanted_count),
                                               feeds_of(unwanted, unwanted_count)))};
  });
}

void ee_sampler_close(ee_sampler* sampler) { delete sampler; }

ee_status* ee_pipeline_open(const ee_bundle* bundle, const ee_engine_options* options, ee_pipeline** pipeline) {
  return done([&] {
    given(pipeline, "pipeline") =
        new ee_pipeline{taken(Pipeline::open(given(bundle, "bundle").bundle, options_of(options)))};
  });
}

ee_status* ee_pipeline_draw(const ee_pipeline* pipeline, const ee_feed* tokens, size_t tokens_count,
                            const ee_feed* unwanted, size_t unwanted_count, const ee_tensor* noise,
                            ee_array** pictures) {
  return done([&] {
    DrawOptions options;
    options.unwanted_tokens = feeds_of(unwanted, unwanted_count);
    given(pictures, "pictures") = new ee_array{
        taken(given(pipeline, "pipeline")
                  .pipeline.draw(feeds_of(tokens, tokens_count), tensor_of(given(noise, "noise")), options))};
  });
}

void ee_pipeline_close(ee_pipeline* pipeline) { delete pipeline; }
