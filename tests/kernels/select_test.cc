// Thresholds of the k largest magnitudes, against sorting: exact in every distribution, however the
// tensor is cut into tiles.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/kernels/under_test.h"
#include "tests/kernels/view_scan.h"

namespace pewter::kernels {
namespace {

template <class T>
struct Distribution {
  std::string name;
  std::vector<T> values;
};

template <class T>
std::vector<Distribution<T>> Distributions(int64_t size) {
  std::mt19937_64 random(11);
  std::normal_distribution<double> normal;
  std::vector<Distribution<T>> all;
  const auto add = [&](const std::string& name, const std::function<double(int64_t)>& draw) {
    Distribution<T>& d = all.emplace_back();
    d.name = name;
    for (int64_t j = 0; j < size; ++j) d.values.push_back(static_cast<T>(draw(j)));
  };
  const auto bf16 = [](double value) {
    const auto bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    return static_cast<double>(std::bit_cast<float>(bits & 0xffff0000u));
  };
  add("normal", [&](int64_t) { return normal(random); });
  add("laplace", [&](int64_t) {
    const double u = std::generate_canonical<double, 53>(random) - 0.5;
    return std::copysign(std::log1p(-2 * std::abs(u) + 1e-300), u);
  });
  add("zeros", [&](int64_t) { return random() % 10 < 6 ? 0.0 : normal(random) * 1e-3; });
  add("all_zero", [&](int64_t j) { return j % 2 == 0 ? 0.0 : -0.0; });
  add("all_equal", [&](int64_t j) { return j % 3 == 0 ? -0.75 : 0.75; });
  add("two_values", [&](int64_t) { return random() % 2 == 0 ? 0.5 : 0.25; });
  add("bf16_quantised", [&](int64_t) { return bf16(normal(random)) * 0x1p-9; });
  add("mostly_one_value", [&](int64_t) { return random() % 20 == 0 ? normal(random) : 1.0; });
  // Neighbours that differ in the last bits only, in one bin of the first level.
  add("one_bin", [&](int64_t) { return 1.0 + static_cast<double>(random() % 60000) * 0x1p-23; });
  add("exponents", [&](int64_t) {
    const double value =
        std::ldexp(1 + normal(random) * 0.1, static_cast<int>(random() % 250) - 126);
    return random() % 2 == 0 ? value : -value;
  });
  add("subnormal", [&](int64_t) { return static_cast<double>(random() % 5000) * 0x1p-149; });
  return all;
}

class SelectTest : public BackendTest {
 protected:
  template <class T>
  void CheckAll(DType dtype, int64_t size) {
    for (const Distribution<T>& d : Distributions<T>(size)) {
      std::vector<T> magnitudes = d.values;
      for (T& value : magnitudes) value = std::abs(value);
      std::vector<T> sorted = magnitudes;
      std::sort(sorted.begin(), sorted.end(), std::greater<T>());
      std::vector<std::byte> bytes(size * sizeof(T));
      std::memcpy(bytes.data(), d.values.data(), bytes.size());
      DeviceBytes device(backend(), bytes);
      const ConstView view{device.data(), dtype, size};
      // All at once, as the models of a merge; the thresholds of each do not depend on the others.
      const std::vector<int64_t> ks = {1, 2, size / 100, size / 5, size / 2, size - 1, size};
      for (int64_t tile : {size, size / 3 + 1}) {
        ViewScan scan(backend(), std::vector<std::vector<ConstView>>(ks.size(), {view}), tile);
        const absl::StatusOr<std::vector<Threshold>> thresholds = SelectThresholds(scan, ks);
        ASSERT_TRUE(thresholds.ok()) << thresholds.status();
        for (size_t i = 0; i < ks.size(); ++i) {
          const std::string what = absl::StrCat(d.name, ", ", size, " elements, k = ", ks[i]);
          const auto want = static_cast<double>(sorted[ks[i] - 1]);
          EXPECT_EQ((*thresholds)[i].value, want) << what;
          if (want == 0) {
            EXPECT_EQ((*thresholds)[i].ties_end, size) << what << ": zeros may all stay";
            continue;
          }
          int64_t kept = 0, last = -1;
          for (int64_t j = 0; j < size; ++j) {
            const bool tie = magnitudes[j] == want;
            kept += magnitudes[j] > want || (tie && j < (*thresholds)[i].ties_end);
            if (tie) last = j;
          }
          EXPECT_EQ(kept, ks[i]) << what;
          EXPECT_LE((*thresholds)[i].ties_end, size) << what;
          EXPECT_GE(last, 0) << what;
        }
        if (sizeof(T) == 8) {
          EXPECT_EQ(scan.histograms, 4) << d.name;
          EXPECT_LE(scan.sifts, 1) << d.name << ": for ties";
        } else {
          EXPECT_LE(scan.sifts, scan.histograms == 0 ? 1 : 2) << d.name << ": again for ties";
        }
      }
    }
  }
};

TEST_P(SelectTest, Float32Small) { CheckAll<float>(DType::kF32, 10'007); }
TEST_P(SelectTest, Float32) { CheckAll<float>(DType::kF32, 300'007); }
TEST_P(SelectTest, Float64) { CheckAll<double>(DType::kF64, 30'001); }

// What the sample does not see: the window is wrong, and the radix descent finds the threshold.
TEST_P(SelectTest, MisleadingSample) {
  const int64_t size = 1'000'000;
  for (const bool large : {false, true}) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> values(size);
    for (float& value : values) value = normal(random);
    std::vector<std::byte> bytes(size * 4);
    std::memcpy(bytes.data(), values.data(), bytes.size());
    DeviceBytes device(backend(), bytes);
    class Blind : public ViewScan {
     public:
      using ViewScan::ViewScan;
      float factor = 1;
      absl::Status Sample(Tensors tensors, int64_t first, int64_t count,
                          absl::Span<std::vector<float>> magnitudes) override {
        RETURN_IF_ERROR(ViewScan::Sample(tensors, first, count, magnitudes));
        for (float& value : magnitudes[0]) value *= factor;
        return absl::OkStatus();
      }
    } scan(backend(), {{{device.data(), DType::kF32, size}}}, 1 << 18);
    scan.factor = large ? 10 : 0.1;
    const std::vector<Threshold> thresholds = SelectThresholds(scan, {size / 3}).value();
    for (float& value : values) value = std::abs(value);
    std::nth_element(values.begin(), values.begin() + (size / 3 - 1), values.end(),
                     std::greater<float>());
    EXPECT_EQ(thresholds[0].value, values[size / 3 - 1]);
    EXPECT_EQ(scan.histograms, 2);
  }
}

// NaN is larger than all, as its bits are.
TEST_P(SelectTest, NotANumber) {
  for (const int64_t size : {int64_t{1000}, int64_t{200'000}}) {
    std::vector<float> values(size);
    for (int64_t j = 0; j < size; ++j) values[j] = static_cast<float>(j % 1000);
    for (int64_t j = 0; j < size; j += 10) values[j] = std::nanf("");
    std::vector<std::byte> bytes(size * 4);
    std::memcpy(bytes.data(), values.data(), bytes.size());
    DeviceBytes device(backend(), bytes);
    const ConstView view{device.data(), DType::kF32, size};
    ViewScan scan(backend(), std::vector<std::vector<ConstView>>(2, {view}), size);
    const std::vector<Threshold> thresholds =
        SelectThresholds(scan, {size / 20, size / 10 + size / 1000}).value();
    EXPECT_TRUE(std::isnan(thresholds[0].value));
    EXPECT_EQ(thresholds[1].value, 999);
  }
}

// A trimmed tensor keeps exactly k elements when ties are broken by index.
TEST_P(SelectTest, KeepsExactlyK) {
  for (const int64_t size : {int64_t{50'000}, int64_t{250'000}}) {
    const int64_t k = size / 5 * 2;
    std::mt19937 random(2);
    std::vector<float> base(size, 1.0f), model(size);
    for (float& value : model) value = 1.0f + static_cast<float>(random() % 8) * 0.125f;
    std::vector<std::byte> base_bytes(size * 4), model_bytes(size * 4);
    std::memcpy(base_bytes.data(), base.data(), size * 4);
    std::memcpy(model_bytes.data(), model.data(), size * 4);
    DeviceBytes device_base(backend(), base_bytes), device_model(backend(), model_bytes);
    const std::vector<ConstView> views = {{device_base.data(), DType::kF32, size},
                                          {device_model.data(), DType::kF32, size}};
    ViewScan scan(backend(), {views}, 1 << 16);
    const Threshold threshold = SelectThresholds(scan, {k}).value()[0];
    TaskVectorSum op;
    op.count = 1;
    op.model[0].keep = Keep::kMagnitude;
    op.model[0].threshold = threshold.value;
    op.model[0].ties_end = threshold.ties_end;
    DeviceBytes out(backend(), std::vector<std::byte>(size * 4));
    ASSERT_TRUE(backend().Map(op, views, View{out.data(), DType::kF32, size}, 0).ok());
    const std::vector<std::byte> bytes = out.Fetch();
    int64_t kept = 0;
    for (int64_t j = 0; j < size; ++j) {
      float value;
      std::memcpy(&value, bytes.data() + j * 4, 4);
      kept += value != 1.0f;
      ASSERT_TRUE(value == 1.0f || value == model[j]);
    }
    EXPECT_EQ(kept, k);
  }
}

TEST_P(SelectTest, ImpossibleRanksAreErrors) {
  DeviceBytes device(backend(), std::vector<std::byte>(40));
  ViewScan scan(backend(), {{{device.data(), DType::kF32, 10}}}, 10);
  for (int64_t k : {0, 11}) {
    EXPECT_EQ(SelectThresholds(scan, {k}).status().code(), absl::StatusCode::kInternal);
  }
}

class SiftTest : public BackendTest {};

TEST_P(SiftTest, FindsEveryElementOfTheWindow) {
  const int64_t size = 70'001;
  std::mt19937 random(3);
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kF16, DType::kF8E4M3}) {
    std::vector<float> values(size);
    for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 41) - 20);
    values[12] = std::nanf("");
    std::vector<std::byte> bytes(size * ByteWidth(dtype));
    Convert({values.data(), DType::kF32, size}, {bytes.data(), dtype, size});
    Convert({bytes.data(), dtype, size}, {values.data(), DType::kF32, size});
    DeviceBytes device(backend(), bytes);
    for (const SiftWindow& window :
         {SiftWindow{.low = 3, .high = 7, .common = 5},
          SiftWindow{.low = 0, .high = 2, .common = 0}, SiftWindow{.low = 4, .high = 4},
          SiftWindow{.low = 30, .high = 40, .common = 35}}) {
      SiftCounts want;
      std::vector<std::pair<uint32_t, float>> expected, got;
      for (int64_t j = 0; j < size; ++j) {
        const float magnitude = std::abs(values[j]);
        if (std::isnan(magnitude) || magnitude > window.high) {
          ++want.above;
        } else if (magnitude == window.common) {
          ++want.common;
        } else if (magnitude >= window.low) {
          expected.emplace_back(static_cast<uint32_t>(j), magnitude);
        }
      }
      std::vector<SiftCandidate> candidates(size);
      const absl::StatusOr<SiftCounts> counts =
          backend().Sift(DeltaMagnitude{.count = 1}, {ConstView{device.data(), dtype, size}},
                         /*first=*/0, window, absl::MakeSpan(candidates));
      ASSERT_TRUE(counts.ok()) << counts.status();
      EXPECT_EQ(counts->above, want.above);
      EXPECT_EQ(counts->common, want.common);
      ASSERT_EQ(counts->candidates, static_cast<int64_t>(expected.size()));
      for (int64_t i = 0; i < counts->candidates; ++i) {
        got.emplace_back(candidates[i].index, candidates[i].magnitude);
      }
      std::sort(got.begin(), got.end());
      EXPECT_EQ(got, expected);
    }
  }
}

INSTANTIATE_ON_BACKENDS(SelectTest);
INSTANTIATE_ON_BACKENDS(SiftTest);

}  // namespace
}  // namespace pewter::kernels
