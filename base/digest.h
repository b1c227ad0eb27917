// SHA-256 for what Pewter writes, CRC32C for what it reads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace pewter {

// Incremental SHA-256 (OpenSSL, which uses the SHA instructions where there are some). Not
// thread-safe.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;

  void Update(absl::Span<const std::byte> bytes);
  void Update(absl::string_view text);
  // 64 lower-case hex digits. The object must not be used afterwards.
  std::string Finish();

  static std::string Of(absl::string_view text);

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

// CRC32C (Castagnoli) of `bytes` appended to what `crc` covers; start with 0.
uint32_t Crc32c(absl::Span<const std::byte> bytes, uint32_t crc = 0);
// What appending `length` bytes does to a CRC: shift(crc_a) ^ crc_b is the CRC32C of A followed by
// B of that length. So ranges that were read in any order give the digest of the whole. Making one
// costs microseconds, using it nanoseconds.
class Crc32cShift {
 public:
  explicit Crc32cShift(int64_t length);
  uint32_t operator()(uint32_t crc) const;

 private:
  std::array<uint32_t, 32> columns_;  // a linear map over GF(2): the image of each bit
};

// CRC32C of A followed by B, from theirs.
inline uint32_t Crc32cConcat(uint32_t crc_a, uint32_t crc_b, int64_t length_b) {
  return Crc32cShift(length_b)(crc_a) ^ crc_b;
}

}  // namespace pewter
