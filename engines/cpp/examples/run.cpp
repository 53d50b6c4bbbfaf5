// export-engine-run: everything the library does, from the command line.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "export_engine/export_engine.hpp"
#include "safetensors_out.hpp"

namespace ee = export_engine;

namespace {

const char* const USAGE =
    "usage: export-engine-run BUNDLE [--engine NAME] [--backend ort|trt] [--device cpu|cuda|tensorrt] [--threads N]\n"
    "  with none of these   open the bundle and its engine, and say which it is\n"
    "  --self-test          compare the recorded calls and samples, a pipeline's captions and pictures too, and print\n"
    "                       each\n"
    "  --out FILE           write what the first rows of the recorded calls give, as many as the engine likes best at\n"
    "                       once, as <step>/output to a safetensors file\n"
    "  --sample             draw the recorded picture's samples too, for --out: picture/latent\n"
    "  --draw               draw whole pictures too, from the recorded tokens, for --out: picture/picture\n"
    "  --step N             the recorded call that --bench repeats (default: the first)\n"
    "  --bench N            time N calls after 10 others, and print JSON\n"
    "  --help               print this\n";

struct Arguments {
  std::string bundle, out;
  ee::EngineOptions engine;
  long bench = -1, step = -1;
  bool self_test = false, sample = false, draw = false, help = false;
};

// Ends the program as export-engine does, with one message and 2; main() catches, so that what a zip was unpacked into
// goes too.
[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

template <class T>
T taken(ee::Result<T> result) {
  if (!result.ok()) fail(result.status().text());
  return std::move(result).value();
}

long number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 0 || value > INT_MAX) fail(name + " " + text + ": not a whole number\n" + USAGE);
  return value;
}

// Refuses arguments that would do nothing.
void check(const Arguments& arguments) {
  if (arguments.bundle.empty()) fail(std::string("no BUNDLE\n") + USAGE);
  if (arguments.bench == 0) fail("--bench 0: times nothing\n  fix: give 1 or more");
  if (arguments.step >= 0 && arguments.bench < 0)
    fail("--step says what --bench repeats, and there is no --bench\n  fix: add --bench N");
  for (const auto& [name, asked] : {std::pair{"--sample", arguments.sample}, {"--draw", arguments.draw}})
    if (asked && arguments.out.empty())
      fail(std::string(name) + ": nothing says where to write what is drawn\n  fix: add --out FILE");
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
    else if (word == "--help" || word == "-h")
      arguments.help = true;
    else if (word.compare(0, 1, "-") && arguments.bundle.empty())
      arguments.bundle = word;
    else
      fail(word + ": unknown\n" + USAGE);
  }
  if (!arguments.help) check(arguments);
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
  if (found == arrays.end()) fail("the bundle has recorded no " + name + "\n  fix: leave out --sample and --draw");
  return found->second;
}

// Returns the first rows of a recorded call, as many as the engine likes best at once.
ee::Feeds recorded(const ee::Bundle& bundle, const ee::Arrays& arrays, std::int64_t step) {
  ee::Feeds feeds = under(arrays, std::to_string(step) + "/feeds/");
  for (auto& [name, tensor] : feeds) {
    if (tensor.shape.empty()) fail("the bundle's recorded '" + name + "' has no rows\n  fix: make the bundle again");
    tensor.shape[0] = std::min(tensor.shape[0], bundle.info().axes.at("batch").opt);
  }
  return feeds;
}

bool passed(const ee::Engine& engine, const ee::SelfTest& test) {
  for (const ee::GoldenRow& row : test.rows)
    std::printf("%s: %s: %.1f dB, at least %.1f: %s\n", engine.info().name.c_str(), row.what.c_str(), row.value_db,
                row.limit_db, row.passed ? "passed" : "FAILED");
  return test.passed();
}

bool pipeline_passes(const ee::Bundle& bundle, const ee::EngineOptions& options) {
  if (!bundle.info().pipeline) return true;
  const auto untested = [](const std::string& why) {
    std::printf("text encoder and VAE: not tested: %s\n", why.c_str());
    return true;
  };
  if (!bundle.info().golden.picture) return untested("the bundle has recorded no pictures");
  const auto& sampler = bundle.info().sampler;
  if (!sampler || !sampler->portable) return untested("the bundle holds no steps to sample by");
  const ee::Pipeline pipeline = taken(ee::Pipeline::open(bundle, options));
  return passed(pipeline.engine(), taken(pipeline.self_test()));
}

bool self_test(const ee::Bundle& bundle, const ee::Engine& engine, const ee::EngineOptions& options) {
  const bool denoiser = passed(engine, taken(engine.self_test()));
  return pipeline_passes(bundle, options) && denoiser;
}

// Returns the step that --bench repeats.
std::int64_t benched(const std::vector<std::int64_t>& steps, long asked) {
  if (asked < 0) return steps[0];
  if (std::find(steps.begin(), steps.end(), asked) != steps.end()) return asked;
  std::string known;
  for (const std::int64_t step : steps) known += (known.empty() ? "" : ", ") + std::to_string(step);
  fail("--step " + std::to_string(asked) + ": no call was recorded there\n  fix: give one of " + known);
}

std::string said(const ee::Bundle& bundle, const ee::Engine& engine) {
  const ee::EngineInfo& info = engine.info();
  return bundle.info().model + ", recipe " + bundle.info().recipe + ", by its engine " + info.name + " (" + info.dtype +
         ", " + info.backend + ")";
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

ee::Arrays outputs_of(const Arguments& arguments, const ee::Bundle& bundle, const ee::Engine& engine,
                      const ee::Arrays& arrays) {
  ee::Arrays outputs;
  for (const std::int64_t step : bundle.info().golden.steps)
    outputs.emplace(std::to_string(step) + "/output", taken(engine.run(recorded(bundle, arrays, step))));
  if (arguments.sample) outputs.emplace("picture/latent", sampled(engine, arrays));
  if (arguments.draw) outputs.emplace("picture/picture", drawn(bundle, arguments.engine, arrays));
  return outputs;
}

int run(const Arguments& arguments) {
  const ee::Bundle bundle = taken(ee::Bundle::open(arguments.bundle));
  const ee::Engine engine = taken(ee::Engine::open(bundle, arguments.engine));
  if (!arguments.self_test && arguments.bench < 0 && arguments.out.empty())
    return std::printf("%s: opened: %s\n", arguments.bundle.c_str(), said(bundle, engine).c_str()), 0;
  const ee::Arrays arrays = taken(bundle.golden());
  const auto& steps = bundle.info().golden.steps;
  if (steps.empty()) fail("the bundle has no recorded calls\n  fix: leave out --self-test, --bench and --out");

  if (arguments.self_test && !self_test(bundle, engine, arguments.engine)) return 3;
  if (arguments.bench > 0) bench(engine, recorded(bundle, arrays, benched(steps, arguments.step)), arguments.bench);
  if (arguments.out.empty()) return 0;
  const ee::Arrays outputs = outputs_of(arguments, bundle, engine, arrays);
  if (!write_safetensors(arguments.out, outputs))
    fail(arguments.out + ": cannot be written (" + std::strerror(errno) + ")\n  fix: name a file in a folder that is " +
         "there, and that you may write to");
  // With --bench, JSON stands on stdout.
  std::fprintf(arguments.bench > 0 ? stderr : stdout, "%s: %zu arrays of %s\n", arguments.out.c_str(), outputs.size(),
               said(bundle, engine).c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = parsed({argv + 1, argv + argc});
    return arguments.help ? std::fputs(USAGE, stdout), 0 : run(arguments);
  } catch (const std::runtime_error& error) {
    return std::fprintf(stderr, "error: %s\n", error.what()), 2;
  }
}
