// Feeds in the types that a session wants, and outputs as fp32.
#pragma once

#include <deque>

#include "session.hpp"

namespace export_engine::detail {

// Tensors converted for one call: it owns what had to be, and hands the rest on as it is.
class Converted {
 public:
  Tensor to(const Tensor& tensor, DType dtype, const std::string& name);

 private:
  std::deque<Array> made_;  // whose elements stay where they are
};

// Returns an fp16 array as fp32, and any other itself.
Array widened(Array array);

// Picks and converts a session's inputs out of named tensors.
std::vector<Fed> fed(const Session& session, const Feeds& feeds, Converted& converted);

}  // namespace export_engine::detail
