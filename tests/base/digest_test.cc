#include "base/digest.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>

namespace pewter {
namespace {

absl::Span<const std::byte> Bytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// FIPS 180-2 test vectors.
TEST(Sha256Test, KnownAnswers) {
  EXPECT_EQ(Sha256::Of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256::Of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST(Sha256Test, PiecesGiveTheDigestOfTheWhole) {
  Sha256 sha;
  sha.Update("a");
  sha.Update(Bytes("bc"));
  EXPECT_EQ(sha.Finish(), Sha256::Of("abc"));
}

// RFC 3720, appendix B.4.
TEST(Crc32cTest, KnownAnswers) {
  EXPECT_EQ(Crc32c(Bytes("123456789")), 0xE3069283u);
  EXPECT_EQ(Crc32c(Bytes(std::string(32, '\0'))), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(Bytes(std::string(32, '\xff'))), 0x62A8AB43u);
  EXPECT_EQ(Crc32c({}), 0u);
}

TEST(Crc32cTest, ContinuesFromAnEarlierPart) {
  EXPECT_EQ(Crc32c(Bytes("6789"), Crc32c(Bytes("12345"))), 0xE3069283u);
}

TEST(Crc32cTest, ConcatIsTheDigestOfTheWholeAtEverySplit) {
  std::string text;
  for (int i = 0; i < 300; ++i) text.push_back(static_cast<char>(i * 37));
  for (size_t split = 0; split <= text.size(); split += 7) {
    const std::string a = text.substr(0, split), b = text.substr(split);
    EXPECT_EQ(Crc32cConcat(Crc32c(Bytes(a)), Crc32c(Bytes(b)), static_cast<int64_t>(b.size())),
              Crc32c(Bytes(text)))
        << split;
  }
}

}  // namespace
}  // namespace pewter
