// SHA-256, streaming.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

struct evp_md_ctx_st;

namespace export_engine::detail {

class Sha256 {
 public:
  Sha256();
  void add(const void* data, std::size_t bytes);
  std::string hex();  // once, at the end

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
};

}  // namespace export_engine::detail
