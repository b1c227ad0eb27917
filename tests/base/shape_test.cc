#include "base/shape.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/dtype_names.h"

namespace pewter {
namespace {

TEST(ShapeTest, CountsElements) {
  EXPECT_EQ(Shape().elements(), 1);
  EXPECT_EQ((Shape{3, 0, 5}).elements(), 0);
  EXPECT_EQ((Shape{32000, 2048}).ToString(), "[32000, 2048]");
}

TEST(ShapeTest, RefusesWhatDoesNotFit) {
  const int64_t big = int64_t{1} << 32;
  EXPECT_FALSE(Shape::Make({big, big}).ok());
  EXPECT_FALSE(Shape::Make({-1}).ok());
  EXPECT_FALSE(Shape::Make(std::vector<int64_t>(9, 1)).ok());
  EXPECT_TRUE(Shape::Make(std::vector<int64_t>(8, 1)).ok());
}

TEST(DTypeTest, NamesRoundTrip) {
  for (int i = 0; i <= static_cast<int>(DType::kC64); ++i) {
    const DType dtype = static_cast<DType>(i);
    EXPECT_EQ(*DTypeFromSafetensors(SafetensorsName(dtype)), dtype);
    EXPECT_EQ(*DTypeFromTorch(TorchName(dtype)), dtype);
  }
  EXPECT_EQ(*DTypeFromTorch("torch.bfloat16"), DType::kBF16);
  EXPECT_FALSE(DTypeFromTorch("bf16").ok());
  EXPECT_EQ(ByteWidth(DType::kBF16), 2);
  EXPECT_EQ(ByteWidth(DType::kC64), 8);
}

TEST(DTypeTest, PromotesAsTorchDoes) {
  EXPECT_EQ(Promote(DType::kBF16, DType::kF16), DType::kF32);
  EXPECT_EQ(Promote(DType::kBF16, DType::kF32), DType::kF32);
  EXPECT_EQ(Promote(DType::kF64, DType::kF16), DType::kF64);
  EXPECT_EQ(Promote(DType::kF8E4M3, DType::kBF16), DType::kBF16);
  EXPECT_EQ(Promote(DType::kF16, DType::kF16), DType::kF16);
}

}  // namespace
}  // namespace pewter
