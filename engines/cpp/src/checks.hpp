// Feeds against what the bundle says an engine takes.
#pragma once

#include <map>
#include <string>

#include "export_engine/engine.hpp"

namespace export_engine::detail {

using Sizes = std::map<std::string, std::int64_t>;  // of axes

// Returns the axes' sizes; refuses an input that is missing, unknown or of another type, and sizes out of range.
Sizes check_feeds(const Info& info, const EngineInfo& engine, const Feeds& feeds);

// Returns a shape's numbers.
Shape resolved(const std::vector<Dimension>& shape, const Sizes& sizes);

}  // namespace export_engine::detail
