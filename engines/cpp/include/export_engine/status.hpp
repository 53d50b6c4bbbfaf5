// How every call ends: well, or with what went wrong, where, and how to mend it. Nothing here throws.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

namespace export_engine {

// The values are those of ee_code in export_engine.h, and stay.
enum class Code {
  ok = 0,
  invalid_argument = 1,  // the call's own arguments: a shape, a name, a step
  not_found = 2,         // a file, an engine or a device that is not there
  damaged = 3,           // the bundle is not what its manifest says, or its manifest is not one
  newer_version = 4,     // the bundle's format, or ONNX Runtime's headers, are newer than what reads them
  unsupported = 5,       // built without it, or the bundle does not have it
  runtime = 6,           // ONNX Runtime, TensorRT or the operating system refused
  memory = 7,            // out of memory
  internal = 8,          // a fault of this library
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message, std::string fix)
      : code_(code), message_(std::move(message)), fix_(std::move(fix)) {}

  bool ok() const { return code_ == Code::ok; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }  // what, where, the value and the limit
  const std::string& fix() const { return fix_; }
  std::string text() const { return ok() ? "ok" : message_ + "\n  fix: " + fix_; }

 private:
  Code code_ = Code::ok;
  std::string message_, fix_;
};

// A value, or the status that says why there is none; taking the value of a failure ends the program.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) {}

  bool ok() const { return value_.has_value(); }
  explicit operator bool() const { return ok(); }
  const Status& status() const { return status_; }

  T& value() & { return checked(); }
  T value() && { return std::move(checked()); }
  T& operator*() { return checked(); }
  T* operator->() { return &checked(); }

 private:
  T& checked() {
    if (!value_) std::abort();
    return *value_;
  }

  std::optional<T> value_;
  Status status_;
};

}  // namespace export_engine
