#!/usr/bin/env bash
# Puts ONNX Runtime's C++ headers, of Debian's package libonnxruntime-dev, into build/ort-headers: the native kernels
# need them, and the Python package of ONNX Runtime has none. Debian has the package from trixie on; headers fit any
# release, so an older one takes them from there, by the mirror it already uses, and nothing is installed. Without apt,
# or where that fails, it says so, and the install goes on without native kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$PWD/build/ort-headers
header=onnxruntime/onnxruntime_cxx_api.h
if [ -n "${EXPORT_ENGINE_ORT_INCLUDE:-}" ] || [ -e "/usr/include/$header" ] || [ -e "$target/usr/include/$header" ]; then
  exit 0
fi

fetch() {
  local state mirror
  state=$(mktemp -d)
  trap 'rm -rf "$state"' RETURN
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -v release="$(. /etc/os-release && echo "$VERSION_CODENAME")" '$2 == release && $3 == "main" { print $1; exit }')
  [ -n "$mirror" ] || return 1
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$state/sources.list"
  local options=(-qq -o "Dir::Etc::SourceList=$state/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$state/lists" -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update || return 1
  (cd "$state" && apt-get "${options[@]}" download libonnxruntime-dev) || return 1
  mkdir -p "$target"
  dpkg-deb -x "$state"/libonnxruntime-dev_*.deb "$target"
}

if ! command -v apt-get > /dev/null || ! fetch; then
  echo "note: no ONNX Runtime headers (libonnxruntime-dev of Debian trixie), so no native kernels: the portable path" \
    "will run. Set EXPORT_ENGINE_ORT_INCLUDE to a folder that holds onnxruntime_cxx_api.h to build them." >&2
fi
