// An engine against what was recorded when its bundle was made.
#include <cmath>

#include "engine_impl.hpp"
#include "fault.hpp"

namespace export_engine {
namespace detail {
namespace {

// Returns the feeds or samples whose names begin with `prefix`, under the rest of their names.
Feeds under(const Arrays& arrays, const std::string& prefix) {
  Feeds feeds;
  for (auto at = arrays.lower_bound(prefix); at != arrays.end() && at->first.compare(0, prefix.size(), prefix) == 0; ++at)
    feeds.emplace(at->first.substr(prefix.size()), at->second.view());
  return feeds;
}

double sqnr_db(const Array& expected, const Array& found) {
  double signal = 0, noise = 0;
  for (std::int64_t i = 0; i < expected.count(); ++i) {
    const double wanted = expected.floats()[i], apart = wanted - found.floats()[i];
    signal += wanted * wanted;
    noise += apart * apart;
  }
  return noise == 0 ? INFINITY : 10 * std::log10(signal / noise);
}

double limit_of(const GoldenInfo& golden, const std::string& dtype, std::int64_t step) {
  const auto limits = golden.limits_db.find(dtype);
  if (limits == golden.limits_db.end()) damaged("manifest.json: golden.limits_db lacks '" + dtype + "'");
  const auto limit = limits->second.find(step);
  if (limit == limits->second.end())
    damaged("manifest.json: golden.limits_db." + dtype + " lacks step " + std::to_string(step));
  return limit->second;
}

GoldenRow tested(const Engine::Impl& engine, const Arrays& arrays, std::int64_t step) {
  const std::string prefix = std::to_string(step) + "/";
  const auto expected = arrays.find(prefix + "expected");
  const Feeds feeds = under(arrays, prefix + "feeds/");
  if (expected == arrays.end()) damaged("golden.safetensors: lacks '" + prefix + "expected'");
  Array found(DType::fp32, engine.check(feeds));
  if (expected->second.dtype() != DType::fp32 || expected->second.shape() != found.shape())
    damaged("golden.safetensors: '" + prefix + "expected' is not what the output is");
  engine.run(feeds, found.floats(), found.shape());
  const double sqnr = sqnr_db(expected->second, found);
  const double limit = limit_of(engine.bundle.info().golden, engine.info->dtype, step);
  return {step, sqnr, limit, sqnr >= limit};
}

}  // namespace
}  // namespace detail

Result<SelfTest> Engine::self_test() const noexcept {
  return detail::guarded([&] {
    const Arrays arrays = detail::taken(impl_->bundle.golden());
    SelfTest test;
    for (const std::int64_t step : impl_->bundle.info().golden.steps)
      test.rows.push_back(detail::tested(*impl_, arrays, step));
    return test;
  });
}

}  // namespace export_engine
