#include "export_engine/pipeline.hpp"

#include <algorithm>
#include <cstring>

#include "convert.hpp"
#include "engine_impl.hpp"
#include "fault.hpp"
#include "golden.hpp"
#include "model_file.hpp"
#include "rows.hpp"
#include "text.hpp"

namespace export_engine {

struct Pipeline::Impl {
  Sampler sampler;
  const PipelineInfo* info;
  std::unique_ptr<detail::Session> text, vae;  // the second is null where samples are pictures

  Array draw(const Feeds& tokens, const Tensor& noise, const DrawOptions& options) const;
  void check(const Feeds& tokens, std::int64_t count) const;
  Arrays encode(const Feeds& tokens) const;
  Arrays unwanted(const Feeds& tokens, const Arrays& wanted, std::int64_t count) const;
  Arrays empty_caption() const;
  void decode(Array& latents) const;
  GoldenRow text_row(const Arrays& recorded, const std::string& half) const;
  GoldenRow vae_row(const Arrays& recorded) const;
};

namespace detail {
namespace {

std::unique_ptr<Session> open_part(const Engine& engine, const std::map<std::string, std::string>& files,
                                   const EngineOptions& options) {
  auto file = files.find(engine.info().dtype);
  if (file == files.end()) file = files.find("fp32");
  if (file == files.end())
    damaged("manifest.json: info.pipeline has no graph in " + engine.info().dtype + ", only " + keys_of(files));
  return open_ort({checked_onnx(engine.bundle().impl(), file->second), nullptr, false, options});
}

std::shared_ptr<const Pipeline::Impl> opened(const Bundle& bundle, const EngineOptions& options) {
  const auto& info = bundle.info().pipeline;
  if (!info)
    throw Fault(Code::unsupported, "the bundle holds a denoiser alone, no text encoder or decoder",
                "sample with Sampler, or make a bundle of a whole pipeline's folder");
  Engine engine = taken(Engine::open(bundle, options));
  auto text = open_part(engine, info->text.encoders, options);
  auto vae = info->vae ? open_part(engine, info->vae->decoders, options) : nullptr;
  return std::make_shared<Pipeline::Impl>(
      Pipeline::Impl{taken(Sampler::open(engine)), &*info, std::move(text), std::move(vae)});
}

// Runs as many rows at once as `most`: memory is bounded.
std::vector<Array> run_in_parts(const Session& session, const Feeds& feeds, std::int64_t count, std::int64_t most,
                                const std::vector<std::string>& outputs) {
  std::vector<std::vector<Array>> parts(outputs.size());
  for (std::int64_t first = 0; first < count; first += most) {
    Converted converted;
    auto found = session.run(fed(session, rows_of(feeds, first, std::min(count, first + most)), converted), outputs);
    for (std::size_t i = 0; i < outputs.size(); ++i) parts[i].push_back(widened(std::move(found[i])));
  }
  std::vector<Array> arrays;
  for (const auto& part : parts) arrays.push_back(concatenated(part));
  return arrays;
}

const Array& recorded_in(const Arrays& recorded, const std::string& name) {
  const auto found = recorded.find(name);
  if (found == recorded.end()) damaged("golden.safetensors: lacks '" + name + "'");
  return found->second;
}

double decibels(const Arrays& recorded, const std::string& name, const Array& found) {
  const Array& expected = recorded_in(recorded, name);
  if (expected.dtype() != found.dtype() || expected.shape() != found.shape() || found.dtype() == DType::fp16)
    damaged("golden.safetensors: '" + name + "' is not what its graph gives");
  Ratio ratio;
  if (found.dtype() == DType::fp32)
    ratio.add(expected.floats(), found.floats(), found.count());
  else
    ratio.add(expected.integers(), found.integers(), found.count());
  return ratio.db();
}

// Graphs that would overflow in the engine's float type are there in fp32.
GoldenRow row_of(const std::string& what, double value_db, const std::map<std::string, double>& limits,
                 const std::string& dtype) {
  auto limit = limits.find(dtype);
  if (limit == limits.end()) limit = limits.find("fp32");
  if (limit == limits.end()) damaged("manifest.json: info.pipeline has no limits_db for the " + what);
  return {what, value_db, limit->second, value_db >= limit->second};
}

}  // namespace
}  // namespace detail

// Refuses token ids that are not `count` rows, or one where `count` is 0, of each input.
void Pipeline::Impl::check(const Feeds& tokens, std::int64_t count) const {
  if (count < 1)
    throw detail::Fault(Code::invalid_argument, "tokens: there are rows for " + std::to_string(count) + " pictures",
                        "feed 1 row or more, of noise and of tokens");
  for (const TokensInfo& input : info->text.inputs) {
    const auto found = tokens.find(input.input);
    const Shape wanted{count, input.tokens};
    const std::string shape = detail::text_of(wanted);
    if (found == tokens.end())
      throw detail::Fault(Code::invalid_argument, "tokens: no '" + input.input + "'", "feed int64 " + shape);
    const Tensor& ids = found->second;
    if (ids.dtype != DType::int64 || ids.shape != wanted || !ids.data)
      throw detail::Fault(Code::invalid_argument,
                          "tokens: '" + input.input + "' is " + detail::name_of(ids.dtype) + " " +
                              detail::text_of(ids.shape) + ", where int64 " + shape + " is wanted",
                          "pad or cut each caption's ids to that many, a row for each row of noise");
  }
}

// Returns what the denoiser reads for token ids, constants included.
Arrays Pipeline::Impl::encode(const Feeds& tokens) const {
  constexpr std::int64_t CAPTIONS = 8;  // that are encoded at once
  const std::int64_t count = tokens.at(info->text.inputs[0].input).shape[0];
  std::vector<std::string> names;
  for (const auto& [output, input] : info->text.outputs) names.push_back(output);
  auto found = detail::run_in_parts(*text, tokens, count, CAPTIONS, names);
  Arrays arrays;
  for (std::size_t i = 0; i < names.size(); ++i) arrays.emplace(info->text.outputs.at(names[i]), std::move(found[i]));
  for (const auto& [name, row] : info->constants) {
    const Tensor one = Tensor::of(row.data(), {1, static_cast<std::int64_t>(row.size())});
    arrays[name] = detail::repeated(one, count);
  }
  return arrays;
}

Arrays Pipeline::Impl::empty_caption() const {
  Arrays captions;
  for (const TokensInfo& known : info->text.inputs) {
    std::vector<std::int64_t> ids;
    if (known.bos) ids.push_back(*known.bos);
    if (known.eos) ids.push_back(*known.eos);
    ids.resize(static_cast<std::size_t>(known.tokens), known.pad.value_or(known.eos.value_or(0)));
    Array caption(DType::int64, {1, known.tokens});
    std::memcpy(caption.data(), ids.data(), caption.bytes());
    captions.emplace(known.input, std::move(caption));
  }
  return captions;
}

Arrays Pipeline::Impl::unwanted(const Feeds& tokens, const Arrays& wanted, std::int64_t count) const {
  Arrays arrays;
  if (tokens.empty() && info->text.unwanted_is_zeros) {
    for (const auto& [name, array] : wanted) {
      arrays.emplace(name, detail::repeated(detail::rows_of(array.view(), 0, 1), count));
      if (!info->constants.count(name)) std::memset(arrays[name].data(), 0, arrays[name].bytes());
    }
    return arrays;
  }
  const Arrays empty = tokens.empty() ? empty_caption() : Arrays();
  const Feeds given = tokens.empty() ? views(empty) : tokens;
  const auto first = given.find(info->text.inputs[0].input);
  const bool one = first != given.end() && !first->second.shape.empty() && first->second.shape[0] == 1;
  check(given, one ? 1 : count);
  for (auto& [name, array] : encode(given))
    arrays.emplace(name, one ? detail::repeated(array.view(), count) : std::move(array));
  return arrays;
}

// Turns latents into pictures in [−1, 1]; one at a time, since decoders take far more memory than all else.
void Pipeline::Impl::decode(Array& latents) const {
  if (vae) {
    for (std::int64_t i = 0; i < latents.count(); ++i)
      latents.floats()[i] = latents.floats()[i] / info->vae->scaling_factor + info->vae->shift_factor;
    const Feeds feeds{{info->vae->input, latents.view()}};
    latents = std::move(detail::run_in_parts(*vae, feeds, latents.shape()[0], 1, {info->vae->output})[0]);
  }
  if (latents.dtype() != DType::fp32) detail::damaged("the decoder gives no floating-point pictures");
  for (std::int64_t i = 0; i < latents.count(); ++i) latents.floats()[i] = std::clamp(latents.floats()[i], -1.0f, 1.0f);
}

Array Pipeline::Impl::draw(const Feeds& tokens, const Tensor& noise, const DrawOptions& options) const {
  const std::int64_t count = noise.shape.empty() ? 0 : noise.shape[0];
  check(tokens, count);
  const Arrays wanted = encode(tokens);
  Arrays not_wanted;
  if (sampler.engine().bundle().info().sampler->guided) not_wanted = unwanted(options.unwanted_tokens, wanted, count);
  Array pictures = detail::taken(sampler.sample(noise, views(wanted), views(not_wanted), options));
  decode(pictures);
  return pictures;
}

GoldenRow Pipeline::Impl::text_row(const Arrays& recorded, const std::string& half) const {
  Feeds tokens;
  for (const TokensInfo& input : info->text.inputs) {
    const std::string name = (half == "wanted" ? "picture/" : "picture/unwanted_") + input.input;
    tokens.emplace(input.input, detail::recorded_in(recorded, name).view());
  }
  const Shape& first = tokens.begin()->second.shape;
  const std::int64_t count = first.empty() ? 0 : first[0];
  check(tokens, count);
  Arrays found = encode(tokens);
  if (half == "unwanted" && info->text.unwanted_is_zeros) found = unwanted({}, found, count);
  double worst = INFINITY;
  for (const auto& [name, array] : found) {
    const double db = detail::decibels(recorded, "picture/" + half + "/" + name, array);
    if (!(db >= worst) && !std::isnan(worst)) worst = db;  // what is not a number is the worst
  }
  return detail::row_of("text encoder, " + half, worst, info->text.limits_db, sampler.engine().info().dtype);
}

GoldenRow Pipeline::Impl::vae_row(const Arrays& recorded) const {
  const Array& latent = detail::recorded_in(recorded, "picture/latent");
  if (latent.dtype() != DType::fp32 || latent.shape().empty() || latent.count() == 0)
    detail::damaged("golden.safetensors: 'picture/latent' is no latents in fp32");
  Array pictures(DType::fp32, latent.shape());
  std::memcpy(pictures.data(), latent.data(), latent.bytes());
  decode(pictures);
  const double db = detail::decibels(recorded, "picture/picture", pictures);
  return detail::row_of("VAE decoder", db, info->vae->limits_db, sampler.engine().info().dtype);
}

Result<Pipeline> Pipeline::open(const Bundle& bundle, const EngineOptions& options) noexcept {
  return detail::guarded([&] { return Pipeline(detail::opened(bundle, options)); });
}

Result<Array> Pipeline::draw(const Feeds& tokens, const Tensor& noise, const DrawOptions& options) const noexcept {
  return detail::guarded([&] { return impl_->draw(tokens, noise, options); });
}

Result<SelfTest> Pipeline::self_test() const noexcept {
  return detail::guarded([&] {
    const Bundle& bundle = impl_->sampler.engine().bundle();
    const Arrays recorded = detail::taken(bundle.golden());
    SelfTest test{{impl_->text_row(recorded, "wanted")}};
    if (bundle.info().sampler->guided) test.rows.push_back(impl_->text_row(recorded, "unwanted"));
    if (impl_->vae) test.rows.push_back(impl_->vae_row(recorded));
    return test;
  });
}

const Engine& Pipeline::engine() const noexcept { return impl_->sampler.engine(); }

}  // namespace export_engine
