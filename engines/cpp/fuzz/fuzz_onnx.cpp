#include "fuzz.hpp"
#include "onnx.hpp"

static void load(std::string_view bytes) { export_engine::detail::external_files(bytes, "input"); }

FUZZ(load)
