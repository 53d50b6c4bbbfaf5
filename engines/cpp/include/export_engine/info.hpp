// What a bundle's manifest says, as docs/bundle.md describes it; `Bundle::manifest()` has the whole text.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace export_engine {

struct Axis {
  std::int64_t min = 1, opt = 1, max = 1, multiple = 1;
};

// A size, or the name of the axis that gives it.
struct Dimension {
  std::int64_t size = 0;
  std::string axis;
};

struct Port {
  std::string name, dtype;  // dtype is int64, fp32, or float: the engine's own, which is converted to
  std::vector<Dimension> shape;
  std::string means;  // what is fed, and in which unit
  std::int64_t largest = -1;  // of whole numbers that look something up, from 0; -1: any
};

// Options under which ONNX Runtime computes what the graph says.
struct SessionInfo {
  std::vector<std::string> disabled_optimizers;
  std::map<std::string, std::string> config, config_if_sums_saturate, config_if_shared;
  bool codebook_ops = false;
};

enum class StepInput { none, index, row };

struct EngineInfo {
  std::string name, folder, file, backend, gpu, dtype, decode;
  std::int64_t weight_bytes = 0, resident_weight_bytes = 0;
  StepInput step_input = StepInput::none;
  std::optional<SessionInfo> session;
};

struct PortableStep {
  float scale_input = 1, x0_latent = 0, x0_prediction = 0, next_x0 = 0, next_latent = 0, next_prediction = 0;
};

struct Portable {
  std::optional<float> clip;
  std::vector<PortableStep> steps;
};

struct SamplerInfo {
  std::int64_t steps = 0;
  float guidance_scale = 1;
  bool guided = false;
  std::string latent;            // the input that takes it
  std::vector<Dimension> shape;  // of one latent
  float init_noise_sigma = 1;
  bool pixels = false;            // whether finished latents are pictures in [−1, 1]
  std::vector<double> schedule;   // the scheduler's timesteps
  std::vector<double> timesteps;  // what the input `timestep` is fed at each step
  std::optional<Portable> portable;
  std::string why_not_portable;
};

struct PictureInfo {
  std::string runner;
  std::int64_t count = 0;
  std::map<std::string, double> limits_db;  // by float type
  double peak = 1;
};

struct GoldenInfo {
  std::vector<std::int64_t> steps;
  std::map<std::string, std::map<std::int64_t, double>> limits_db;  // by float type and step
  std::optional<PictureInfo> picture;
};

// Token ids that the text encoder takes, int64 [batch, tokens].
struct TokensInfo {
  std::string tokenizer, input;  // the tokenizer's file, and the encoder's input
  std::int64_t tokens = 0;
  std::optional<std::int64_t> pad, bos, eos;
};

struct TextInfo {
  std::vector<TokensInfo> inputs;               // of the same captions: one, or SDXL's two
  std::map<std::string, std::string> encoders;  // float type → file
  std::map<std::string, std::string> outputs;   // the graph's output → the denoiser's input
  bool unwanted_is_zeros = false;               // what guidance goes away from: zeros, or the empty caption
  std::map<std::string, double> limits_db;      // by float type, as a picture's
};

struct VaeInfo {
  std::map<std::string, std::string> decoders;
  std::string input, output;
  float scaling_factor = 1, shift_factor = 0;
  std::map<std::string, double> limits_db;
};

struct PipelineInfo {
  TextInfo text;
  std::map<std::string, std::vector<float>> constants;  // further inputs of the denoiser → a row, for every caption
  std::optional<VaeInfo> vae;
};

struct Info {
  std::int64_t format_version = 0;
  std::string model, model_class, recipe, recipe_digest;
  std::vector<Port> inputs;
  Port output;
  std::map<std::string, Axis> axes;
  std::optional<SamplerInfo> sampler;
  std::map<std::string, EngineInfo> engines;
  GoldenInfo golden;
  std::optional<PipelineInfo> pipeline;
};

}  // namespace export_engine
