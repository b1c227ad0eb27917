#include "base/digest.h"

#include <isa-l/crc.h>
#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "absl/strings/escaping.h"

namespace pewter {

struct Sha256::Context {
  EVP_MD_CTX* md = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(md); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  if (context_->md == nullptr || EVP_DigestInit_ex(context_->md, EVP_sha256(), nullptr) != 1)
    std::abort();
}
Sha256::~Sha256() = default;
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;

void Sha256::Update(absl::Span<const std::byte> bytes) {
  EVP_DigestUpdate(context_->md, bytes.data(), bytes.size());
}

void Sha256::Update(absl::string_view text) {
  EVP_DigestUpdate(context_->md, text.data(), text.size());
}

std::string Sha256::Finish() {
  std::array<unsigned char, 32> digest;
  EVP_DigestFinal_ex(context_->md, digest.data(), nullptr);
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size()));
}

std::string Sha256::Of(absl::string_view text) {
  Sha256 sha;
  sha.Update(text);
  return sha.Finish();
}

uint32_t Crc32c(absl::Span<const std::byte> bytes, uint32_t crc) {
  // ISA-L takes an int length and leaves the customary inversions to the caller.
  constexpr size_t kMaxRun = size_t{1} << 30;
  while (!bytes.empty()) {
    absl::Span<const std::byte> run = bytes.subspan(0, std::min(bytes.size(), kMaxRun));
    crc =
        ~crc32_iscsi(const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(run.data())),
                     static_cast<int>(run.size()), ~crc);
    bytes.remove_prefix(run.size());
  }
  return crc;
}

namespace {

// A linear map on CRC registers over GF(2): column i is the image of bit i.
using Gf2Matrix = std::array<uint32_t, 32>;

uint32_t Apply(const Gf2Matrix& matrix, uint32_t vector) {
  uint32_t result = 0;
  for (int bit = 0; vector != 0; vector >>= 1, ++bit) {
    if (vector & 1) result ^= matrix[bit];
  }
  return result;
}

Gf2Matrix Square(const Gf2Matrix& matrix) {
  Gf2Matrix squared;
  for (int bit = 0; bit < 32; ++bit) squared[bit] = Apply(matrix, matrix[bit]);
  return squared;
}

// What one zero byte does to the register (reflected polynomial 0x82F63B78).
Gf2Matrix ZeroByte() {
  Gf2Matrix one_bit;
  one_bit[0] = 0x82F63B78u;
  for (int bit = 1; bit < 32; ++bit) one_bit[bit] = 1u << (bit - 1);
  return Square(Square(Square(one_bit)));
}

}  // namespace

Crc32cShift::Crc32cShift(int64_t length) {
  for (int bit = 0; bit < 32; ++bit) columns_[bit] = 1u << bit;
  Gf2Matrix zeros = ZeroByte();
  for (uint64_t rest = static_cast<uint64_t>(length); rest != 0; rest >>= 1) {
    if (rest & 1) {
      for (uint32_t& column : columns_) column = Apply(zeros, column);
    }
    zeros = Square(zeros);
  }
}

uint32_t Crc32cShift::operator()(uint32_t crc) const { return Apply(columns_, crc); }

}  // namespace pewter
