#include "sha256.hpp"

#include <openssl/evp.h>

#include "fault.hpp"

namespace export_engine::detail {
namespace {

void check(bool well) {
  if (!well) throw Fault(Code::runtime, "OpenSSL has no SHA-256 here", "check OpenSSL's configuration (openssl.cnf)");
}

}  // namespace

void Sha256::Free::operator()(evp_md_ctx_st* context) const { EVP_MD_CTX_free(context); }

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  check(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr));
}

void Sha256::add(const void* data, std::size_t bytes) { check(EVP_DigestUpdate(context_.get(), data, bytes)); }

std::string Sha256::hex() {
  unsigned char digest[32];
  check(EVP_DigestFinal_ex(context_.get(), digest, nullptr));
  std::string text;
  for (const unsigned char byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

}  // namespace export_engine::detail
