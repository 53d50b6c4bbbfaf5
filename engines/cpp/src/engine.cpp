#include "export_engine/engine.hpp"

#include "arrays.hpp"
#include "checks.hpp"
#include "convert.hpp"
#include "engine_impl.hpp"
#include "fault.hpp"
#include "half.hpp"
#include "model_file.hpp"
#include "text.hpp"

namespace export_engine {
namespace detail {
namespace {

constexpr std::uint64_t MOST_TABLE_BYTES = std::uint64_t{64} << 20;

// Returns why an engine cannot run as asked, or nothing.
std::string why_not(const EngineInfo& engine, const EngineOptions& options) {
  if (!options.backend.empty() && engine.backend != options.backend) return "another backend, " + engine.backend;
  if (engine.backend == "ort") return "";
  if (engine.backend == "trt") return why_no_tensorrt(engine.gpu, options.device_id);
  return "this library does not run " + engine.backend;
}

std::string said(const Info& info, const EngineOptions& options) {
  return joined(info.engines, [&](const auto& named) {
    const std::string why = why_not(named.second, options);
    return named.first + (why.empty() ? "" : " (" + why + ")");
  });
}

// Refuses names that nothing has: another machine would not run them either.
void check_names(const Info& info, const EngineOptions& options) {
  const std::string known = keys_of(info.engines);
  if (!options.name.empty() && !info.engines.count(options.name))
    throw Fault(Code::not_found, "engine '" + options.name + "': unknown; the bundle has " + known,
                "name one of those, or none for the best that can run here");
  if (!options.backend.empty() && options.backend != "ort" && options.backend != "trt")
    throw Fault(
        Code::not_found,
        "backend '" + options.backend + "': unknown to this library; the bundle has " +
            joined(info.engines, [](const auto& named) { return named.first + " (" + named.second.backend + ")"; }),
        "ask for ort or trt, which it runs, or for none");
}

// Returns the engine that was named, else ONNX Runtime's, else one of TensorRT's.
const EngineInfo& picked(const Info& info, const EngineOptions& options) {
  check_names(info, options);
  const EngineInfo* best = nullptr;
  for (const auto& [name, engine] : info.engines) {
    if (!options.name.empty() && options.name != name) continue;
    if (!why_not(engine, options).empty()) continue;
    if (!best || (best->backend != "ort" && engine.backend == "ort")) best = &engine;
  }
  if (best) return *best;
  throw Fault(Code::not_found,
              "no engine here" + (options.name.empty() ? "" : " named '" + options.name + "'") +
                  (options.backend.empty() ? "" : " of the backend '" + options.backend + "'") +
                  " can run; the bundle has " + (info.engines.empty() ? "none" : said(info, options)),
              "ask for another, or make a bundle with one for this machine: export-engine bundle RUN --engine ENGINE "
              "--out DIR");
}

std::unique_ptr<Session> open_session(const Bundle& bundle, const EngineInfo& engine, const EngineOptions& options) {
  const std::string file = engine.folder + "/" + engine.file;
  if (engine.backend == "trt") return open_tensorrt(bundle.impl().path(file), options);
  const SessionInfo* info = engine.session ? &*engine.session : nullptr;
  // The native kernels are the CPU's and compute in fp32; elsewhere the graph's own bodies run.
  const bool native = info && info->codebook_ops && options.device == "cpu" && engine.dtype == "fp32";
  return open_ort({checked_onnx(bundle.impl(), file), info, native, options});
}

std::optional<Steps> steps_of(const Bundle& bundle, const EngineInfo& engine) {
  if (engine.step_input == StepInput::none) return std::nullopt;
  if (!bundle.info().sampler) damaged("manifest.json: '" + engine.name + "' takes steps, and there is no sampler");
  std::optional<Array> table;
  if (engine.step_input == StepInput::row) {
    const File file(bundle.impl().path(engine.folder + "/step_table.npy"));
    table = parse_npy(file.all(MOST_TABLE_BYTES), file.path());
  }
  return Steps(engine.name, bundle.info().sampler->timesteps, std::move(table));
}

// What the graph takes must be what the bundle says that callers give.
void check_session(const Session& session, const Info& info, const EngineInfo& engine) {
  for (const TypedName& input : session.inputs()) {
    bool known = (engine.step_input == StepInput::index && input.name == STEP) ||
                 (engine.step_input == StepInput::row && input.name == STEP_ROW);
    for (const Port& port : info.inputs) known = known || port.name == input.name;
    if (!known) damaged(engine.name + ": its graph wants '" + input.name + "', which the manifest does not name");
  }
}

DType output_of(const Session& session, const Info& info, const EngineInfo& engine) {
  for (const TypedName& output : session.outputs())
    if (output.name == info.output.name && output.dtype != DType::int64) return output.dtype;
  damaged(engine.name + ": its graph has no floating-point output '" + info.output.name + "'");
}

std::shared_ptr<const Engine::Impl> open(const Bundle& bundle, const EngineOptions& options) {
  const EngineInfo& engine = picked(bundle.info(), options);
  auto session = open_session(bundle, engine, options);
  check_session(*session, bundle.info(), engine);
  const DType output = output_of(*session, bundle.info(), engine);
  return std::make_shared<Engine::Impl>(
      Engine::Impl{bundle, &engine, std::move(session), steps_of(bundle, engine), output});
}

}  // namespace
}  // namespace detail

Shape Engine::Impl::check(const Feeds& feeds) const {
  const detail::Sizes sizes = detail::check_feeds(bundle.info(), *info, feeds);
  if (steps) steps->check(feeds, sizes.at("batch"));
  return detail::resolved(bundle.info().output.shape, sizes);
}

void Engine::Impl::run(const Feeds& feeds, float* into, const Shape& shape) const {
  detail::Converted converted;
  Feeds given = feeds;
  std::optional<Array> rows;
  if (steps && (rows = steps->rows(feeds.at(detail::STEP)))) given[detail::STEP_ROW] = rows->view();
  const auto fed = detail::fed(*session, given, converted);
  const std::string& name = bundle.info().output.name;
  if (output == DType::fp32) return session->run(fed, name, {output, shape, into});
  Array own(output, shape);
  session->run(fed, name, {output, shape, own.data()});
  const Array floats = detail::widened(std::move(own));
  std::copy(floats.floats(), floats.floats() + floats.count(), into);
}

Result<Engine> Engine::open(const Bundle& bundle, const EngineOptions& options) noexcept {
  return detail::guarded([&] { return Engine(detail::open(bundle, options)); });
}

Result<Array> Engine::run(const Feeds& feeds) const noexcept {
  return detail::guarded([&] {
    Array output(DType::fp32, impl_->check(feeds));
    impl_->run(feeds, output.floats(), output.shape());
    return output;
  });
}

Status Engine::run(const Feeds& feeds, float* output, std::int64_t count) const noexcept {
  return detail::guarded([&] {
    const Shape shape = impl_->check(feeds);
    if (!output || count != count_of(shape))
      throw detail::Fault(Code::invalid_argument,
                          impl_->info->name + ": memory for " + std::to_string(output ? count : 0) +
                              " elements, and the output has " + std::to_string(count_of(shape)) + ": " +
                              detail::text_of(shape),
                          "give as many: output_shape() says how many");
    impl_->run(feeds, output, shape);
  });
}

Result<Shape> Engine::output_shape(const Feeds& feeds) const noexcept {
  return detail::guarded([&] { return impl_->check(feeds); });
}

const EngineInfo& Engine::info() const noexcept { return *impl_->info; }

const Bundle& Engine::bundle() const noexcept { return impl_->bundle; }

}  // namespace export_engine
