// Every op on every backend against the plain reference: all dtypes, sizes at the seams, views that
// start in the middle of a vector, guard bytes around every output. Map and the order of sums are
// exact, so the tolerance is zero.
#include <cmath>
#include <random>

#include "tests/kernels/reference.h"
#include "tests/kernels/under_test.h"

namespace pewter::kernels {
namespace {

constexpr DType kFloats[] = {DType::kF64,  DType::kF32,    DType::kF16,
                             DType::kBF16, DType::kF8E4M3, DType::kF8E5M2};
constexpr int64_t kSizes[] = {0, 1, 15, 16, 17, 127, 128, 129, 4097};
constexpr int kGuard = 64;
constexpr std::byte kGuardByte{0xA5};

// Inputs that look like a base and its fine-tuned models: equal in many elements, else near it.
// With `special`, infinities, NaN, subnormal and huge numbers are among them.
class Inputs {
 public:
  Inputs(DType dtype, int count, int64_t size, int64_t offset, bool special, uint64_t seed)
      : dtype_(dtype), size_(size), offset_(offset) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const double specials[] = {INFINITY, -INFINITY, NAN, 0.0, -0.0, 1e-40, -3e-8, 60000.0, 3e38};
    bytes_.assign(count, std::vector<std::byte>((offset + size) * ByteWidth(dtype) + 1));
    values_.resize(count);
    for (int64_t j = 0; j < size; ++j) {
      const double base = normal(random);
      for (int i = 0; i < count; ++i) {
        double value = i == 0 || random() % 3 == 0 ? base : base + 0.1 * normal(random);
        if (special && random() % 5 == 0) value = specials[random() % std::size(specials)];
        const uint64_t bits = reference::Encode(dtype, value);
        reference::WriteBits(dtype, bits, At(i, j));
        values_[i].push_back(reference::Decode(dtype, bits));
      }
    }
  }

  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  void Upload(Backend& backend) {
    device_.clear();
    for (const auto& bytes : bytes_) device_.emplace_back(backend, bytes);
  }
  std::vector<ConstView> Views() {
    std::vector<ConstView> views;
    for (DeviceBytes& bytes : device_) {
      views.push_back({bytes.data() + offset_ * ByteWidth(dtype_), dtype_, size_});
    }
    return views;
  }
  template <class T>
  std::vector<T> Element(int64_t j) const {
    std::vector<T> x;
    for (const std::vector<double>& values : values_) x.push_back(static_cast<T>(values[j]));
    return x;
  }

 private:
  std::byte* At(int i, int64_t j) { return bytes_[i].data() + (offset_ + j) * ByteWidth(dtype_); }

  DType dtype_;
  int64_t size_, offset_;
  std::vector<std::vector<std::byte>> bytes_;
  std::vector<std::vector<double>> values_;
  std::vector<DeviceBytes> device_;
};

std::vector<MapOp> SampleMapOps() {
  std::vector<MapOp> ops;
  for (int count : {1, 2, 3, 8}) {
    WeightedSum op;
    op.count = count;
    for (int i = 0; i < count; ++i) op.weight[i] = 0.3 + 0.37 * i;
    op.divisor = count == 2 ? 1.3 : 1;
    ops.push_back(op);
  }
  for (bool elect : {false, true}) {
    for (bool normalize : {false, true}) {
      for (int count : {0, 1, 5}) {
        TaskVectorSum op;
        op.count = count;
        op.elect_sign = elect;
        op.normalize = normalize;
        op.lambda = 0.9;
        op.weight_sum = 1.7;
        for (int i = 0; i < count; ++i) {
          auto& model = op.model[i];
          model.weight = i == 3 ? -0.4 : 0.5 + 0.1 * i;
          model.scale = 1 + 0.05 * i;
          model.keep = count == 1 ? Keep::kRandom
                                  : std::vector{Keep::kMagnitude, Keep::kRandom, Keep::kBand,
                                                Keep::kNone, Keep::kMagnitude}[i];
          model.threshold = i == 4 ? 0 : 0.0625;
          model.ties_end = 70;
          model.ceiling = 0.25;
          model.ceiling_end = 50;
          model.key = MakePhiloxKey(7, "t#" + std::to_string(i));
          model.draw_below = i == 1 ? (uint64_t{1} << 32) / 3 : uint64_t{3} << 30;
        }
        ops.push_back(op);
      }
    }
  }
  for (double t : {0.05, 0.0, -1.0}) ops.push_back(NearSwap{.t = t});
  for (int count : {1, 2, 5}) {
    OverlapMean op{.count = count, .epsilon = 0.0625};
    for (int i = 0; i < count; ++i) op.unique_scale[i] = 1 + 0.07 * i;
    ops.push_back(op);
  }
  return ops;
}

int InputsOf(const MapOp& op) {
  return std::visit([](const auto& held) { return held.inputs(); }, op);
}

class MapTest : public BackendTest {
 protected:
  // Checks all samples; views and the output start at element `offset` of their buffers.
  void Check(DType in_dtype, DType out_dtype, int64_t size, int64_t offset, int64_t first,
             bool special) {
    SCOPED_TRACE(testing::Message()
                 << "types " << static_cast<int>(in_dtype) << " -> " << static_cast<int>(out_dtype)
                 << ", " << size << " elements at " << offset << ", first " << first);
    Inputs inputs(in_dtype, 8, size, offset, special, size * 31 + offset);
    inputs.Upload(backend());
    const int64_t width = ByteWidth(out_dtype);
    for (const MapOp& op : SampleMapOps()) {
      std::vector<ConstView> views = inputs.Views();
      views.resize(InputsOf(op));
      DeviceBytes out(backend(),
                      std::vector<std::byte>(2 * kGuard + (offset + size) * width, kGuardByte));
      const int64_t begin = kGuard + offset * width;
      const absl::Status status =
          backend().Map(op, views, View{out.data() + begin, out_dtype, size}, first);
      ASSERT_TRUE(status.ok()) << status;
      const std::vector<std::byte> bytes = out.Fetch();
      for (int64_t i = 0; i < static_cast<int64_t>(bytes.size()); ++i) {
        if (i >= begin && i < begin + size * width) continue;
        ASSERT_EQ(bytes[i], kGuardByte) << "byte " << i - begin << " from the output's start";
      }
      for (int64_t j = 0; j < size; ++j) {
        const uint64_t want = std::visit(
            [&](const auto& held) {
              return in_dtype == DType::kF64
                         ? reference::Encode(
                               out_dtype,
                               reference::Evaluate(held, inputs.Element<double>(j), first + j))
                         : reference::Encode(
                               out_dtype,
                               reference::Evaluate(held, inputs.Element<float>(j), first + j));
            },
            op);
        const uint64_t got = reference::ReadBits(out_dtype, bytes.data() + begin + j * width);
        ASSERT_TRUE(reference::SameValue(out_dtype, got, want))
            << "op " << op.index() << " with " << InputsOf(op) << " inputs, element " << j << ": "
            << reference::Decode(out_dtype, got) << ", want " << reference::Decode(out_dtype, want);
      }
    }
  }
};

TEST_P(MapTest, AllTypesAtTheSeams) {
  for (DType in : kFloats) {
    for (DType out : kFloats) {
      for (int64_t size : kSizes) {
        if (HasFatalFailure()) return;
        if (in != out && size > 1000) continue;  // the seams of rows do not depend on the types
        Check(in, out, size, /*offset=*/0, /*first=*/0, /*special=*/false);
      }
    }
  }
}

TEST_P(MapTest, Misaligned) {
  for (DType dtype : kFloats) {
    for (int64_t size : {int64_t{1}, int64_t{129}, int64_t{1100}}) {
      for (int64_t offset : {1, 3, 16, 31}) {
        if (HasFatalFailure()) return;
        Check(dtype, dtype, size, offset, /*first=*/(int64_t{1} << 33) + offset * 5, false);
      }
    }
  }
}

TEST_P(MapTest, InfinitiesAndNaN) {
  for (DType in : kFloats) {
    for (DType out : kFloats) {
      if (HasFatalFailure()) return;
      Check(in, out, 700, 0, 0, /*special=*/true);
    }
  }
}

TEST_P(MapTest, OutputMayBeAnInput) {
  Inputs inputs(DType::kBF16, 2, 5000, 0, false, 1);
  inputs.Upload(backend());
  const std::vector<ConstView> views = inputs.Views();
  WeightedSum op{.count = 2, .weight = {0.25, 0.75}};
  DeviceBytes apart(backend(), std::vector<std::byte>(10000));
  ASSERT_TRUE(backend().Map(op, views, View{apart.data(), DType::kBF16, 5000}, 0).ok());
  const std::vector<std::byte> want = apart.Fetch();
  ASSERT_TRUE(
      backend().Map(op, views, View{const_cast<void*>(views[1].data), DType::kBF16, 5000}, 0).ok());
  std::vector<std::byte> got(10000);
  ASSERT_TRUE(backend().Synchronize().ok());
  ASSERT_TRUE(backend().Download(views[1].data, got.data(), 10000).ok());
  ASSERT_TRUE(backend().Synchronize().ok());
  EXPECT_EQ(got, want);
}

// Large outputs are written past the caches on the CPU; pieces go to threads.
TEST_P(MapTest, LargeOutputs) {
  for (int64_t offset : {0, 3}) {
    for (DType dtype : {DType::kBF16, DType::kF32}) {
      const int64_t width = ByteWidth(dtype);
      const int64_t size = (int64_t{34} << 20) / width + 77;
      std::vector<std::byte> a((size + offset) * width), b(a.size());
      std::mt19937 random(5);
      std::vector<uint64_t> values;
      for (int i = 0; i < 1024; ++i) values.push_back(reference::Encode(dtype, 1 + i * 1e-3));
      for (int64_t j = 0; j < size + offset; ++j) {
        const uint32_t draw = random();
        reference::WriteBits(dtype, values[draw % 1024], a.data() + j * width);
        reference::WriteBits(dtype, values[draw >> 22], b.data() + j * width);
      }
      DeviceBytes device_a(backend(), a), device_b(backend(), b);
      DeviceBytes out(backend(), std::vector<std::byte>(a.size() + 2 * kGuard, kGuardByte));
      TaskVectorSum op;
      op.count = 1;
      op.model[0].keep = Keep::kRandom;
      op.model[0].draw_below = uint64_t{1} << 31;
      op.model[0].key = {1, 2};
      const int64_t first = 12;
      const int64_t begin = kGuard + offset * width;
      ASSERT_TRUE(backend()
                      .Map(op,
                           {ConstView{device_a.data() + offset * width, dtype, size},
                            ConstView{device_b.data() + offset * width, dtype, size}},
                           View{out.data() + begin, dtype, size}, first)
                      .ok());
      const std::vector<std::byte> bytes = out.Fetch();
      for (int i = 0; i < begin; ++i) ASSERT_EQ(bytes[i], kGuardByte);
      for (size_t i = begin + size * width; i < bytes.size(); ++i) ASSERT_EQ(bytes[i], kGuardByte);
      const auto check = [&](int64_t j) {
        const auto value = [&](const std::vector<std::byte>& from) {
          return static_cast<float>(reference::Decode(
              dtype, reference::ReadBits(dtype, from.data() + (offset + j) * width)));
        };
        const uint64_t want = reference::Encode(
            dtype, reference::Evaluate(op, std::vector<float>{value(a), value(b)}, first + j));
        ASSERT_EQ(reference::ReadBits(dtype, bytes.data() + begin + j * width), want)
            << "element " << j;
      };
      for (int64_t j = 0; j < 3000; ++j) check(j);
      for (int64_t j = 3000; j < size - 3000; j += 101) check(j);
      for (int64_t j = size - 3000; j < size; ++j) check(j);
    }
  }
}

TEST_P(MapTest, ArgumentsThatDoNotFitAreErrors) {
  Inputs inputs(DType::kF32, 2, 8, 0, false, 1);
  inputs.Upload(backend());
  std::vector<ConstView> views = inputs.Views();
  DeviceBytes out(backend(), std::vector<std::byte>(64));
  const View view{out.data(), DType::kF32, 8};
  const auto code = [&](const MapOp& op, const std::vector<ConstView>& in, View to) {
    return backend().Map(op, in, to, 0).code();
  };
  EXPECT_EQ(code(WeightedSum{.count = 3}, views, view), absl::StatusCode::kInternal);
  EXPECT_EQ(code(WeightedSum{.count = 0}, {}, view), absl::StatusCode::kInternal);
  EXPECT_EQ(code(WeightedSum{.count = 2}, views, View{out.data(), DType::kF32, 7}),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code(WeightedSum{.count = 2}, views, View{out.data(), DType::kI32, 8}),
            absl::StatusCode::kInternal);
  views[1].dtype = DType::kBF16;
  EXPECT_EQ(code(WeightedSum{.count = 2}, views, view), absl::StatusCode::kInternal);
}

INSTANTIATE_ON_BACKENDS(MapTest);

std::vector<ReduceOp> SampleReduceOps() {
  DeltaAbsSums sums;
  sums.task.count = 3;
  sums.task.model[0].keep = Keep::kMagnitude;
  sums.task.model[0].threshold = 0.0625;
  sums.task.model[0].ties_end = 70;
  sums.task.model[1].keep = Keep::kRandom;
  sums.task.model[1].draw_below = uint64_t{1} << 31;
  sums.task.model[1].key = {3, 4};
  CountEqualMagnitude count;
  count.task.count = 2;
  count.task.model[0].threshold = 0;
  count.task.model[1].threshold = 0.0625;
  return {DotNorms{},
          sums,
          count,
          Gram{.count = 3},
          Gram{.count = 2, .from_base = true},
          OverlapCounts{{.count = 3, .epsilon = 0.0625}}};
}

template <class T>
std::vector<double> ReferenceSums(const ReduceOp& op, const Inputs& inputs, int64_t first) {
  const int terms = Terms(op);
  std::vector<double> sums;
  int64_t block = -1;
  // Sums by lane of the row in progress, then the tree.
  std::vector<std::vector<double>> lanes(terms, std::vector<double>(32));
  const auto finish_row = [&] {
    for (int t = 0; t < terms; ++t) {
      for (int step = 16; step > 0; step /= 2) {
        for (int l = 0; l < step; ++l) lanes[t][l] += lanes[t][l + step];
      }
      sums[sums.size() - terms + t] += lanes[t][0];
      lanes[t].assign(32, 0);
    }
  };
  int64_t in_block = 0;
  for (int64_t j = 0; j < inputs.size(); ++j) {
    if ((first + j) / kReduceBlock != block) {
      if (block >= 0) finish_row();
      block = (first + j) / kReduceBlock;
      in_block = 0;
      sums.insert(sums.end(), terms, 0.0);
    } else if (in_block % kReduceRow == 0) {
      finish_row();
    }
    const std::vector<T> values = std::visit(
        [&](const auto& held) {
          return reference::EvaluateTerms(held, inputs.Element<T>(j), first + j);
        },
        op);
    for (int t = 0; t < terms; ++t) lanes[t][in_block % 32] += values[t];
    ++in_block;
  }
  if (block >= 0) finish_row();
  return sums;
}

class ReduceTest : public BackendTest {};

TEST_P(ReduceTest, SumsInTheStatedOrder) {
  for (DType dtype : kFloats) {
    for (int64_t size : {int64_t{0}, int64_t{1}, int64_t{31}, int64_t{129}, int64_t{4097},
                         2 * kReduceBlock + 1027}) {
      for (int64_t first : {int64_t{0}, kReduceBlock * 3, kReduceBlock * 2 - 700, int64_t{13}}) {
        if (size > 5000 && first % kReduceBlock != 0 && dtype != DType::kBF16) continue;
        Inputs inputs(dtype, 4, size, first % 3, false, 17);
        inputs.Upload(backend());
        for (const ReduceOp& op : SampleReduceOps()) {
          std::vector<ConstView> views = inputs.Views();
          views.resize(std::visit([](const auto& held) { return held.inputs(); }, op));
          const absl::StatusOr<std::vector<double>> got = backend().Reduce(op, views, first);
          ASSERT_TRUE(got.ok()) << got.status();
          const std::vector<double> want = dtype == DType::kF64
                                               ? ReferenceSums<double>(op, inputs, first)
                                               : ReferenceSums<float>(op, inputs, first);
          ASSERT_EQ(*got, want) << "op " << op.index() << " of type " << static_cast<int>(dtype)
                                << ", " << size << " elements from " << first;
        }
      }
    }
  }
}

TEST_P(ReduceTest, TilesGiveTheBitsOfTheWhole) {
  const int64_t size = 5 * kReduceBlock + 333;
  Inputs inputs(DType::kBF16, 4, size, 0, false, 3);
  inputs.Upload(backend());
  for (const ReduceOp& op : SampleReduceOps()) {
    std::vector<ConstView> views = inputs.Views();
    views.resize(std::visit([](const auto& held) { return held.inputs(); }, op));
    const std::vector<double> whole = backend().Reduce(op, views, 0).value();
    for (int64_t tile : {kReduceBlock, 2 * kReduceBlock, 3 * kReduceBlock}) {
      std::vector<double> tiled;
      for (int64_t at = 0; at < size; at += tile) {
        std::vector<ConstView> part = views;
        for (ConstView& view : part) {
          view.data = static_cast<const std::byte*>(view.data) + at * 2;
          view.size = std::min(tile, size - at);
        }
        const std::vector<double> sums = backend().Reduce(op, part, at).value();
        tiled.insert(tiled.end(), sums.begin(), sums.end());
      }
      EXPECT_EQ(tiled, whole);
    }
  }
}

INSTANTIATE_ON_BACKENDS(ReduceTest);

// What is left of threads: each number of them gives the same bits.
TEST(ThreadsTest, AnyNumberGivesTheSameBits) {
  const int64_t size = 9 * kReduceBlock + 5;
  Inputs inputs(DType::kF32, 3, size, 0, false, 23);
  DeltaAbsSums sums;
  sums.task.count = 2;
  TaskVectorSum map;
  map.count = 2;
  map.elect_sign = true;
  std::vector<uint64_t> want_bins;
  std::vector<double> want_sums;
  std::vector<std::byte> want_bytes;
  for (int threads : {1, 2, 3}) {
    const std::unique_ptr<Backend> backend = cpu::MakeBackend(*cpu::Tables()[0], threads);
    inputs.Upload(*backend);
    const std::vector<ConstView> views = inputs.Views();
    std::vector<uint64_t> bins(kRadixBins);
    ASSERT_TRUE(backend
                    ->Histogram(DeltaMagnitude{}, absl::MakeConstSpan(views).subspan(0, 2),
                                RadixLevel{}, absl::MakeSpan(bins))
                    .ok());
    const std::vector<double> got_sums = backend->Reduce(sums, views, 0).value();
    DeviceBytes out(*backend, std::vector<std::byte>(size * 4));
    ASSERT_TRUE(backend->Map(map, views, View{out.data(), DType::kF32, size}, 0).ok());
    if (threads == 1) {
      want_bins = bins;
      want_sums = got_sums;
      want_bytes = out.Fetch();
    } else {
      EXPECT_EQ(bins, want_bins);
      EXPECT_EQ(got_sums, want_sums);
      EXPECT_EQ(out.Fetch(), want_bytes);
    }
  }
}

class HistogramTest : public BackendTest {};

TEST_P(HistogramTest, CountsEveryDigit) {
  for (DType dtype : kFloats) {
    const bool f64 = dtype == DType::kF64;
    for (int64_t size : {int64_t{0}, int64_t{1}, int64_t{33}, int64_t{4097}, int64_t{200001}}) {
      Inputs inputs(dtype, 2, size, size % 2, false, 5);
      inputs.Upload(backend());
      for (int count : {1, 2}) {
        std::vector<uint64_t> keys;
        for (int64_t j = 0; j < size; ++j) {
          const auto key = [&]<class T, class U>(T, U) -> uint64_t {
            const std::vector<T> x = inputs.Element<T>(j);
            return std::bit_cast<U>(std::abs(count == 1 ? x[0] : static_cast<T>(x[1] - x[0])));
          };
          keys.push_back(f64 ? key(double{}, uint64_t{}) : key(float{}, uint32_t{}));
        }
        std::vector<ConstView> views = inputs.Views();
        views.resize(count);
        const int levels = f64 ? 4 : 2;
        const uint64_t sample = keys.empty() ? 0 : keys[keys.size() / 2];
        for (int level = 0; level < levels; ++level) {
          const int shift = 16 * (levels - 1 - level);
          const uint64_t prefix = level == 0 ? 0 : sample >> (shift + 16);
          std::vector<uint64_t> want(kRadixBins, 2), got(kRadixBins, 2);  // counts are added
          for (uint64_t key : keys) {
            if (level == 0 || key >> (shift + 16) == prefix) ++want[key >> shift & 0xffff];
          }
          const absl::Status status = backend().Histogram(
              DeltaMagnitude{.count = count}, views, RadixLevel{.level = level, .prefix = prefix},
              absl::MakeSpan(got));
          ASSERT_TRUE(status.ok()) << status;
          ASSERT_EQ(got, want) << "type " << static_cast<int>(dtype) << ", " << size
                               << " elements, level " << level;
        }
      }
    }
  }
}

INSTANTIATE_ON_BACKENDS(HistogramTest);

}  // namespace
}  // namespace pewter::kernels
