#include "base/units.h"

#include <gtest/gtest.h>

namespace pewter {
namespace {

TEST(ParseBytesTest, AcceptsWhatPeopleWrite) {
  EXPECT_EQ(*ParseBytes("4096"), 4096);
  EXPECT_EQ(*ParseBytes("4GiB"), int64_t{4} << 30);
  EXPECT_EQ(*ParseBytes("512 MiB"), int64_t{512} << 20);
  EXPECT_EQ(*ParseBytes("5GB"), 5'000'000'000);
  EXPECT_EQ(*ParseBytes("1.5G"), 1'500'000'000);
  EXPECT_EQ(*ParseBytes("60K"), 60'000);
  EXPECT_EQ(*ParseBytes("12b"), 12);
}

TEST(ParseBytesTest, RefusesTheRest) {
  for (const char* bad : {"", "GiB", "4 apples", "-1", "1e30T", "4i", "4GG", "1..5G"}) {
    EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  }
}

TEST(FormatBytesTest, ThreeDigits) {
  EXPECT_EQ(FormatBytes(12), "12 B");
  EXPECT_EQ(FormatBytes(int64_t{3} << 29), "1.5 GiB");
  EXPECT_EQ(FormatBytes(int64_t{730} << 10), "730 KiB");
}

TEST(CheckedTest, Overflow) {
  EXPECT_FALSE(CheckedMul(int64_t{1} << 40, int64_t{1} << 40).ok());
  EXPECT_FALSE(CheckedAdd(INT64_MAX, 1).ok());
  EXPECT_EQ(*CheckedMul(6, 7), 42);
}

}  // namespace
}  // namespace pewter
