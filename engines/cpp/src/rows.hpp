// Rows of tensors: some of them, and one after the other.
#pragma once

#include "export_engine/tensor.hpp"

namespace export_engine::detail {

// Returns a view of the rows [first, last).
Tensor rows_of(const Tensor& tensor, std::int64_t first, std::int64_t last);
Feeds rows_of(const Feeds& feeds, std::int64_t first, std::int64_t last);

// Returns, for each name, the rows of `above` and then those of `below`; refuses those that do not fit together.
Arrays stacked(const Feeds& above, const Feeds& below);

// Returns one row, again and again.
Array repeated(const Tensor& row, std::int64_t count);

// Returns parts, one after the other; refuses those whose rows differ.
Array concatenated(const std::vector<Array>& parts);

}  // namespace export_engine::detail
