// Conversions between formats on every instruction set: every value of the narrow formats, every
// rounding boundary between two of them, and what overflow and NaN become.
#include <bit>
#include <cmath>
#include <random>

#include "tests/kernels/reference.h"
#include "tests/kernels/under_test.h"

namespace pewter::kernels {
namespace {

constexpr DType kNarrow[] = {DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2};
constexpr DType kFloats[] = {DType::kF64,  DType::kF32,    DType::kF16,
                             DType::kBF16, DType::kF8E4M3, DType::kF8E5M2};

class ConvertTest : public testing::TestWithParam<const cpu::KernelTable*> {
 protected:
  // Converts all of `bits` and compares each with the reference.
  void Check(DType from, DType to, const std::vector<uint64_t>& bits) {
    const int64_t size = static_cast<int64_t>(bits.size());
    std::vector<std::byte> in(size * ByteWidth(from)), out(size * ByteWidth(to) + 8);
    for (int64_t i = 0; i < size; ++i) {
      reference::WriteBits(from, bits[i], in.data() + i * ByteWidth(from));
    }
    GetParam()->convert(in.data(), from, out.data(), to, size);
    for (int64_t i = 0; i < size; ++i) {
      const double value = reference::Decode(from, bits[i]);
      const uint64_t want = reference::Encode(to, value);
      const uint64_t got = reference::ReadBits(to, out.data() + i * ByteWidth(to));
      ASSERT_TRUE(reference::SameValue(to, got, want))
          << "type " << static_cast<int>(from) << " to " << static_cast<int>(to) << ": " << value
          << " (bits " << bits[i] << ") gave bits " << got << ", want " << want;
    }
  }
};

TEST_P(ConvertTest, EveryNarrowValueToEveryType) {
  for (DType from : kNarrow) {
    std::vector<uint64_t> bits(ByteWidth(from) == 2 ? 65536 : 256);
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = i;
    for (DType to : kFloats) Check(from, to, bits);
  }
}

// Halfway between neighbours, and the nearest numbers on both sides of it. Rounding float64 to
// float32 first would get some of these wrong.
TEST_P(ConvertTest, EveryRoundingBoundary) {
  for (DType to : kNarrow) {
    std::vector<uint64_t> singles, doubles;
    const uint64_t count = ByteWidth(to) == 2 ? 32768 : 128;
    for (uint64_t i = 0; i + 1 < count; ++i) {
      const double low = reference::Decode(to, i), high = reference::Decode(to, i + 1);
      if (!std::isfinite(low)) continue;
      double middle = (low + high) / 2;
      // Above the largest finite value its last step counts on.
      if (!std::isfinite(middle)) middle = low + (low - reference::Decode(to, i - 1)) / 2;
      for (double value : {middle, std::nextafter(middle, 0), std::nextafter(middle, INFINITY)}) {
        for (double sign : {1.0, -1.0}) doubles.push_back(std::bit_cast<uint64_t>(sign * value));
      }
      const auto single = static_cast<float>(middle);
      for (float value : {single, std::nextafter(single, 0.0f), std::nextafter(single, INFINITY)}) {
        for (float sign : {1.0f, -1.0f}) singles.push_back(std::bit_cast<uint32_t>(sign * value));
      }
    }
    Check(DType::kF32, to, singles);
    Check(DType::kF64, to, doubles);
  }
}

TEST_P(ConvertTest, RandomBits) {
  std::mt19937_64 random(1);
  std::vector<uint64_t> singles(200'000), doubles(200'000);
  for (uint64_t& bits : singles) bits = random() & 0xffffffffu;
  for (size_t i = 0; i < doubles.size(); ++i) {
    doubles[i] = random();
    // Half of them in the range of the narrower types.
    if (i % 2 == 0)
      doubles[i] = (doubles[i] & ~(uint64_t{0x7ff} << 52)) | (900 + random() % 240) << 52;
  }
  for (DType to : kFloats) {
    Check(DType::kF32, to, singles);
    Check(DType::kF64, to, doubles);
  }
}

// PyTorch's results, written out.
TEST_P(ConvertTest, KnownResults) {
  const struct {
    DType to;
    float value;
    uint64_t bits;
  } cases[] = {
      {DType::kBF16, 1.00390625f, 0x3f80},   // halfway, to even
      {DType::kBF16, 1.01171875f, 0x3f82},   // halfway, to even
      {DType::kBF16, 3.4e38f, 0x7f80},       // overflow: infinity
      {DType::kBF16, NAN, 0x7fc0},           //
      {DType::kF16, 65519.0f, 0x7bff},       // below the last boundary
      {DType::kF16, 65520.0f, 0x7c00},       // overflow: infinity
      {DType::kF16, 2.9802322e-8f, 0x0000},  // half the smallest, to even
      {DType::kF16, 2.9802326e-8f, 0x0001},  //
      {DType::kF8E4M3, 448.0f, 0x7e},        // the largest
      {DType::kF8E4M3, 464.0f, 0x7e},        // halfway to what would be next, to even
      {DType::kF8E4M3, 465.0f, 0x7f},        // overflow: NaN
      {DType::kF8E4M3, INFINITY, 0x7f},      // no infinities: NaN
      {DType::kF8E4M3, -INFINITY, 0xff},     //
      {DType::kF8E5M2, 57344.0f, 0x7b},      // the largest
      {DType::kF8E5M2, 61439.0f, 0x7b},      //
      {DType::kF8E5M2, 61440.0f, 0x7c},      // overflow: infinity
  };
  for (const auto& c : cases) {
    uint64_t bits = 0;
    GetParam()->convert(&c.value, DType::kF32, &bits, c.to, 1);
    EXPECT_EQ(bits, c.bits) << c.value << " to type " << static_cast<int>(c.to);
  }
}

// A NaN whose payload is only in the bits that are cut off must not become an infinity.
TEST_P(ConvertTest, NaNStaysNaN) {
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0x7fc00000u, 0xffffffffu}) {
    for (DType to : kFloats) {
      if (to == DType::kF32) continue;
      uint64_t out = 0;
      GetParam()->convert(&bits, DType::kF32, &out, to, 1);
      EXPECT_TRUE(std::isnan(reference::Decode(to, out))) << bits << " to " << static_cast<int>(to);
    }
  }
}

TEST_P(ConvertTest, FindsTheFirstNonFinite) {
  std::mt19937_64 random(4);
  for (DType dtype : kFloats) {
    const int64_t width = ByteWidth(dtype);
    for (int64_t size : {0, 1, 31, 1000, 5000}) {
      for (int64_t offset : {0, 1}) {
        std::vector<std::byte> bytes((size + offset) * width);
        // The largest finite values of both signs are not to be found.
        const double largest = reference::Decode(dtype, reference::Encode(dtype, INFINITY) - 1);
        for (int64_t j = 0; j < size + offset; ++j) {
          reference::WriteBits(dtype, reference::Encode(dtype, j % 2 ? largest : -largest),
                               bytes.data() + j * width);
        }
        const std::byte* data = bytes.data() + offset * width;
        EXPECT_EQ(GetParam()->find_non_finite(data, dtype, size), -1);
        if (size == 0) continue;
        for (double bad : {double{INFINITY}, -double{INFINITY}, double{NAN}}) {
          std::vector<std::byte> spoilt = bytes;
          const int64_t at = static_cast<int64_t>(random() % size);
          for (int64_t j : {at, size - 1}) {
            reference::WriteBits(dtype, reference::Encode(dtype, bad),
                                 spoilt.data() + (offset + j) * width);
          }
          EXPECT_EQ(GetParam()->find_non_finite(spoilt.data() + offset * width, dtype, size), at)
              << "type " << static_cast<int>(dtype) << ", size " << size;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, ConvertTest,
                         testing::ValuesIn(std::vector<const cpu::KernelTable*>(
                             cpu::Tables().begin(), cpu::Tables().end())),
                         [](const auto& info) { return std::string(info.param->isa); });

TEST(ConvertFunctionTest, SameTypeKeepsBits) {
  const std::vector<uint16_t> in = {0x7f81, 0xffff, 0x0001, 0x8000};
  std::vector<uint16_t> out(4);
  Convert({in.data(), DType::kBF16, 4}, {out.data(), DType::kBF16, 4});
  EXPECT_EQ(out, in);
}

TEST(ConvertFunctionTest, FindNonFiniteSaysWhere) {
  std::vector<float> values(100, 1.0f);
  int64_t at = 0;
  EXPECT_FALSE(FindNonFinite({values.data(), DType::kF32, 100}, &at));
  values[42] = NAN;
  EXPECT_TRUE(FindNonFinite({values.data(), DType::kF32, 100}, &at));
  EXPECT_EQ(at, 42);
}

}  // namespace
}  // namespace pewter::kernels
