// A bundle as one file.
#pragma once

#include <string>

namespace export_engine::detail {

// Checks a zip's own digest and its entries, and unpacks them into `folder`.
void unpack(const std::string& path, const std::string& folder);

}  // namespace export_engine::detail
