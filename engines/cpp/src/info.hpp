// Reads `info` of a manifest.
#pragma once

#include "export_engine/info.hpp"
#include "json.hpp"

namespace export_engine::detail {

Info info_of(const Cursor& info);

}  // namespace export_engine::detail
