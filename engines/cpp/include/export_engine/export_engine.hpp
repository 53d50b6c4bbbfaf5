// All of the C++ library in one header.
#pragma once

#include "export_engine/bundle.hpp"    // IWYU pragma: export
#include "export_engine/engine.hpp"    // IWYU pragma: export
#include "export_engine/pipeline.hpp"  // IWYU pragma: export
#include "export_engine/sampler.hpp"   // IWYU pragma: export
