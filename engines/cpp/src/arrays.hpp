// Arrays in files: .safetensors and .npy.
#pragma once

#include <string>
#include <string_view>

#include "export_engine/tensor.hpp"

namespace export_engine::detail {

// Both take a file's bytes; `where` names it in messages.
Arrays parse_safetensors(std::string_view bytes, const std::string& where);
Array parse_npy(std::string_view bytes, const std::string& where);  // fp32 and of rows: [steps, n]

}  // namespace export_engine::detail
