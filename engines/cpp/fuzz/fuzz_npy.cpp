#include "arrays.hpp"
#include "fuzz.hpp"

static void load(std::string_view bytes) { export_engine::detail::parse_npy(bytes, "input"); }

FUZZ(load)
