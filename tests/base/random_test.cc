#include "base/random.h"

#include <gtest/gtest.h>

namespace pewter {
namespace {

// Random123's known answers for philox4x32-10 use 128-bit counters; ours sets the upper half to 0.
TEST(PhiloxTest, ZeroKeyZeroCounter) {
  uint32_t words[4];
  PhiloxBlock({0, 0}, 0, 0, words);
  EXPECT_EQ(words[0], 0x6627e8d5u);
  EXPECT_EQ(words[1], 0xe169c58du);
  EXPECT_EQ(words[2], 0xbc57ac4cu);
  EXPECT_EQ(words[3], 0x9b00dbd8u);
}

TEST(PhiloxTest, ElementsTakeTheHalvesOfTheirBlocks) {
  const PhiloxKey key = MakePhiloxKey(7, "layer");
  uint32_t upper[4], lower[4];
  PhiloxBlock(key, 125, 0, upper);
  PhiloxBlock(key, 125, 1, lower);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(PhiloxWord(key, 1000 + 2 * i), upper[i] << 16 | (lower[i] & 0xffff));
    EXPECT_EQ(PhiloxWord(key, 1001 + 2 * i), (upper[i] & 0xffff0000) | lower[i] >> 16);
  }
}

TEST(PhiloxTest, KeysDependOnSeedAndName) {
  const PhiloxKey a = MakePhiloxKey(1, "x#0");
  for (const PhiloxKey b :
       {MakePhiloxKey(2, "x#0"), MakePhiloxKey(1, "x#1"), MakePhiloxKey(1, "")}) {
    EXPECT_FALSE(a.k0 == b.k0 && a.k1 == b.k1);
  }
}

}  // namespace
}  // namespace pewter
