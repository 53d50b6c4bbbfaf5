// Draws the digits 0 … 9 with a bundle of digits-dit: draw_digits BUNDLE OUT.png [SEED]
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "export_engine/export_engine.hpp"

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>

namespace ee = export_engine;

static int failed(const ee::Status& status) {
  std::fprintf(stderr, "error: %s\n", status.text().c_str());
  return 2;
}

// Returns the seed that a text gives, or nothing where it is no whole number that the generator takes.
static std::optional<std::uint32_t> seed_of(const std::string& text) {
  std::uint32_t seed = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seed);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return seed;
}

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: draw_digits BUNDLE OUT.png [SEED]\n"), 2;
  const auto seed = seed_of(argc > 3 ? argv[3] : "0");
  if (!seed)
    return std::fprintf(stderr, "error: seed %s: no whole number of 0 … 4294967295\n  fix: give one\n", argv[3]), 2;
  auto bundle = ee::Bundle::open(argv[1]);
  if (!bundle) return failed(bundle.status());
  auto engine = ee::Engine::open(*bundle);
  if (!engine) return failed(engine.status());
  auto sampler = ee::Sampler::open(*engine);
  if (!sampler) return failed(sampler.status());

  constexpr std::int64_t DIGITS = 10, SIDE = 8, SCALE = 8;
  std::mt19937 generator(*seed);
  std::normal_distribution<float> normal;
  std::vector<float> noise(DIGITS * SIDE * SIDE);
  for (float& value : noise) value = normal(generator);
  std::vector<std::int64_t> labels(DIGITS);
  for (std::int64_t digit = 0; digit < DIGITS; ++digit) labels[static_cast<std::size_t>(digit)] = digit;

  const auto rows = ee::Tensor::of(noise.data(), {DIGITS, 1, SIDE, SIDE});
  auto digits = sampler->sample(rows, {{"class_labels", ee::Tensor::of(labels.data(), {DIGITS})}});
  if (!digits) return failed(digits.status());

  // Pictures are in [−1, 1], ink bright: one row of digits, each pixel a square.
  constexpr std::int64_t WIDTH = DIGITS * SIDE * SCALE, HEIGHT = SIDE * SCALE;
  std::vector<unsigned char> pixels(WIDTH * HEIGHT);
  for (std::int64_t y = 0; y < HEIGHT; ++y)
    for (std::int64_t x = 0; x < WIDTH; ++x) {
      const std::int64_t digit = x / (SIDE * SCALE), column = x / SCALE % SIDE, row = y / SCALE;
      const float value = digits->floats()[(digit * SIDE + row) * SIDE + column];
      const float grey = std::round(std::clamp(value * 0.5f + 0.5f, 0.0f, 1.0f) * 255);
      pixels[static_cast<std::size_t>(y * WIDTH + x)] = static_cast<unsigned char>(grey);
    }
  if (!stbi_write_png(argv[2], WIDTH, HEIGHT, 1, pixels.data(), WIDTH))
    return std::fprintf(stderr, "error: %s: cannot be written\n  fix: name another file\n", argv[2]), 2;
  std::printf("%s: the digits 0 … 9, by %s\n", argv[2], engine->info().name.c_str());
}
