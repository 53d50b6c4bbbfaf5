// A verified bundle: a folder or a zip that `export-engine bundle` wrote.
#pragma once

#include <memory>
#include <string>

#include "export_engine/export.hpp"
#include "export_engine/info.hpp"
#include "export_engine/status.hpp"
#include "export_engine/tensor.hpp"

namespace export_engine {

struct BundleOptions {
  int threads = 0;               // that read and hash files; 0: as many as there are cores, at most 8
  std::string temporary_folder;  // where a zip is unpacked; empty: the system's
};

// Copies share what was opened; the last one to go removes what a zip was unpacked into.
class EXPORT_ENGINE_API Bundle {
 public:
  // Reads the manifest and checks every file's size and sha256; refuses one that is unlisted, missing or changed.
  static Result<Bundle> open(const std::string& path, const BundleOptions& options = {}) noexcept;

  const Info& info() const noexcept;
  const std::string& manifest() const noexcept;  // its JSON, as it lies in the file

  // Reads golden.safetensors: recorded feeds and expected outputs, noise, finished samples.
  Result<Arrays> golden() const noexcept;

  // Returns where a file of the manifest lies, e.g. a tokenizer's.
  Result<std::string> file(const std::string& name) const noexcept;

  struct Impl;
  explicit Bundle(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  const Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<const Impl> impl_;
};

}  // namespace export_engine
