#include "fuzz.hpp"
#include "json.hpp"

static void load(std::string_view bytes) { export_engine::detail::parse_json(bytes, "input"); }

FUZZ(load)
