// Opens each path as a bundle, and its best engine, and prints a line for each: the code and the message, or "opened".
#include <cstdio>

#include "export_engine/export_engine.hpp"

namespace {

export_engine::Status status_of(const char* path) {
  auto bundle = export_engine::Bundle::open(path);
  if (!bundle) return bundle.status();
  return export_engine::Engine::open(*bundle).status();
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const export_engine::Status status = status_of(argv[i]);
    if (status.ok())
      std::printf("opened\n");
    else
      std::printf("%d %s | %s\n", static_cast<int>(status.code()), status.message().c_str(), status.fix().c_str());
  }
}
