// export-engine-run: everything the library does, from the command line.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "export_engine/export_engine.hpp"
#include "safetensors_out.hpp"

namespace ee = export_engine;

namespace {

const char* const USAGE =
    "usage: export-engine-run BUNDLE [--engine NAME] [--backend ort|trt] [--device cpu|cuda|tensorrt] [--threads N]\n"
    "  --self-test          compare the recorded calls and samples, and print each\n"
    "  --out FILE           write what the first rows of the recorded calls give, as many as the engine likes best at\n"
    "                       once, as <step>/output to a safetensors file\n"
    "  --sample             draw the recorded picture's samples too: picture/latent\n"
    "  --draw               draw whole pictures too, from the recorded tokens: picture/picture\n"
    "  --step N             the recorded call that --bench repeats (default: the first)\n"
    "  --bench N            time N calls after 10 others, and print JSON\n";

struct Arguments {
  std::string bundle, out;
  ee::EngineOptions engine;
  long bench = 0, step = -1;
  bool self_test = false, sample = false, draw = false;
};

// Ends the program as export-engine does: one message, and 2.
[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "error: %s\n", text.c_str());
  std::exit(2);
}

template <class T>
T taken(ee::Result<T> result) {
  if (!result.ok()) fail(result.status().text());
  return std::move(result).value();
}

long number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 0) fail(name + " " + text + ": not a whole number\n" + USAGE);
  return value;
}

Arguments parsed(const std::vector<std::string>& words) {
  Arguments arguments;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const auto value = [&] { return ++i < words.size() ? words[i] : (fail(word + " wants a value\n" + USAGE), ""); };
    if (word == "--engine")
      arguments.engine.name = value();
    else if (word == "--backend")
      arguments.engine.backend = value();
    else if (word == "--device")
      arguments.engine.device = value();
    else if (word == "--threads")
      arguments.engine.threads = static_cast<int>(number(word, value()));
    else if (word == "--out")
      arguments.out = value();
    else if (word == "--bench")
      arguments.bench = number(word, value());
    else if (word == "--step")
      arguments.step = number(word, value());
    else if (word == "--self-test")
      arguments.self_test = true;
    else if (word == "--sample")
      arguments.sample = true;
    else if (word == "--draw")
      arguments.draw = true;
    else if (word.compare(0, 2, "--") && arguments.bundle.empty())
      arguments.bundle = word;
    else
      fail(word + ": unknown\n" + USAGE);
  }
  if (arguments.bundle.empty()) fail(std::string("no BUNDLE\n") + USAGE);
  return arguments;
}

ee::Feeds under(const ee::Arrays& arrays, const std::string& prefix) {
  ee::Feeds feeds;
  for (const auto& [name, array] : arrays)
    if (name.compare(0, prefix.size(), prefix) == 0) feeds.emplace(name.substr(prefix.size()), array.view());
  return feeds;
}

const ee::Array& golden(const ee::Arrays& arrays, const std::string& name) {
  const auto found = arrays.find(name);
  if (found == arrays.end()) fail("golden.safetensors: has no " + name);
  return found->second;
}

// Returns the first rows of a recorded call, as many as the engine likes best at once.
ee::Feeds recorded(const ee::Bundle& bundle, const ee::Arrays& arrays, std::int64_t step) {
  ee::Feeds feeds = under(arrays, std::to_string(step) + "/feeds/");
  for (auto& [name, tensor] : feeds) tensor.shape[0] = std::min(tensor.shape[0], bundle.info().axes.at("batch").opt);
  return feeds;
}

bool self_test(const ee::Engine& engine) {
  const ee::SelfTest test = taken(engine.self_test());
  for (const ee::GoldenRow& row : test.rows)
    std::printf("%s: %s: %.1f dB, at least %.1f: %s\n", engine.info().name.c_str(), row.what.c_str(), row.value_db,
                row.limit_db, row.passed ? "passed" : "FAILED");
  return test.passed();
}

void bench(const ee::Engine& engine, const ee::Feeds& feeds, long calls) {
  constexpr long WARM_UP = 10;
  std::vector<float> output(static_cast<std::size_t>(ee::count_of(taken(engine.output_shape(feeds)))));
  std::vector<double> ms;
  for (long i = -WARM_UP; i < calls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const ee::Status status = engine.run(feeds, output.data(), static_cast<std::int64_t>(output.size()));
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (!status.ok()) fail(status.text());
    if (i >= 0) ms.push_back(took.count());
  }
  std::printf("{\"engine\": \"%s\", \"rows\": %lld, \"ms\": [", engine.info().name.c_str(),
              static_cast<long long>(feeds.begin()->second.shape[0]));
  for (std::size_t i = 0; i < ms.size(); ++i) std::printf("%s%.6f", i ? ", " : "", ms[i]);
  std::printf("]}\n");
}

ee::Array sampled(const ee::Engine& engine, const ee::Arrays& arrays) {
  const ee::Sampler sampler = taken(ee::Sampler::open(engine));
  return taken(sampler.sample(golden(arrays, "picture/noise").view(), under(arrays, "picture/wanted/"),
                              under(arrays, "picture/unwanted/")));
}

ee::Array drawn(const ee::Bundle& bundle, const ee::EngineOptions& options, const ee::Arrays& arrays) {
  const ee::Pipeline pipeline = taken(ee::Pipeline::open(bundle, options));
  ee::Feeds tokens;
  ee::DrawOptions draw;
  for (const ee::TokensInfo& input : bundle.info().pipeline->text.inputs) {
    tokens[input.input] = golden(arrays, "picture/" + input.input).view();
    const auto unwanted = arrays.find("picture/unwanted_" + input.input);
    if (unwanted != arrays.end() && !bundle.info().pipeline->text.unwanted_is_zeros)
      draw.unwanted_tokens[input.input] = unwanted->second.view();
  }
  return taken(pipeline.draw(tokens, golden(arrays, "picture/noise").view(), draw));
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments = parsed({argv + 1, argv + argc});
  const ee::Bundle bundle = taken(ee::Bundle::open(arguments.bundle));
  const ee::Engine engine = taken(ee::Engine::open(bundle, arguments.engine));
  const ee::Arrays arrays = taken(bundle.golden());
  const auto& steps = bundle.info().golden.steps;
  if (steps.empty()) fail("the bundle has no recorded calls");

  if (arguments.self_test && !self_test(engine)) return 3;
  if (arguments.bench) {
    const auto step = arguments.step < 0 ? steps[0] : static_cast<std::int64_t>(arguments.step);
    bench(engine, recorded(bundle, arrays, step), arguments.bench);
  }
  ee::Arrays outputs;
  if (!arguments.out.empty())
    for (const std::int64_t step : steps)
      outputs.emplace(std::to_string(step) + "/output", taken(engine.run(recorded(bundle, arrays, step))));
  if (arguments.sample) outputs.emplace("picture/latent", sampled(engine, arrays));
  if (arguments.draw) outputs.emplace("picture/picture", drawn(bundle, arguments.engine, arrays));
  if (!arguments.out.empty() && !write_safetensors(arguments.out, outputs)) fail(arguments.out + ": cannot be written");
}
