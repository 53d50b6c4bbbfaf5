// An engine against what was recorded when its bundle was made.
#include <algorithm>

#include "engine_impl.hpp"
#include "export_engine/sampler.hpp"
#include "fault.hpp"
#include "golden.hpp"
#include "rows.hpp"

namespace export_engine {
namespace detail {
namespace {

// Returns the feeds or samples whose names begin with `prefix`, under the rest of their names.
Feeds under(const Arrays& arrays, const std::string& prefix) {
  Feeds feeds;
  for (auto at = arrays.lower_bound(prefix); at != arrays.end() && at->first.compare(0, prefix.size(), prefix) == 0;
       ++at)
    feeds.emplace(at->first.substr(prefix.size()), at->second.view());
  return feeds;
}

double limit_of(const GoldenInfo& golden, const std::string& dtype, std::int64_t step) {
  const auto limits = golden.limits_db.find(dtype);
  if (limits == golden.limits_db.end()) damaged("manifest.json: golden.limits_db lacks '" + dtype + "'");
  const auto limit = limits->second.find(step);
  if (limit == limits->second.end())
    damaged("manifest.json: golden.limits_db." + dtype + " lacks step " + std::to_string(step));
  return limit->second;
}

// Runs as many rows at once as the engine likes best: more were recorded than some take.
GoldenRow tested(const Engine::Impl& engine, const Arrays& arrays, std::int64_t step) {
  const std::string prefix = std::to_string(step) + "/";
  const auto expected = arrays.find(prefix + "expected");
  if (expected == arrays.end() || expected->second.dtype() != DType::fp32 || expected->second.shape().empty())
    damaged("golden.safetensors: lacks '" + prefix + "expected', or it is not what the output is");
  const Feeds feeds = under(arrays, prefix + "feeds/");
  const std::int64_t count = expected->second.shape()[0], most = engine.bundle.info().axes.at("batch").opt;
  if (count < 1) damaged("golden.safetensors: '" + prefix + "expected' has no rows");
  Ratio ratio;
  for (const auto& [name, tensor] : feeds)
    if (tensor.shape.empty() || tensor.shape[0] != count)
      damaged("golden.safetensors: '" + prefix + name + "' has other rows");
  for (std::int64_t first = 0; first < count; first += most) {
    const std::int64_t last = std::min(count, first + most);
    const Feeds part = rows_of(feeds, first, last);
    const Tensor wanted = rows_of(expected->second.view(), first, last);
    Array found(DType::fp32, engine.check(part));
    if (wanted.shape != found.shape())
      damaged("golden.safetensors: '" + prefix + "expected' is not what the output is");
    engine.run(part, found.floats(), found.shape());
    ratio.add(static_cast<const float*>(wanted.data), found.floats(), found.count());
  }
  const double limit = limit_of(engine.bundle.info().golden, engine.info->dtype, step);
  return {"step " + std::to_string(step), ratio.db(), limit, ratio.db() >= limit};
}

GoldenRow drawn(const Engine& engine, const Arrays& arrays, const PictureInfo& picture) {
  const auto noise = arrays.find("picture/noise"), latent = arrays.find("picture/latent");
  const auto limit = picture.limits_db.find(engine.info().dtype);
  if (noise == arrays.end() || latent == arrays.end())
    damaged("golden.safetensors: lacks picture/noise or picture/latent");
  if (limit == picture.limits_db.end())
    damaged("manifest.json: golden.picture.limits_db lacks '" + engine.info().dtype + "'");
  const Array found =
      taken(taken(Sampler::open(engine))
                .sample(noise->second.view(), under(arrays, "picture/wanted/"), under(arrays, "picture/unwanted/")));
  const double psnr = psnr_db(latent->second.view(), found.view(), picture.peak);
  return {std::to_string(picture.count) + " samples", psnr, limit->second, psnr >= limit->second};
}

}  // namespace
}  // namespace detail

Result<SelfTest> Engine::self_test() const noexcept {
  return detail::guarded([&] {
    const Arrays arrays = detail::taken(impl_->bundle.golden());
    SelfTest test;
    for (const std::int64_t step : impl_->bundle.info().golden.steps)
      test.rows.push_back(detail::tested(*impl_, arrays, step));
    const Info& info = impl_->bundle.info();
    if (info.golden.picture && info.sampler && info.sampler->portable)
      test.rows.push_back(detail::drawn(*this, arrays, *info.golden.picture));
    return test;
  });
}

}  // namespace export_engine
