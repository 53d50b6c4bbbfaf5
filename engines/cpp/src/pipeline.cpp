#include "export_engine/pipeline.hpp"

#include <cstring>

#include "convert.hpp"
#include "engine_impl.hpp"
#include "fault.hpp"
#include "model_file.hpp"
#include "rows.hpp"
#include "text.hpp"

namespace export_engine {

struct Pipeline::Impl {
  Sampler sampler;
  const PipelineInfo* info;
  std::unique_ptr<detail::Session> text, vae;  // null where the pipeline has none

  Array draw(const Tensor& tokens, const Tensor& noise, const DrawOptions& options) const;
  Arrays encode(const Tensor& tokens) const;
  Array empty_caption() const;
  Arrays unwanted(const DrawOptions& options, std::int64_t count) const;
  Array decode(Array latents) const;
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
  auto text = info->text ? open_part(engine, info->text->encoders, options) : nullptr;
  auto vae = info->vae ? open_part(engine, info->vae->decoders, options) : nullptr;
  return std::make_shared<Pipeline::Impl>(
      Pipeline::Impl{taken(Sampler::open(engine)), &*info, std::move(text), std::move(vae)});
}

Array run_one(const Session& session, const std::string& input, const Tensor& tensor, const std::string& output) {
  Converted converted;
  return widened(std::move(session.run(fed(session, {{input, tensor}}, converted), {output})[0]));
}

// Adds the text encoder's arrays to the feeds that the caller gave.
Feeds with(Feeds feeds, const Arrays& arrays) {
  for (const auto& [name, array] : arrays) feeds[name] = array.view();
  return feeds;
}

}  // namespace
}  // namespace detail

Arrays Pipeline::Impl::encode(const Tensor& tokens) const {
  Arrays arrays;
  if (!text) return arrays;
  const Shape wanted{tokens.shape.empty() ? 0 : tokens.shape[0], info->text->tokens};
  if (tokens.dtype != DType::int64 || tokens.shape != wanted || !tokens.data || wanted[0] < 1)
    throw detail::Fault(Code::invalid_argument,
                        "tokens of " + std::string(detail::name_of(tokens.dtype)) + " " +
                            detail::text_of(tokens.shape) + ", where int64 [count, " +
                            std::to_string(info->text->tokens) + "] is wanted",
                        "pad or cut each caption's ids to that many");
  std::vector<std::string> names;
  for (const auto& [output, input] : info->text->outputs) names.push_back(output);
  detail::Converted converted;
  auto found = text->run(detail::fed(*text, {{info->text->input, tokens}}, converted), names);
  for (std::size_t i = 0; i < names.size(); ++i)
    arrays.emplace(info->text->outputs.at(names[i]), detail::widened(std::move(found[i])));
  return arrays;
}

Array Pipeline::Impl::empty_caption() const {
  const TextInfo& known = *info->text;
  std::vector<std::int64_t> ids;
  if (known.bos) ids.push_back(*known.bos);
  if (known.eos) ids.push_back(*known.eos);
  ids.resize(static_cast<std::size_t>(known.tokens), known.pad.value_or(known.eos.value_or(0)));
  Array caption(DType::int64, {1, known.tokens});
  std::memcpy(caption.data(), ids.data(), caption.bytes());
  return caption;
}

Arrays Pipeline::Impl::unwanted(const DrawOptions& options, std::int64_t count) const {
  if (!text || options.unwanted_tokens.data) return encode(options.unwanted_tokens);
  Arrays arrays;
  for (const auto& [name, row] : encode(empty_caption().view())) arrays.emplace(name, detail::repeated(row, count));
  return arrays;
}

// Decodes one picture at a time: decoders take far more memory than all else.
Array Pipeline::Impl::decode(Array latents) const {
  if (!vae) return latents;
  for (std::int64_t i = 0; i < latents.count(); ++i)
    latents.floats()[i] = latents.floats()[i] / info->vae->scaling_factor + info->vae->shift_factor;
  Array pictures;
  const std::int64_t count = latents.shape()[0];
  for (std::int64_t i = 0; i < count; ++i) {
    const Array one =
        detail::run_one(*vae, info->vae->input, detail::rows_of(latents.view(), i, i + 1), info->vae->output);
    Shape shape = one.shape();
    if (one.dtype() != DType::fp32 || shape.empty() || shape[0] != 1)
      detail::damaged("the decoder gives " + detail::text_of(shape) + " for one latent");
    shape[0] = count;
    if (i == 0) pictures = Array(DType::fp32, shape);
    if (pictures.shape() != shape) detail::damaged("the decoder gives pictures of several sizes");
    std::memcpy(static_cast<std::byte*>(pictures.data()) + static_cast<std::size_t>(i) * one.bytes(), one.data(),
                one.bytes());
  }
  return pictures;
}

Array Pipeline::Impl::draw(const Tensor& tokens, const Tensor& noise, const DrawOptions& options) const {
  const Arrays wanted = encode(tokens);
  Arrays not_wanted;
  if (sampler.engine().bundle().info().sampler->guided)
    not_wanted = unwanted(options, noise.shape.empty() ? 0 : noise.shape[0]);
  return decode(detail::taken(sampler.sample(noise, detail::with(options.wanted, wanted),
                                             detail::with(options.unwanted, not_wanted), options)));
}

Result<Pipeline> Pipeline::open(const Bundle& bundle, const EngineOptions& options) noexcept {
  return detail::guarded([&] { return Pipeline(detail::opened(bundle, options)); });
}

Result<Array> Pipeline::draw(const Tensor& tokens, const Tensor& noise, const DrawOptions& options) const noexcept {
  return detail::guarded([&] { return impl_->draw(tokens, noise, options); });
}

const Engine& Pipeline::engine() const noexcept { return impl_->sampler.engine(); }

}  // namespace export_engine
