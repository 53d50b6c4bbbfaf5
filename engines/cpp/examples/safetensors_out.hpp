// Writes arrays as a safetensors file.
#pragma once

#include <string>

#include "export_engine/tensor.hpp"

// Returns whether all was written.
bool write_safetensors(const std::string& path, const export_engine::Arrays& arrays);
