// Bundles that tests/engines/test_cpp.py makes, of a network that gives hidden_states · 0.5 + class_labels + step.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <thread>

#include "check.hpp"
#include "export_engine/export_engine.hpp"

using namespace export_engine;
namespace fs = std::filesystem;

namespace {

std::string root;

template <class T>
T need(Result<T> result) {
  if (!result.ok()) {
    std::printf("%s\n", result.status().text().c_str());
    std::exit(1);
  }
  return std::move(result).value();
}

Engine engine_of(const std::string& name, const EngineOptions& options = {}) {
  return need(Engine::open(need(Bundle::open(root + "/" + name)), options));
}

// Feeds of some rows at one step of the schedule 900, 500, 100.
struct Call {
  explicit Call(std::int64_t rows, std::int64_t at = 0, std::int64_t width = 4)
      : count(rows),
        shape{rows, 1, 2, width},
        latent(static_cast<std::size_t>(rows * 2 * width)),
        timestep(static_cast<std::size_t>(rows), 900 - 400 * at),
        label(static_cast<std::size_t>(rows)),
        step(static_cast<std::size_t>(rows), at) {
    std::iota(latent.begin(), latent.end(), -3.0f);
    std::iota(label.begin(), label.end(), 0);
  }

  Feeds feeds() const {
    return {{"hidden_states", Tensor::of(latent.data(), shape)},
            {"timestep", Tensor::of(timestep.data(), {count})},
            {"class_labels", Tensor::of(label.data(), {count})},
            {"step", Tensor::of(step.data(), {count})}};
  }

  float expected(std::size_t at, bool with_step) const {
    const std::size_t row = at / (latent.size() / label.size());
    return latent[at] * 0.5f + static_cast<float>(label[row]) + (with_step ? static_cast<float>(step[row]) : 0.0f);
  }

  std::int64_t count;
  Shape shape;
  std::vector<float> latent;
  std::vector<std::int64_t> timestep, label, step;
};

bool gives(const Engine& engine, const Call& call, bool with_step) {
  const Array output = need(engine.run(call.feeds()));
  bool same = output.shape() == call.shape;
  for (std::size_t i = 0; same && i < call.latent.size(); ++i) same = output.floats()[i] == call.expected(i, with_step);
  return same;
}

void an_engine_gives_what_its_network_does() {
  CHECK(gives(engine_of("tiny"), Call(3), false));
  CHECK(gives(engine_of("tiny"), Call(8, 1, 2), false));
  CHECK(gives(engine_of("tiny.zip"), Call(1, 2, 8), false));
  CHECK(gives(engine_of("index"), Call(3, 2), true));
  CHECK(gives(engine_of("row"), Call(3, 1), true));
  CHECK(gives(engine_of("half", {"half", "", "cpu", 0, 0}), Call(3), false));
  CHECK(gives(engine_of("half", {"", "ort", "cpu", 0, 1}), Call(3), false));
}

void half_feeds_are_taken_too() {
  const Call call(1);
  std::vector<std::uint16_t> ones(8, 0x3c00);
  for (const char* name : {"ort", "half"}) {
    Feeds feeds = call.feeds();
    feeds["hidden_states"] = Tensor::half(ones.data(), call.shape);
    const Array output = need(engine_of("half", {name, "", "cpu", 0, 0}).run(feeds));
    CHECK(output.dtype() == DType::fp32 && output.floats()[7] == 0.5f);
  }
}

// Runs changed feeds and returns what is said about them.
template <class Change>
Status said(const Engine& engine, const Call& call, Change change) {
  Feeds feeds = call.feeds();
  change(feeds);
  return engine.run(feeds).status();
}

void feeds_that_do_not_fit_are_refused_with_what_would() {
  const Engine engine = engine_of("tiny");
  const auto none = [](Feeds&) {};
  CHECK_SAYS(said(engine, Call(9), none), "batch may be 1 … 8");
  CHECK_SAYS(said(engine, Call(0), none), "batch may be 1 … 8");
  CHECK_SAYS(said(engine, Call(0), none), "fix: feed so many rows at once: 1 … 8");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["hidden_states"].shape[0] = -2; }), "at once: 1 … 8");
  CHECK_SAYS(said(engine, Call(1, 0, 3), none), "width may be 2 … 8, multiples of 2");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f.erase("timestep"); }), "no 'timestep'");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["other"] = f["timestep"]; }), "no input 'other'");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["timestep"].shape = {1}; }), "have 2");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["timestep"].shape = {2, 1}; }), "[2, 1], where [batch]");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["hidden_states"].shape = {2, 2, 1, 4}; }), "[batch, 1, 2, width]");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["timestep"].dtype = DType::fp32; }), "int64 is wanted");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["hidden_states"].dtype = DType::int64; }), "fp32 or fp16");
  CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["timestep"].data = nullptr; }), "no data");
  float output[15];
  CHECK_SAYS(engine.run(Call(2).feeds(), output, 15), "has 16: [2, 1, 2, 4]");
}

void values_beyond_the_largest_are_refused() {
  const Engine engine = engine_of("tiny");
  const std::int64_t far[] = {99, 100}, below[] = {0, -1};
  CHECK_SAYS(said(engine, Call(2), [&](Feeds& f) { f["class_labels"].data = far; }), "'class_labels' holds 100");
  CHECK_SAYS(said(engine, Call(2), [&](Feeds& f) { f["class_labels"].data = below; }), "fix: feed 0 … 99: class_labels");
}

void a_value_that_the_graph_does_not_take_is_refused_with_where_its_range_stands() {
  const std::int64_t far[] = {11, 3};
  const auto change = [&](Feeds& feeds) { feeds["class_labels"].data = far; };
  CHECK_SAYS(said(engine_of("table"), Call(2), change), "see `means`");
  CHECK(gives(engine_of("table"), Call(2), false));
}

void steps_of_another_schedule_are_refused() {
  for (const char* name : {"index", "row"}) {
    const Engine engine = engine_of(name);
    CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f.erase("step"); }), "no 'step'");
    const std::int64_t far[] = {0, 3}, negative[] = {-1, 0}, other[] = {900, 500};
    CHECK_SAYS(said(engine, Call(2), [&](Feeds& f) { f["step"].data = far; }), "step 3, and activations have");
    CHECK_SAYS(said(engine, Call(2), [&](Feeds& f) { f["step"].data = negative; }), "step -1");
    CHECK_SAYS(said(engine, Call(2), [&](Feeds& f) { f["timestep"].data = other; }), "timestep 500 at step 0");
    CHECK_SAYS(said(engine, Call(2), [](Feeds& f) { f["step"].shape = {1}; }), "int64 [2]");
  }
}

void engines_that_are_not_there_are_refused() {
  const Bundle bundle = need(Bundle::open(root + "/tiny"));
  CHECK_SAYS(Engine::open(bundle, {"other", "", "cpu", 0, 0}).status(), "engine 'other': unknown; the bundle has ort");
  CHECK_SAYS(Engine::open(bundle, {"", "trt-rtx", "cpu", 0, 0}).status(), "ask for ort or trt");
  CHECK_SAYS(Engine::open(bundle, {"", "trt", "cpu", 0, 0}).status(), "another backend, ort");
  CHECK_SAYS(Engine::open(bundle, {"", "", "abacus", 0, 0}).status(), "abacus");
  CHECK_SAYS(Engine::open(bundle, {"", "", "cpu", 0, -1}).status(), "threads: -1");
}

void a_self_test_passes_and_notices_another_network() {
  CHECK(need(engine_of("tiny").self_test()).passed());
  CHECK(need(engine_of("row").self_test()).passed());
  const SelfTest worse = need(engine_of("worse").self_test());
  CHECK(worse.rows.size() == 2 && !worse.passed());
  CHECK_SAYS(engine_of("no_rows").self_test().status(), "'0/expected' has no rows");
}

void eight_threads_get_what_one_gets() {
  const Engine engine = engine_of("row");
  std::vector<int> wrong(8, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < wrong.size(); ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 100; ++i) wrong[t] += !gives(engine, Call(1 + (i + static_cast<int>(t)) % 8, i % 3), true);
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(std::accumulate(wrong.begin(), wrong.end(), 0) == 0);
}

// The steps are x − p / 4, three of them; guided, p is unwanted + 2 · (wanted − unwanted).
float sampled(float x, float wanted, float unwanted, bool guided) {
  for (int step = 0; step < 3; ++step) {
    const float p = x * 0.5f + wanted, q = x * 0.5f + unwanted;
    x = x + -0.25f * (guided ? q + 2.0f * (p - q) : p);
  }
  return x;
}

void sampling_follows_the_steps_in_as_many_batches_as_it_takes() {
  const Call call(20);
  const std::vector<std::int64_t> nothing(20, 7);
  const Feeds wanted{{"class_labels", Tensor::of(call.label.data(), {20})}};
  const Feeds unwanted{{"class_labels", Tensor::of(nothing.data(), {20})}};
  const Tensor noise = Tensor::of(call.latent.data(), call.shape);
  for (const bool guided : {false, true}) {
    const Sampler sampler = need(Sampler::open(engine_of(guided ? "guided" : "tiny")));
    const Array latents = need(sampler.sample(noise, wanted, guided ? unwanted : Feeds()));
    CHECK(latents.shape() == call.shape);
    for (std::size_t i = 0; i < call.latent.size(); ++i)
      CHECK(latents.floats()[i] == sampled(call.latent[i], static_cast<float>(call.label[i / 8]), 7, guided));
  }
  const Sampler guided = need(Sampler::open(engine_of("guided"))), plain = need(Sampler::open(engine_of("tiny")));
  CHECK_SAYS(guided.sample(noise, wanted).status(), "unwanted feeds hold no 'class_labels'");
  CHECK_SAYS(plain.sample(noise, wanted, unwanted).status(), "without guidance");
  CHECK_SAYS(plain.sample(noise, {}).status(), "wanted feeds hold no 'class_labels'");
  CHECK_SAYS(plain.sample(noise, {{"labels", wanted.at("class_labels")}}).status(),
             "hold 'labels', which is no input\n  fix: feed class_labels");
  CHECK_SAYS(plain.sample(Tensor::of(call.latent.data(), {20, 8}), wanted).status(), "where fp32 of [count]");
  CHECK_SAYS(plain.sample(noise, {{"class_labels", Tensor::of(nothing.data(), {3})}}).status(), "20 rows");
  SampleOptions stopped;
  stopped.on_step = [](std::int64_t step) { return step < 1; };
  CHECK_SAYS(plain.sample(noise, wanted, {}, stopped).status(), "ended by the caller");
  CHECK_SAYS(Sampler::open(engine_of("foreign")).status(), "UniPC");
}

// The text encoder gives each caption's first token as class_labels; the decoder gives what it gets, in [−1, 1].
void a_pipeline_draws_from_tokens() {
  const Call call(20);
  const Tensor noise = Tensor::of(call.latent.data(), call.shape);
  const std::int64_t nine[] = {9, 0, 0};
  std::vector<std::int64_t> ids(60, 0);
  for (std::size_t i = 0; i < 20; ++i) ids[3 * i] = static_cast<std::int64_t>(i);
  const Feeds tokens{{"input_ids", Tensor::of(ids.data(), {20, 3})}};
  const auto draws = [&](const char* name, const DrawOptions& options, float unwanted) {
    const Array pictures =
        need(need(Pipeline::open(need(Bundle::open(root + "/" + name)))).draw(tokens, noise, options));
    CHECK(pictures.shape() == call.shape);
    for (std::size_t i = 0; i < call.latent.size(); ++i) {
      const float latent = sampled(call.latent[i], static_cast<float>(i / 8), unwanted, true);
      CHECK(pictures.floats()[i] == std::max(-1.0f, std::min(1.0f, latent / 64.0f + 0.25f)));
    }
  };
  DrawOptions away;
  away.unwanted_tokens = {{"input_ids", Tensor::of(nine, {1, 3})}};
  draws("pipeline", {}, 1);  // the empty caption's first token
  draws("pipeline", away, 9);
  draws("zeros", {}, 0);
  const Pipeline pipeline = need(Pipeline::open(need(Bundle::open(root + "/pipeline"))));
  CHECK_SAYS(pipeline.draw({{"input_ids", Tensor::of(ids.data(), {20, 2})}}, noise).status(), "where int64 [20, 3]");
  CHECK_SAYS(pipeline.draw({}, noise).status(), "no 'input_ids'");
  CHECK_SAYS(pipeline.draw(tokens, Tensor::of(call.latent.data(), {0, 1, 2, 4})).status(), "1 row or more");
  CHECK_SAYS(Pipeline::open(need(Bundle::open(root + "/tiny"))).status(), "denoiser alone");
}

void a_pipelines_self_test_passes_and_notices_other_pictures() {
  for (const char* name : {"pipeline", "zeros"}) {
    const SelfTest test = need(need(Pipeline::open(need(Bundle::open(root + "/" + name)))).self_test());
    CHECK(test.rows.size() == 3 && test.passed());
  }
  const SelfTest worse = need(need(Pipeline::open(need(Bundle::open(root + "/other_pictures")))).self_test());
  CHECK(worse.rows.size() == 3 && worse.rows[0].passed && worse.rows[1].passed);
  CHECK(worse.rows[2].what == "VAE decoder" && !worse.rows[2].passed);
}

// Also where the tests run as root, who may read all: for this check they run as nobody.
void a_folder_that_may_not_be_read_is_told_from_one_that_is_no_bundle() {
  constexpr uid_t NOBODY = 65534;
  std::string closed = (fs::temp_directory_path() / "export-engine-XXXXXX").string();
  CHECK(::mkdtemp(closed.data()) != nullptr);
  fs::permissions(closed, fs::perms::none);
  const bool root_runs = ::geteuid() == 0;
  if (root_runs) CHECK(::seteuid(NOBODY) == 0);
  CHECK_SAYS(Bundle::open(closed).status(), "manifest.json: cannot be opened (Permission denied)");
  if (root_runs) CHECK(::seteuid(0) == 0);
  fs::remove(closed);
}

void what_a_zip_was_unpacked_into_goes_with_it() {
  const fs::path place = root + "/unpacked";
  fs::create_directories(place);
  {
    BundleOptions options;
    options.temporary_folder = place.string();
    const Bundle bundle = need(Bundle::open(root + "/tiny.zip", options));
    CHECK_SAYS(bundle.file("none").status(), "lists no file");
    CHECK(fs::exists(need(bundle.file("engines/ort/model.onnx"))));
    CHECK(!fs::is_empty(place));
  }
  CHECK(fs::is_empty(place));
}

std::string content_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }

void one_flipped_byte_at_random_places_is_refused() {
  const fs::path copy = root + "/flipped";
  fs::copy(root + "/tiny", copy, fs::copy_options::recursive);
  fs::copy(root + "/tiny.zip", root + "/flipped.zip");
  std::vector<fs::path> files{root + "/flipped.zip"};
  for (const auto& entry : fs::recursive_directory_iterator(copy))
    if (entry.is_regular_file()) files.push_back(entry.path());
  std::mt19937 generator(0);
  for (std::size_t i = 0; i < 200; ++i) {
    const fs::path& file = files[i % files.size()];
    const std::string content = content_of(file);
    std::string changed = content;
    changed[generator() % changed.size()] ^= static_cast<char>(1 << generator() % 8);
    write(file, changed);
    const std::string opened = i % files.size() ? copy.string() : file.string();
    CHECK(!Bundle::open(opened).ok());
    write(file, content);
  }
  CHECK(Bundle::open(copy.string()).ok() && Bundle::open(root + "/flipped.zip").ok());
  fs::remove_all(copy);
  fs::remove(root + "/flipped.zip");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  root = argv[1];
  an_engine_gives_what_its_network_does();
  half_feeds_are_taken_too();
  feeds_that_do_not_fit_are_refused_with_what_would();
  values_beyond_the_largest_are_refused();
  a_value_that_the_graph_does_not_take_is_refused_with_where_its_range_stands();
  steps_of_another_schedule_are_refused();
  engines_that_are_not_there_are_refused();
  a_self_test_passes_and_notices_another_network();
  eight_threads_get_what_one_gets();
  sampling_follows_the_steps_in_as_many_batches_as_it_takes();
  a_pipeline_draws_from_tokens();
  a_pipelines_self_test_passes_and_notices_other_pictures();
  a_folder_that_may_not_be_read_is_told_from_one_that_is_no_bundle();
  what_a_zip_was_unpacked_into_goes_with_it();
  one_flipped_byte_at_random_places_is_refused();
  return failures() != 0;
}
