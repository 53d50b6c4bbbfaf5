#pragma once

#include <memory>
#include <optional>

#include "bundle_impl.hpp"
#include "export_engine/engine.hpp"
#include "session.hpp"
#include "steps.hpp"

namespace export_engine {

struct Engine::Impl {
  Bundle bundle;  // keeps the files there
  const EngineInfo* info;
  std::unique_ptr<detail::Session> session;
  std::optional<detail::Steps> steps;
  DType output;  // the session's own

  // Runs into memory of the output's shape, or into an array that it makes.
  void run(const Feeds& feeds, float* into, const Shape& shape) const;
  Shape check(const Feeds& feeds) const;  // returns the output's shape
};

}  // namespace export_engine
