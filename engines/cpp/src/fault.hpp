// Inside the library a fault is thrown; each public call turns it into a status.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include "export_engine/status.hpp"

namespace export_engine::detail {

class Fault : public std::exception {
 public:
  Fault(Code code, std::string message, std::string fix) : status(code, std::move(message), std::move(fix)) {}
  const char* what() const noexcept override { return status.message().c_str(); }

  const Status status;
};

inline const char* const GET_AGAIN =
    "do not use it: it was damaged or tampered with; get the bundle, or make it, again";

[[noreturn]] inline void damaged(std::string message) { throw Fault(Code::damaged, std::move(message), GET_AGAIN); }

// Returns a result's value, or throws its status.
template <class T>
T taken(Result<T> result) {
  if (!result.ok()) throw Fault(result.status().code(), result.status().message(), result.status().fix());
  return std::move(result).value();
}

// Does the work of a public call, and returns its status, or its result.
template <class Work>
auto guarded(Work&& work) noexcept {
  using Value = decltype(work());
  using Outcome = typename std::conditional_t<
      std::is_void_v<Value>, std::common_type<Status>,
      std::common_type<Result<std::conditional_t<std::is_void_v<Value>, int, Value>>>>::type;
  try {
    if constexpr (std::is_void_v<Value>) {
      work();
      return Outcome();
    } else {
      return Outcome(work());
    }
  } catch (const Fault& fault) {
    return Outcome(fault.status);
  } catch (const std::bad_alloc&) {
    return Outcome(Status(Code::memory, "out of memory", "free some, or draw fewer samples at once"));
  } catch (const std::exception& error) {
    return Outcome(Status(Code::internal, error.what(), "report this with the call that led to it"));
  }
}

}  // namespace export_engine::detail
