#include "client/plan_report.h"

#include "gtest/gtest.h"

namespace pewter::client {
namespace {

TEST(NamePatternTest, NumbersBecomeStars) {
  EXPECT_EQ(NamePattern("model.layers.12.mlp.up_proj.weight"), "model.layers.*.mlp.up_proj.weight");
  EXPECT_EQ(NamePattern("h.0.attn.2.w"), "h.*.attn.*.w");
  EXPECT_EQ(NamePattern("conv1.weight"), "conv1.weight");
  EXPECT_EQ(NamePattern(""), "");
}

TEST(ParamToStringTest, EveryType) {
  EXPECT_EQ(ParamToString(true), "true");
  EXPECT_EQ(ParamToString(int64_t{3}), "3");
  EXPECT_EQ(ParamToString(0.25), "0.25");
  EXPECT_EQ(ParamToString(std::string("sum")), "sum");
}

}  // namespace
}  // namespace pewter::client
