// The k-th largest magnitude by histograms, against sorting: exact in every distribution, however
// the tensor is cut into tiles.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <random>

#include "tests/kernels/under_test.h"

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
      std::vector<T> sorted = d.values;
      for (T& value : sorted) value = std::abs(value);
      std::sort(sorted.begin(), sorted.end(), std::greater<T>());
      std::vector<std::byte> bytes(size * sizeof(T));
      std::memcpy(bytes.data(), d.values.data(), bytes.size());
      DeviceBytes device(backend(), bytes);
      for (int64_t k : {int64_t{1}, int64_t{2}, size / 5, size / 2, size - 1, size}) {
        for (int64_t tile : {size, size / 3 + 1}) {
          const absl::StatusOr<KthMagnitude> kth = SelectKth(
              k, sizeof(T) == 8, [&](RadixLevel level, absl::Span<uint64_t> bins) -> absl::Status {
                for (int64_t at = 0; at < size; at += tile) {
                  const ConstView view{device.data() + at * sizeof(T), dtype,
                                       std::min(tile, size - at)};
                  const absl::Status status =
                      backend().Histogram(DeltaMagnitude{.count = 1}, {view}, level, bins);
                  if (!status.ok()) return status;
                }
                return absl::OkStatus();
              });
          ASSERT_TRUE(kth.ok()) << kth.status();
          const T want = sorted[k - 1];
          const int64_t above =
              std::lower_bound(sorted.begin(), sorted.end(), want, std::greater<T>()) -
              sorted.begin();
          EXPECT_EQ(kth->value, static_cast<double>(want)) << d.name << ", k = " << k;
          EXPECT_EQ(kth->ties, k - above) << d.name << ", k = " << k;
        }
      }
    }
  }
};

TEST_P(SelectTest, Float32) { CheckAll<float>(DType::kF32, 100'003); }
TEST_P(SelectTest, Float64) { CheckAll<double>(DType::kF64, 30'001); }

// A trimmed tensor keeps exactly k elements when ties are broken by index.
TEST_P(SelectTest, KeepsExactlyK) {
  const int64_t size = 50'000, k = 20'000;
  std::mt19937 random(2);
  std::vector<float> base(size, 1.0f), model(size);
  for (float& value : model) value = 1.0f + static_cast<float>(random() % 8) * 0.125f;
  std::vector<std::byte> base_bytes(size * 4), model_bytes(size * 4);
  std::memcpy(base_bytes.data(), base.data(), size * 4);
  std::memcpy(model_bytes.data(), model.data(), size * 4);
  DeviceBytes device_base(backend(), base_bytes), device_model(backend(), model_bytes);
  const std::vector<ConstView> views = {{device_base.data(), DType::kF32, size},
                                        {device_model.data(), DType::kF32, size}};
  const KthMagnitude kth = SelectKth(k, false, [&](RadixLevel level, absl::Span<uint64_t> bins) {
                             return backend().Histogram(DeltaMagnitude{}, views, level, bins);
                           }).value();
  TaskVectorSum op;
  op.count = 1;
  op.model[0].keep = Keep::kMagnitude;
  op.model[0].threshold = kth.value;
  int64_t seen = 0;
  for (int64_t j = 0; j < size && seen < kth.ties; ++j) {
    if (std::abs(model[j] - base[j]) == static_cast<float>(kth.value)) {
      ++seen;
      op.model[0].ties_end = j + 1;
    }
  }
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

INSTANTIATE_ON_BACKENDS(SelectTest);

TEST(SelectKthTest, ImpossibleRanksAreErrors) {
  const auto one = [](RadixLevel, absl::Span<uint64_t> bins) {
    ++bins[7];
    return absl::OkStatus();
  };
  EXPECT_TRUE(SelectKth(1, false, one).ok());
  EXPECT_EQ(SelectKth(0, false, one).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(SelectKth(2, false, one).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(
      SelectKth(1, false,
                [](RadixLevel, absl::Span<uint64_t>) { return absl::DataLossError("read failed"); })
          .status(),
      absl::DataLossError("read failed"));
}

}  // namespace
}  // namespace pewter::kernels
