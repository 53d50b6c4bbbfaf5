// Which other files an ONNX file reads.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace export_engine::detail {

// Returns the `location` of every tensor that lies outside the file; refuses what is no protobuf.
std::set<std::string> external_files(std::string_view onnx, const std::string& where);

}  // namespace export_engine::detail
