#include "arrays.hpp"
#include "fuzz.hpp"

static void load(std::string_view bytes) { export_engine::detail::parse_safetensors(bytes, "input"); }

FUZZ(load)
