// A program that has nothing but the installed package.
#include <cstdio>
#include <export_engine/export_engine.hpp>

int main(int argc, char** argv) {
  auto bundle = export_engine::Bundle::open(argc > 1 ? argv[1] : "");
  if (!bundle) return std::puts(bundle.status().text().c_str()), 1;
  std::printf("%s\n", bundle->info().model.c_str());
}
