#include "info.hpp"

#include <cmath>
#include <limits>
#include <set>

#include "fault.hpp"
#include "files.hpp"

namespace export_engine::detail {
namespace {

constexpr std::int64_t LARGEST = std::int64_t{1} << 31;  // of any one size: room enough, and products stay small
constexpr std::size_t MOST_AXES = 8;
constexpr std::size_t MOST_STEPS = 100000;
// All that engines are recorded with (engines/backends/ort.py). Of the others some have ONNX Runtime write files.
const std::set<std::string> SESSION_ENTRIES = {"session.qdq_matmulnbits_accuracy_level",
                                               "session.qdq_matmulnbits_block_size", "session.x64quantprecision",
                                               "session.intra_op.allow_spinning"};

std::string file_name(const Cursor& name) {
  check_name(name.text(), name.path());
  return name.text();
}

std::vector<Dimension> shape_of(const Cursor& cursor) {
  std::vector<Dimension> shape;
  for (const Cursor& size : cursor.items()) {
    Dimension dimension;
    if (size.is_text())
      dimension.axis = size.text();
    else
      dimension.size = size.integer(1, LARGEST);
    shape.push_back(std::move(dimension));
  }
  if (shape.size() > MOST_AXES) cursor.refuse("a shape of at most " + std::to_string(MOST_AXES) + " axes");
  return shape;
}

Port port_of(const Cursor& cursor) {
  Port port{cursor["name"].text(), cursor["dtype"].text(), shape_of(cursor["shape"]), ""};
  if (cursor.has("means")) port.means = cursor["means"].text_or("");
  if (cursor.has("largest")) port.largest = cursor["largest"].integer(0, LARGEST);
  if (port.dtype != "int64" && port.dtype != "fp32" && port.dtype != "float")
    cursor["dtype"].refuse("int64, fp32 or float");
  if (port.largest >= 0 && port.dtype != "int64") cursor["dtype"].refuse("int64, beside a largest value");
  if (port.shape.empty() || port.shape[0].axis != "batch") cursor["shape"].refuse("a shape that begins with batch");
  const bool of_rows = port.name == "timestep" || port.name == "step";
  if (of_rows && port.shape.size() != 1) cursor["shape"].refuse("one number for each row");
  if (port.name == "step" && port.dtype != "int64") cursor["dtype"].refuse("int64");
  return port;
}

Axis axis_of(const Cursor& cursor) {
  Axis axis{cursor["min"].integer(1, LARGEST), cursor["opt"].integer(1, LARGEST), cursor["max"].integer(1, LARGEST),
            cursor["multiple"].integer(1, LARGEST)};
  if (axis.min > axis.opt || axis.opt > axis.max) cursor.refuse("a range");
  return axis;
}

void check_axes(const std::vector<Dimension>& shape, const Info& info, const Cursor& cursor) {
  for (const Dimension& dimension : shape)
    if (!dimension.axis.empty() && !info.axes.count(dimension.axis))
      damaged(cursor.path() + ".axes: lacks '" + dimension.axis + "'");
}

std::map<std::string, std::string> texts_of(const Cursor& cursor) {
  std::map<std::string, std::string> texts;
  for (const auto& [key, value] : cursor.members()) texts[key] = value.text();
  return texts;
}

std::map<std::string, std::string> entries_of(const Cursor& cursor) {
  for (const auto& [key, value] : cursor.members())
    if (!SESSION_ENTRIES.count(key)) damaged(cursor.path() + ": '" + key + "' is nothing that engines are recorded with");
  return texts_of(cursor);
}

SessionInfo session_of(const Cursor& cursor) {
  SessionInfo session;
  for (const Cursor& name : cursor["disabled_optimizers"].items()) session.disabled_optimizers.push_back(name.text());
  session.config = entries_of(cursor["config"]);
  session.config_if_sums_saturate = entries_of(cursor["config_if_sums_saturate"]);
  session.config_if_shared = entries_of(cursor["config_if_shared"]);
  session.codebook_ops = cursor["codebook_ops"].boolean();
  return session;
}

StepInput step_input_of(const Cursor& cursor) {
  const std::string name = cursor.text_or("none");
  if (name == "index") return StepInput::index;
  if (name == "row") return StepInput::row;
  if (name != "none") cursor.refuse("null, index or row");
  return StepInput::none;
}

EngineInfo engine_of(const std::string& name, const Cursor& cursor) {
  EngineInfo engine;
  engine.name = name;
  engine.folder = file_name(cursor["folder"]);
  engine.file = file_name(cursor["file"]);
  engine.backend = cursor["backend"].text();
  engine.gpu = cursor["gpu"].text_or("");
  engine.dtype = cursor["dtype"].text();
  engine.decode = cursor["decode"].text_or("");
  engine.weight_bytes = cursor["weight_bytes"].integer(0, INT64_MAX);
  engine.resident_weight_bytes = cursor["resident_weight_bytes"].integer(0, INT64_MAX);
  engine.step_input = step_input_of(cursor["step_input"]);
  if (!cursor["session"].null()) engine.session = session_of(cursor["session"]);
  return engine;
}

float fp32(const Cursor& cursor) {
  const double value = cursor.number();
  if (std::abs(value) > std::numeric_limits<float>::max()) cursor.refuse("a number that fp32 holds");
  return static_cast<float>(value);
}

Portable portable_of(const Cursor& cursor) {
  Portable portable;
  if (!cursor["clip"].null()) portable.clip = fp32(cursor["clip"]);
  for (const Cursor& step : cursor["steps"].items())
    portable.steps.push_back({fp32(step["scale_input"]), fp32(step["x0_latent"]), fp32(step["x0_prediction"]),
                              fp32(step["next_x0"]), fp32(step["next_latent"]), fp32(step["next_prediction"])});
  return portable;
}

std::vector<double> numbers_of(const Cursor& cursor) {
  constexpr double LARGEST_TIMESTEP = 1e15;  // a whole number in every type that timesteps are fed in
  std::vector<double> numbers;
  for (const Cursor& value : cursor.items()) {
    numbers.push_back(value.number());
    if (std::abs(numbers.back()) > LARGEST_TIMESTEP) value.refuse("a timestep");
  }
  if (numbers.empty() || numbers.size() > MOST_STEPS) cursor.refuse("a schedule");
  return numbers;
}

SamplerInfo sampler_of(const Cursor& cursor) {
  SamplerInfo sampler;
  sampler.steps = cursor["steps"].integer(1, MOST_STEPS);
  sampler.guidance_scale = fp32(cursor["guidance_scale"]);
  sampler.guided = cursor["guided"].boolean();
  const Cursor latent = cursor["latent"];
  sampler.latent = latent["input"].text();
  sampler.shape = shape_of(latent["shape"]);
  sampler.init_noise_sigma = fp32(latent["init_noise_sigma"]);
  sampler.pixels = latent["pixels"].boolean();
  sampler.schedule = numbers_of(cursor["schedule"]);
  sampler.timesteps = numbers_of(cursor["timesteps"]);
  if (!cursor["portable"].null()) sampler.portable = portable_of(cursor["portable"]);
  if (cursor.has("why_not_portable")) sampler.why_not_portable = cursor["why_not_portable"].text_or("");
  if (sampler.shape.empty()) latent["shape"].refuse("the shape of a latent");
  if (static_cast<std::int64_t>(sampler.timesteps.size()) != sampler.steps)
    cursor["timesteps"].refuse("as many as its steps");
  if (sampler.portable && sampler.portable->steps.size() != sampler.timesteps.size())
    cursor["portable"]["steps"].refuse("as long as the timesteps");
  return sampler;
}

std::map<std::string, double> limits_of(const Cursor& cursor) {
  std::map<std::string, double> limits;
  for (const auto& [dtype, limit] : cursor.members()) limits[dtype] = limit.number();
  return limits;
}

PictureInfo picture_of(const Cursor& cursor) {
  return {cursor["runner"].text(), cursor["count"].integer(1, LARGEST), limits_of(cursor["limits_db"]),
          cursor["peak"].number()};
}

std::int64_t step_number(const std::string& text, const Cursor& cursor) {
  constexpr std::size_t LONGEST = 9;
  const bool good =
      !text.empty() && text.size() <= LONGEST && text.find_first_not_of("0123456789") == std::string::npos;
  if (!good) cursor.refuse("the limit of a step");
  return std::stoll(text);
}

GoldenInfo golden_of(const Cursor& cursor) {
  GoldenInfo golden;
  for (const Cursor& step : cursor["steps"].items()) golden.steps.push_back(step.integer(0, MOST_STEPS));
  if (golden.steps.empty()) cursor["steps"].refuse("a list of steps: an engine would be tested on none");
  for (const auto& [dtype, limits] : cursor["limits_db"].members())
    for (const auto& [step, limit] : limits.members())
      golden.limits_db[dtype][step_number(step, limit)] = limit.number();
  if (!cursor["picture"].null()) golden.picture = picture_of(cursor["picture"]);
  return golden;
}

std::map<std::string, std::string> files_by_dtype(const Cursor& cursor) {
  std::map<std::string, std::string> files;
  for (const auto& [dtype, file] : cursor.members()) files[dtype] = file_name(file);
  return files;
}

std::optional<std::int64_t> token_of(const Cursor& cursor) {
  if (cursor.null()) return std::nullopt;
  return cursor.integer(0, LARGEST);
}

TokensInfo tokens_of(const Cursor& cursor) {
  constexpr std::int64_t MOST_TOKENS = 1 << 16;
  return {file_name(cursor["tokenizer"]), cursor["input"].text(),  cursor["tokens"].integer(1, MOST_TOKENS),
          token_of(cursor["pad"]),        token_of(cursor["bos"]), token_of(cursor["eos"])};
}

TextInfo text_of(const Cursor& cursor) {
  TextInfo text;
  text.inputs.push_back(tokens_of(cursor));
  for (const Cursor& more : cursor["more"].items()) text.inputs.push_back(tokens_of(more));
  text.encoders = files_by_dtype(cursor["encoders"]);
  text.outputs = texts_of(cursor["outputs"]);
  const std::string& unwanted = cursor["unwanted"].text();
  if (unwanted != "caption" && unwanted != "zeros") cursor["unwanted"].refuse("caption or zeros");
  text.unwanted_is_zeros = unwanted == "zeros";
  text.limits_db = limits_of(cursor["limits_db"]);
  return text;
}

VaeInfo vae_of(const Cursor& cursor) {
  const Cursor shift = cursor["shift_factor"];
  VaeInfo vae{files_by_dtype(cursor["decoders"]),
              cursor["input"].text(),
              cursor["output"].text(),
              fp32(cursor["scaling_factor"]),
              shift.null() ? 0.0f : fp32(shift),
              limits_of(cursor["limits_db"])};
  if (vae.scaling_factor == 0) cursor["scaling_factor"].refuse("a number to divide by");
  return vae;
}

PipelineInfo pipeline_of(const Cursor& cursor) {
  PipelineInfo pipeline{text_of(cursor["text"]), {}, {}};
  for (const auto& [name, row] : cursor["constants"].members())
    for (const Cursor& value : row.items()) pipeline.constants[name].push_back(fp32(value));
  if (!cursor["vae"].null()) pipeline.vae = vae_of(cursor["vae"]);
  return pipeline;
}

void check_names(const Info& info, const Cursor& cursor) {
  std::set<std::string> names;
  for (const Port& input : info.inputs) {
    check_axes(input.shape, info, cursor);
    if (!names.insert(input.name).second) damaged(cursor.path() + ".inputs: '" + input.name + "' stands there twice");
  }
  check_axes(info.output.shape, info, cursor);
  if (!info.axes.count("batch")) damaged(cursor.path() + ".axes: lacks 'batch'");
  if (!info.sampler) return;
  check_axes(info.sampler->shape, info, cursor);
  if (!names.count(info.sampler->latent))
    damaged(cursor.path() + ".sampler.latent: '" + info.sampler->latent + "' is no input");
}

}  // namespace

Info info_of(const Cursor& cursor) {
  Info info;
  info.format_version = cursor["format_version"].integer(1, INT64_MAX);
  info.model = cursor["model"]["name"].text();
  info.model_class = cursor["model"]["class"].text();
  info.recipe = cursor["recipe"]["name"].text();
  info.recipe_digest = cursor["recipe"]["digest"].text();
  for (const Cursor& input : cursor["inputs"].items()) info.inputs.push_back(port_of(input));
  info.output = port_of(cursor["output"]);
  for (const auto& [name, axis] : cursor["axes"].members()) info.axes[name] = axis_of(axis);
  if (!cursor["sampler"].null()) info.sampler = sampler_of(cursor["sampler"]);
  for (const auto& [name, engine] : cursor["engines"].members()) info.engines[name] = engine_of(name, engine);
  info.golden = golden_of(cursor["golden"]);
  if (!cursor["pipeline"].null()) info.pipeline = pipeline_of(cursor["pipeline"]);
  check_names(info, cursor);
  return info;
}

}  // namespace export_engine::detail
