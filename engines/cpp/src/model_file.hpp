// Graphs of a bundle, checked before a backend reads them.
#pragma once

#include <string>

#include "bundle_impl.hpp"

namespace export_engine::detail {

// Returns the path of a listed ONNX file; refuses one whose external data are not listed files beside it.
std::string checked_onnx(const Bundle::Impl& bundle, const std::string& name);

}  // namespace export_engine::detail
