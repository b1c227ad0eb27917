#include "base/nearest.h"

#include <gtest/gtest.h>

#include <vector>

namespace pewter {
namespace {

const std::vector<std::string> kNames = {"dare_linear", "dare_ties", "linear", "slerp", "ties"};

TEST(NearestTest, FindsSlips) {
  EXPECT_EQ(NearestName("dare-ties", kNames), "dare_ties");
  EXPECT_EQ(NearestName("tise", kNames),
            "");  // a transposition is two edits, too many for four letters
  EXPECT_EQ(NearestName("linea", kNames), "linear");
  EXPECT_EQ(DidYouMean("slerpp", kNames), "; did you mean \"slerp\"?");
}

TEST(NearestTest, SaysNothingWhenNothingIsNear) {
  EXPECT_EQ(DidYouMean("evolve", kNames), "");
  EXPECT_EQ(DidYouMean(std::string(100000, 'x'), kNames), "");
}

}  // namespace
}  // namespace pewter
