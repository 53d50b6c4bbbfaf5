#include "export_engine/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fault.hpp"
#include "rows.hpp"
#include "steps.hpp"
#include "text.hpp"

namespace export_engine {

struct Sampler::Impl {
  Engine engine;
  const SamplerInfo* info;

  std::int64_t most_at_once() const;
  Array sample(const Tensor& noise, const Feeds& wanted, const Feeds& unwanted, const SampleOptions& options) const;
};

namespace detail {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& fix) {
  throw Fault(Code::invalid_argument, what, fix);
}

bool is_given(const Info& info, const std::string& name) {
  return name != info.sampler->latent && name != "timestep" && name != STEP && name != STEP_ROW;
}

// Refuses names that are no input: a misspelt one also leaves its input without rows, which would say less.
void check_names(const Info& info, const Feeds& feeds, const std::string& which) {
  std::vector<std::string> given;
  for (const Port& port : info.inputs)
    if (is_given(info, port.name)) given.push_back(port.name);
  for (const auto& [name, tensor] : feeds)
    if (is_given(info, name) && std::find(given.begin(), given.end(), name) == given.end())
      refuse("sampling: the " + which + " feeds hold '" + name + "', which is no input",
             given.empty() ? "feed nothing" : "feed " + joined(given, [](const std::string& n) { return n; }));
}

// Refuses what is not, for every input that the loop does not feed itself, `count` rows.
void check_rows(const Info& info, const Feeds& feeds, std::int64_t count, const std::string& which) {
  check_names(info, feeds, which);
  for (const Port& port : info.inputs)
    if (is_given(info, port.name) && !feeds.count(port.name))
      refuse("sampling: the " + which + " feeds hold no '" + port.name + "'",
             port.means.empty() ? "feed it too" : "feed " + port.means);
  for (const auto& [name, tensor] : feeds) {
    if (!is_given(info, name)) refuse("sampling: '" + name + "' is fed by the loop itself", "leave it out");
    if (tensor.shape.empty() || tensor.shape[0] != count || !tensor.data)
      refuse("sampling: the " + which + " '" + name + "' has shape " + text_of(tensor.shape) + ", and the noise has " +
                 std::to_string(count) + " rows",
             "feed a row for each");
  }
}

void check_noise(const SamplerInfo& info, const Tensor& noise) {
  bool good =
      noise.dtype == DType::fp32 && noise.data && noise.shape.size() == info.shape.size() + 1 && noise.count() > 0;
  for (std::size_t i = 0; good && i < info.shape.size(); ++i)
    good = !info.shape[i].axis.empty() || noise.shape[i + 1] == info.shape[i].size;
  if (!good)
    refuse("sampling: noise of " + std::string(name_of(noise.dtype)) + " " + text_of(noise.shape) +
               ", where fp32 of [count] and " + text_of(info.shape) + " is wanted",
           "draw standard normal noise of that shape");
}

// One batch on its way from noise to latents.
class Batch {
 public:
  Batch(const Engine& engine, const SamplerInfo& info, const Tensor& noise, std::vector<Feeds> feeds, float guidance)
      : engine_(engine),
        info_(info),
        copies_(static_cast<std::int64_t>(feeds.size())),
        guidance_(guidance),
        own_(noise.count()),
        x_(DType::fp32, noise.shape),
        latent_(DType::fp32, times(noise.shape, copies_)),
        step_(DType::int64, {latent_.shape()[0]}) {
    const auto* start = static_cast<const float*>(noise.data);
    for (std::int64_t i = 0; i < own_; ++i) x_.floats()[i] = start[i] * info.init_noise_sigma;
    if (copies_ == 2) {
      joined_ = stacked(feeds[0], feeds[1]);
      feeds_ = views(joined_);
    } else {
      feeds_ = std::move(feeds[0]);
    }
    feeds_[info.latent] = latent_.view();
    feeds_[STEP] = step_.view();
    add_timestep();
    set_step(0);
    output_ = Array(DType::fp32, taken(engine.output_shape(feeds_)));
    if (output_.count() % latent_.count() || output_.shape()[0] != latent_.shape()[0])
      refuse("sampling: an output of " + text_of(output_.shape()) + " for latents of " + text_of(latent_.shape()),
             "these are no latents of this engine");
  }

  void advance(std::int64_t at) {
    const PortableStep& step = info_.portable->steps[static_cast<std::size_t>(at)];
    for (std::int64_t copy = 0; copy < copies_; ++copy)
      for (std::int64_t i = 0; i < own_; ++i) latent_.floats()[copy * own_ + i] = step.scale_input * x_.floats()[i];
    set_step(at);
    const Status ran = engine_.run(feeds_, output_.floats(), output_.count());
    if (!ran.ok()) throw Fault(ran.code(), ran.message(), ran.fix());
    const std::int64_t each = own_ / x_.shape()[0], apart = output_.count() / output_.shape()[0];
    for (std::int64_t i = 0; i < own_; ++i) {
      const std::int64_t from = i / each * apart + i % each;  // a learned variance lies behind the prediction
      x_.floats()[i] = moved(step, x_.floats()[i], predicted(from, x_.shape()[0] * apart));
    }
  }

  const Array& latents() const { return x_; }

 private:
  static Shape times(Shape shape, std::int64_t copies) {
    shape[0] *= copies;
    return shape;
  }

  void add_timestep() {
    for (const Port& port : engine_.bundle().info().inputs)
      if (port.name == "timestep") {
        timestep_ = Array(port.dtype == "int64" ? DType::int64 : DType::fp32, {step_.count()});
        feeds_["timestep"] = timestep_.view();
      }
  }

  void set_step(std::int64_t at) {
    const double value = info_.timesteps[static_cast<std::size_t>(at)];
    std::fill_n(step_.integers(), step_.count(), at);
    if (timestep_.dtype() == DType::int64)
      std::fill_n(timestep_.integers(), timestep_.count(), static_cast<std::int64_t>(value));
    else
      std::fill_n(timestep_.floats(), timestep_.count(), static_cast<float>(value));
  }

  float predicted(std::int64_t at, std::int64_t to_unwanted) const {
    const float wanted = output_.floats()[at];
    if (copies_ == 1) return wanted;
    const float unwanted = output_.floats()[at + to_unwanted];
    return unwanted + guidance_ * (wanted - unwanted);
  }

  // The bundle's formula, in fp32 and in its order.
  float moved(const PortableStep& step, float x, float p) const {
    float x0 = step.x0_latent * x + step.x0_prediction * p;
    if (info_.portable->clip) x0 = std::clamp(x0, -*info_.portable->clip, *info_.portable->clip);
    return step.next_x0 * x0 + step.next_latent * x + step.next_prediction * p;
  }

  const Engine& engine_;
  const SamplerInfo& info_;
  std::int64_t copies_;
  float guidance_;
  std::int64_t own_;  // elements of the batch's latents
  Array x_, latent_, step_, timestep_, output_;
  Arrays joined_;
  Feeds feeds_;
};

std::shared_ptr<const Sampler::Impl> opened(const Engine& engine) {
  const auto& info = engine.bundle().info().sampler;
  if (!info || !info->portable)
    throw Fault(Code::unsupported,
                "sampling: the bundle holds no steps to sample by" +
                    (info && !info->why_not_portable.empty() ? ": " + info->why_not_portable : ""),
                "call the engine from a loop of your own: info().sampler has the schedule");
  if (info->portable->clip && *info->portable->clip < 0)
    damaged("manifest.json: info.sampler.portable.clip is negative");
  return std::make_shared<Sampler::Impl>(Sampler::Impl{engine, &*info});
}

}  // namespace
}  // namespace detail

std::int64_t Sampler::Impl::most_at_once() const {
  const Axis& batch = engine.bundle().info().axes.at("batch");
  const std::int64_t most = batch.max / (info->guided ? 2 : 1);
  return std::max(batch.multiple, most / batch.multiple * batch.multiple);
}

Array Sampler::Impl::sample(const Tensor& noise, const Feeds& wanted, const Feeds& unwanted,
                            const SampleOptions& options) const {
  detail::check_noise(*info, noise);
  const std::int64_t count = noise.shape[0], most = most_at_once();
  detail::check_rows(engine.bundle().info(), wanted, count, "wanted");
  if (info->guided) detail::check_rows(engine.bundle().info(), unwanted, count, "unwanted");
  if (!info->guided && (!unwanted.empty() || options.guidance_scale))
    detail::refuse("sampling: this model is sampled without guidance",
                   "leave out the unwanted feeds and guidance_scale");
  Array latents(DType::fp32, noise.shape);
  for (std::int64_t first = 0; first < count; first += most) {
    const std::int64_t last = std::min(count, first + most);
    std::vector<Feeds> feeds{detail::rows_of(wanted, first, last)};
    if (info->guided) feeds.push_back(detail::rows_of(unwanted, first, last));
    detail::Batch batch(engine, *info, detail::rows_of(noise, first, last), std::move(feeds),
                        options.guidance_scale.value_or(info->guidance_scale));
    for (std::int64_t step = 0; step < static_cast<std::int64_t>(info->portable->steps.size()); ++step) {
      if (options.on_step && !options.on_step(step))
        detail::refuse("sampling: ended by the caller", "return true from on_step");
      batch.advance(step);
    }
    const Array& done = batch.latents();
    std::memcpy(latents.floats() + first * (latents.count() / count), done.data(), done.bytes());
  }
  return latents;
}

Result<Sampler> Sampler::open(const Engine& engine) noexcept {
  return detail::guarded([&] { return Sampler(detail::opened(engine)); });
}

Result<Array> Sampler::sample(const Tensor& noise, const Feeds& wanted, const Feeds& unwanted,
                              const SampleOptions& options) const noexcept {
  return detail::guarded([&] { return impl_->sample(noise, wanted, unwanted, options); });
}

const Engine& Sampler::engine() const noexcept { return impl_->engine; }

double psnr_db(const Tensor& expected, const Tensor& found, double peak) noexcept {
  const bool alike = expected.dtype == DType::fp32 && found.dtype == DType::fp32 && expected.shape == found.shape;
  if (!alike || !expected.data || !found.data) return NAN;
  double sum = 0;
  for (std::int64_t i = 0; i < expected.count(); ++i) {
    const double apart = double{static_cast<const float*>(expected.data)[i]} - static_cast<const float*>(found.data)[i];
    sum += apart * apart;
  }
  return sum == 0 ? INFINITY : 10 * std::log10(peak * peak * static_cast<double>(expected.count()) / sum);
}

}  // namespace export_engine
