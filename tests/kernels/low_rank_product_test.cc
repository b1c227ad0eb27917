#include "kernels/low_rank_product.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace pewter::kernels {
namespace {

// Sizes around the edges of strips (32 columns), row groups (4) and vectors.
TEST(LowRankProduct, EverySizeAndRangeHasTheBitsOfAScalarLoop) {
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;
  for (int64_t rows : {1, 3, 4, 5, 9}) {
    for (int64_t cols : {1, 15, 16, 17, 31, 32, 33, 64, 100}) {
      for (int64_t rank : {1, 2, 7}) {
        std::vector<float> left(rows * rank), right(rank * cols);
        for (float& value : left) value = normal(engine);
        for (float& value : right) value = normal(engine);
        std::vector<float> expected(rows * cols);
        for (int64_t i = 0; i < rows * cols; ++i) {
          float sum = 0;
          for (int64_t k = 0; k < rank; ++k) {
            sum += left[i / cols * rank + k] * right[k * cols + i % cols];
          }
          expected[i] = sum * 0.75f;
        }
        const LowRankProduct product(left, right, rank, 0.75f);
        EXPECT_EQ(product.bytes(), LowRankProduct::Bytes(rows, rank, cols));
        for (int round = 0; round < 20; ++round) {
          const int64_t first = round == 0 ? 0 : engine() % (rows * cols);
          const int64_t count = round == 0 ? rows * cols : engine() % (rows * cols - first) + 1;
          std::vector<float> out(count + 2, -99.f);
          product.Compute(first, count, out.data() + 1);
          ASSERT_EQ(out.front(), -99.f);
          ASSERT_EQ(out.back(), -99.f);
          ASSERT_TRUE(std::equal(out.begin() + 1, out.end() - 1, expected.begin() + first))
              << rows << 'x' << cols << " rank " << rank << " from " << first << " count " << count;
        }
      }
    }
  }
}

}  // namespace
}  // namespace pewter::kernels
