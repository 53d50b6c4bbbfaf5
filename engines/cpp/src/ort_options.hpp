// Session options under which ONNX Runtime computes what a graph says.
#pragma once

#include "ort_api.hpp"
#include "session.hpp"

namespace export_engine::detail {

Owned<OrtSessionOptions> ort_options(const SessionRequest& request);

}  // namespace export_engine::detail
