#pragma once

#include <memory>
#include <string>

#include "export_engine/bundle.hpp"
#include "files.hpp"
#include "manifest.hpp"

namespace export_engine {

struct Bundle::Impl {
  std::unique_ptr<detail::TemporaryFolder> unpacked;  // of a zip
  std::string folder, text;
  detail::Manifest manifest;

  // Returns where a listed file lies; refuses any other name.
  std::string path(const std::string& name) const;
};

}  // namespace export_engine
