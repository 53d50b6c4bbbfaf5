#include "model_file.hpp"

#include "fault.hpp"
#include "onnx.hpp"

namespace export_engine::detail {

std::string checked_onnx(const Bundle::Impl& bundle, const std::string& name) {
  constexpr std::uint64_t MOST = std::uint64_t{2} << 30;  // protobuf's own limit
  const File file(bundle.path(name));
  const std::string folder = name.substr(0, name.find_last_of('/') + 1);
  for (const std::string& data : external_files(file.all(MOST), file.path())) {
    check_name(data, file.path());
    if (!bundle.manifest.files.count(folder + data))
      damaged(file.path() + ": reads the file '" + data + "', which the manifest does not list");
  }
  return file.path();
}

}  // namespace export_engine::detail
