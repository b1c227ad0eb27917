// Random draws: an independent Philox4x32-10 is checked against Random123's known answers, and the
// draws of every backend against that. The masks' statistics are those of independent coins.
#include <array>
#include <cmath>
#include <functional>

#include "base/random.h"
#include "tests/kernels/under_test.h"

namespace pewter::kernels {
namespace {

using Block = std::array<uint32_t, 4>;

// Salmon et al. 2011, section 3, as written there.
Block Philox(Block counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

uint32_t WordOf(PhiloxKey key, uint64_t element) {
  const uint64_t block = element / 8;
  const auto half = [&](uint32_t stream) {
    const uint32_t word =
        Philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0},
               {key.k0, key.k1})[element % 8 / 2];
    return element % 2 == 0 ? word & 0xffff : word >> 16;
  };
  return half(0) << 16 | half(1);
}

TEST(PhiloxReferenceTest, KnownAnswersOfRandom123) {
  EXPECT_EQ(Philox({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxReferenceTest, TheScalarWordsAreTheReferences) {
  for (uint64_t element : {uint64_t{0}, uint64_t{5}, uint64_t{1} << 34, (uint64_t{1} << 40) + 3}) {
    const PhiloxKey key = MakePhiloxKey(element, "name");
    EXPECT_EQ(PhiloxWord(key, element), WordOf(key, element));
  }
}

class DrawTest : public BackendTest {
 protected:
  // Which of `size` elements from `first` are kept at `below`.
  std::vector<bool> Kept(PhiloxKey key, uint64_t below, int64_t first, int64_t size,
                         DType dtype = DType::kF32) {
    std::vector<std::byte> zeros(size * ByteWidth(dtype)), ones(zeros.size());
    for (int64_t j = 0; j < size; ++j) {
      const float one = 1;
      const double wide_one = 1;
      if (dtype == DType::kF32) std::memcpy(ones.data() + j * 4, &one, 4);
      if (dtype == DType::kF64) std::memcpy(ones.data() + j * 8, &wide_one, 8);
    }
    DeviceBytes base(backend(), zeros), model(backend(), ones), out(backend(), zeros);
    TaskVectorSum op;
    op.count = 1;
    op.model[0].keep = Keep::kRandom;
    op.model[0].key = key;
    op.model[0].draw_below = below;
    const absl::Status status = backend().Map(
        op, {ConstView{base.data(), dtype, size}, ConstView{model.data(), dtype, size}},
        View{out.data(), dtype, size}, first);
    EXPECT_TRUE(status.ok()) << status;
    const std::vector<std::byte> bytes = out.Fetch();
    std::vector<bool> kept;
    for (int64_t j = 0; j < size; ++j) {
      // The last byte of an element is 0 for 0 and part of the exponent for 1.
      kept.push_back(bytes[(j + 1) * ByteWidth(dtype) - 1] != std::byte{0});
    }
    return kept;
  }
};

TEST_P(DrawTest, AreThoseOfTheReference) {
  const PhiloxKey key = MakePhiloxKey(3, "layers.0.weight#1");
  for (DType dtype : {DType::kF32, DType::kF64}) {
    // The second start crosses the 32-bit boundary of the block counter.
    for (int64_t first : {int64_t{0}, (int64_t{1} << 34) - 1000, int64_t{1} << 45}) {
      for (int64_t shift : {0, 1, 2, 5, 7}) {
        for (uint64_t below :
             {uint64_t{0}, uint64_t{1} << 20, uint64_t{0x80000000}, uint64_t{0x9abcdef0},
              uint64_t{0xffff}, uint64_t{0xffffffff}, uint64_t{1} << 32}) {
          const std::vector<bool> kept = Kept(key, below, first + shift, 2500, dtype);
          for (int64_t j = 0; j < 2500; ++j) {
            ASSERT_EQ(kept[j], WordOf(key, static_cast<uint64_t>(first + shift + j)) < below)
                << "element " << first + shift + j << ", below " << below;
          }
        }
      }
    }
  }
}

// Each count of independent coins is within 5 standard deviations of its mean but for one in two
// million draws of a key; the keys are fixed.
TEST_P(DrawTest, HaveTheStatisticsOfIndependentCoins) {
  const int64_t size = 1'000'000;
  for (double density : {0.1, 0.5, 0.9}) {
    const auto below = static_cast<uint64_t>(density * 0x1p32);
    const std::vector<bool> a = Kept(MakePhiloxKey(1, "w#0"), below, 0, size);
    const std::vector<bool> b = Kept(MakePhiloxKey(1, "w#1"), below, 0, size);
    // Among so many are some whose upper half equals the bound's.
    for (int64_t j = 0; j < size; ++j) {
      ASSERT_EQ(a[j], WordOf(MakePhiloxKey(1, "w#0"), j) < below) << j;
    }
    const auto expect_share = [&](double share, const std::function<bool(int64_t)>& holds) {
      int64_t count = 0;
      for (int64_t j = 8; j < size; ++j) count += holds(j);
      const double mean = share * (size - 8);
      EXPECT_NEAR(count, mean, 5 * std::sqrt(mean * (1 - share)) * 1.5);  // 1.5: lags overlap
    };
    expect_share(density, [&](int64_t j) { return a[j]; });
    expect_share(density * density, [&](int64_t j) { return a[j] && b[j]; });
    for (int lag : {1, 2, 4, 8}) {
      expect_share(density * density, [&](int64_t j) { return a[j] && a[j - lag]; });
    }
  }
}

INSTANTIATE_ON_BACKENDS(DrawTest);

}  // namespace
}  // namespace pewter::kernels
