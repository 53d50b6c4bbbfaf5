// A manifest's info without its digest, which no fuzzer would guess.
#include "fuzz.hpp"
#include "info.hpp"

static void load(std::string_view bytes) {
  const export_engine::detail::Json json = export_engine::detail::parse_json(bytes, "input");
  export_engine::detail::info_of(export_engine::detail::Cursor(json, "input"));
}

FUZZ(load)
