// Every op on every backend against the plain reference: all dtypes, sizes at the seams, views that
// start in the middle of a vector, guard bytes around every output. Map and the order of sums are
// exact, so the tolerance is zero.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
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
  for (int count : {1, 2, 5}) {
    SelectedMean op;
    op.count = count;
    op.select_all = count == 2;
    op.threshold = count == 1 ? 0 : 0.003;
    op.ties_end = 90;
    for (int i = 0; i < count; ++i) op.weight[i] = 0.1 + 0.2 * i;
    ops.push_back(op);
  }
  for (int count : {1, 2, 5}) {
    for (bool elect : {false, true}) {
      ElectedMean op;
      op.count = count;
      op.from_base = count != 2;
      op.elect = elect;
      op.disjoint = count != 1;
      op.sign_of_zero = count == 5 ? -1 : 1;
      for (int i = 0; i < count; ++i) {
        op.threshold[i] = i == 1 ? 0 : 0.0625;
        op.weight[i] = i == 3 ? 0 : 0.7 + 0.2 * i;
      }
      ops.push_back(op);
    }
  }
  for (int count : {1, 2, 4}) {
    FisherMean op{.count = count, .epsilon = count == 2 ? 0 : 0.01};
    for (int i = 0; i < count; ++i) op.weight[i] = 0.2 + 0.4 * i;
    ops.push_back(op);
  }
  return ops;
}

// An op that knows rows or columns of `row` elements, once with its values in host memory and once
// in the backend's.
template <class Op>
struct AxisOp {
  AxisOp(Backend& backend, Op op, int64_t row, bool columns, int count, int64_t first, int64_t size)
      : on_host(op) {
    const int64_t first_row = columns ? 0 : first / row;
    const int64_t lines = columns ? row : (first + size) / row - first_row + 1;
    for (int64_t i = 0; i < lines * count; ++i) {
      values.push_back(0.25 + 0.01 * static_cast<double>(i * 37 % 101));
    }
    std::vector<std::byte> bytes(values.size() * sizeof(double));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    uploaded = std::make_unique<DeviceBytes>(backend, bytes);
    *AxisOf(on_host) = {.row = row,
                        .count = count,
                        .columns = columns,
                        .values = values.data(),
                        .first = first_row};
    on_device = on_host;
    AxisOf(on_device)->values = reinterpret_cast<const double*>(uploaded->data());
  }

  std::vector<double> values;
  std::unique_ptr<DeviceBytes> uploaded;
  Op on_host, on_device;
};

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
    for (const MapOp& op : SampleMapOps()) {
      if (HasFatalFailure()) return;
      CheckOp(inputs, out_dtype, offset, first, op, op);
    }
    if (in_dtype != out_dtype) return;
    // Rows shorter and longer than the runs that kernels take.
    for (int64_t row : {7, 100}) {
      for (bool columns : {false, true}) {
        if (HasFatalFailure()) return;
        const AxisOp<AxisCombination> sum(backend(), {.count = 3}, row, columns, 3, first, size);
        CheckOp(inputs, out_dtype, offset, first, sum.on_host, sum.on_device);
        const AxisOp<AxisCombination> deltas(backend(), {.count = 2, .from_base = true}, row,
                                             columns, 2, first, size);
        CheckOp(inputs, out_dtype, offset, first, deltas.on_host, deltas.on_device);
        const AxisOp<ImportantElements> important(backend(), {.threshold = 0.04}, row, columns, 1,
                                                  first, size);
        CheckOp(inputs, out_dtype, offset, first, important.on_host, important.on_device);
        const AxisOp<ElectedMean> elected(backend(),
                                          {.count = 3,
                                           .scaled = true,
                                           .sign_of_zero = 1,
                                           .threshold = {0.3, 0.3, 0},
                                           .weight = {1, 0.5, -1}},
                                          row, columns, 3, first, size);
        CheckOp(inputs, out_dtype, offset, first, elected.on_host, elected.on_device);
      }
    }
  }

  // `wanted` is the op as the reference takes it.
  void CheckOp(Inputs& inputs, DType out_dtype, int64_t offset, int64_t first, const MapOp& wanted,
               const MapOp& op) {
    const DType in_dtype = inputs.dtype();
    const int64_t size = inputs.size(), width = ByteWidth(out_dtype);
    {
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
            wanted);
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
  SelectedSquares squares;
  squares.task.count = 3;
  squares.task.select_all = false;
  squares.task.threshold = 0.003;
  ElectedSigns signs;
  signs.task.count = 3;
  signs.task.from_base = true;
  signs.task.threshold[1] = 0.0625;
  return {DotNorms{},
          signs,
          sums,
          squares,
          CountVarying{{.count = 2}},
          FisherSums{.count = 3},
          Gram{.count = 3},
          Gram{.count = 2, .from_base = true},
          OverlapCounts{{.count = 3, .epsilon = 0.0625}}};
}

// Of the ops above.
template <class T>
std::vector<T> ReferenceTerms(const ReduceOp& op, const std::vector<T>& x, int64_t index) {
  return std::visit(
      [&](const auto& held) -> std::vector<T> {
        if constexpr (requires { reference::EvaluateTerms(held, x, index); }) {
          return reference::EvaluateTerms(held, x, index);
        } else {
          ADD_FAILURE() << "no reference";
          return std::vector<T>(Terms(op));
        }
      },
      op);
}

template <class T>
std::vector<double> ReferenceSums(const ReduceOp& op, const Inputs& inputs, int64_t first,
                                  int64_t block_size) {
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
    if ((first + j) / block_size != block) {
      if (block >= 0) finish_row();
      block = (first + j) / block_size;
      in_block = 0;
      sums.insert(sums.end(), terms, 0.0);
    } else if (in_block % kReduceRow == 0) {
      finish_row();
    }
    const std::vector<T> values = ReferenceTerms<T>(op, inputs.Element<T>(j), first + j);
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
          for (int64_t block : {kReduceBlock, int64_t{3}, int64_t{1500}, kReduceBlock + 700}) {
            if (block != kReduceBlock && size > 5000 && dtype != DType::kF32) continue;
            if (block < 100 && size > 200) continue;
            const absl::StatusOr<std::vector<double>> got =
                backend().ReduceBlocks(op, views, first, block);
            ASSERT_TRUE(got.ok()) << got.status();
            const std::vector<double> want = dtype == DType::kF64
                                                 ? ReferenceSums<double>(op, inputs, first, block)
                                                 : ReferenceSums<float>(op, inputs, first, block);
            ASSERT_EQ(*got, want) << "op " << op.index() << " of type " << static_cast<int>(dtype)
                                  << ", " << size << " elements from " << first << " by " << block;
          }
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

TEST_P(ReduceTest, ColumnsAreSummedRowByRow) {
  for (DType dtype : kFloats) {
    for (const auto& extents :
         {std::pair<int64_t, int64_t>{1, 1}, {7, 33}, {40, 5}, {3, 2100}, {129, 64}}) {
      const int64_t rows = extents.first, columns = extents.second;
      const int64_t size = rows * columns, first = 11 * columns;
      Inputs inputs(dtype, 4, size, 1, false, 29);
      inputs.Upload(backend());
      for (const ReduceOp& op : SampleReduceOps()) {
        std::vector<ConstView> views = inputs.Views();
        views.resize(std::visit([](const auto& held) { return held.inputs(); }, op));
        std::vector<double> want(Terms(op) * columns);
        for (int64_t j = 0; j < size; ++j) {
          const auto add = [&](const auto& terms) {
            for (size_t t = 0; t < terms.size(); ++t) {
              want[t * columns + j % columns] += static_cast<double>(terms[t]);
            }
          };
          if (dtype == DType::kF64) {
            add(ReferenceTerms<double>(op, inputs.Element<double>(j), first + j));
          } else {
            add(ReferenceTerms<float>(op, inputs.Element<float>(j), first + j));
          }
        }
        const absl::StatusOr<std::vector<double>> got =
            backend().ReduceColumns(op, views, first, columns);
        ASSERT_TRUE(got.ok()) << got.status();
        ASSERT_EQ(*got, want) << "op " << op.index() << ", " << rows << " x " << columns;
      }
    }
  }
}

TEST_P(ReduceTest, Largest) {
  for (DType dtype : kFloats) {
    const int64_t size = 5000, row = 700;
    Inputs inputs(dtype, 2, size, 3, false, 7);
    inputs.Upload(backend());
    std::vector<double> want((size + row - 1) / row * 2, -INFINITY);
    for (int64_t j = 0; j < size; ++j) {
      for (int i = 0; i < 2; ++i) {
        double& largest = want[j / row * 2 + i];
        largest = std::max(largest, inputs.Element<double>(j)[i]);
      }
    }
    EXPECT_EQ(backend().ReduceBlocks(Largest{}, inputs.Views(), 0, row).value(), want);
  }
}

// Every backend gives the bits of the plainest; those are near the formula in double.
TEST_P(ReduceTest, Softmax) {
  const std::unique_ptr<Backend> plain = cpu::MakeBackend(*cpu::Tables().back(), 1);
  for (const auto& [dtype, tolerance] :
       {std::pair<DType, double>{DType::kF64, 1e-12}, {DType::kF32, 1e-5}, {DType::kBF16, 1e-5}}) {
    const int64_t row = 900, rows = 4, size = row * rows;
    // Special values would make the sums NaN; large ones must not.
    Inputs inputs(dtype, 2, size, 5, false, 41);
    std::vector<double> largest, sums, logarithms, divergences;
    for (int64_t r = 0; r < rows; ++r) {
      double max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, divergence = 0;
      const auto x = [&](int64_t j) { return inputs.Element<double>(r * row + j); };
      for (int i = 0; i < 2; ++i) {
        for (int64_t j = 0; j < row; ++j) max[i] = std::max(max[i], x(j)[i]);
        for (int64_t j = 0; j < row; ++j) sum[i] += std::exp(x(j)[i] - max[i]);
        largest.push_back(max[i]);
        sums.push_back(sum[i]);
      }
      const double base = max[0] + std::log(sum[0]), model = max[1] + std::log(sum[1]);
      logarithms.insert(logarithms.end(), {base, model - base});
      for (int64_t j = 0; j < row; ++j) {
        const double p = std::exp(x(j)[1] - model) + 1e-8, q = std::exp(x(j)[0] - base) + 1e-8;
        divergence += p * std::log(p / q);
      }
      divergences.push_back(divergence);
    }
    const auto reduce = [&](Backend& on, auto op, const std::vector<double>& values) {
      std::vector<std::byte> bytes(values.size() * sizeof(double));
      std::memcpy(bytes.data(), values.data(), bytes.size());
      DeviceBytes table(on, bytes);
      op.axis = {.row = row, .count = 2, .values = reinterpret_cast<double*>(table.data())};
      inputs.Upload(on);
      return on.ReduceBlocks(op, inputs.Views(), 0, row).value();
    };
    const auto near = [&, limit = tolerance](const std::vector<double>& got,
                                             const std::vector<double>& want) {
      ASSERT_EQ(got.size(), want.size());
      for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], limit * want[i]);
    };
    const std::vector<double> got_sums = reduce(backend(), ExpSums{}, largest);
    EXPECT_EQ(got_sums, reduce(*plain, ExpSums{}, largest));
    near(got_sums, sums);
    const std::vector<double> got = reduce(backend(), SoftmaxDivergence{}, logarithms);
    EXPECT_EQ(got, reduce(*plain, SoftmaxDivergence{}, logarithms));
    near(got, divergences);
  }
}

INSTANTIATE_ON_BACKENDS(ReduceTest);

class RankedTest : public BackendTest {
 protected:
  // Which elements of a task vector stay. Its elements are small multiples of 1/64, so that a model
  // is exact in any format.
  std::vector<bool> Kept(const RankedDraw& draw, const std::vector<float>& delta, int64_t first,
                         DType dtype = DType::kF32) {
    const auto size = static_cast<int64_t>(delta.size());
    std::vector<float> origin(size), tuned(size);
    for (int64_t j = 0; j < size; ++j) {
      origin[j] = static_cast<float>(j % 5) / 64;
      tuned[j] = origin[j] + delta[j];
    }
    const auto stored = [&](const std::vector<float>& values) {
      std::vector<std::byte> bytes(size * ByteWidth(dtype));
      Convert({values.data(), DType::kF32, size}, {bytes.data(), dtype, size});
      return bytes;
    };
    const std::vector<std::byte> zeros(size * sizeof(float));
    DeviceBytes base(backend(), stored(origin)), model(backend(), stored(tuned)),
        out(backend(), zeros);
    TaskVectorSum op;
    op.count = 1;
    op.model[0].keep = Keep::kRanked;
    op.model[0].ranked = draw;
    const std::vector<ConstView> views = {{base.data(), dtype, size}, {model.data(), dtype, size}};
    const absl::Status status =
        backend().Map(op, views, View{out.data(), DType::kF32, size}, first);
    EXPECT_TRUE(status.ok()) << status;
    const std::vector<std::byte> result = out.Fetch();
    std::vector<bool> kept;
    double sum = 0;
    for (int64_t j = 0; j < size; ++j) {
      float merged;
      std::memcpy(&merged, result.data() + j * sizeof(float), sizeof(float));
      kept.push_back(merged != origin[j]);
      if (kept.back()) {
        EXPECT_EQ(merged, tuned[j]);
        sum += std::abs(delta[j]);
      }
    }
    // A reduction draws the same.
    double reduced = 0;
    const std::vector<double> sums =
        backend().ReduceBlocks(DeltaAbsSums{op}, views, first, draw.row).value();
    for (size_t i = 1; i < sums.size(); i += 2) reduced += sums[i];
    EXPECT_NEAR(reduced, sum, 1e-6 * sum);
    return kept;
  }
};

// An element stays by its word and one other element of its row, whatever the row's length.
TEST_P(RankedTest, IsDecidedByOneRival) {
  struct Case {
    int64_t row, rows, first_row;
    DType dtype;
    double high = 0.55;
  };
  // Bounds between those that the upper halves of words tell: one word in 2^15 is close to one.
  const double low = 0.3;
  for (const Case& c : {Case{2, 700, 0, DType::kF32},
                        {2, 700, 3, DType::kBF16},
                        {33, 9, 0, DType::kF16, 1.0},
                        {300, 41, 3, DType::kF16},
                        {1000, 30, 0, DType::kF8E4M3},
                        {1000, 30, 3, DType::kF64},
                        {70'000, 3, 0, DType::kF32},
                        {70'000, 3, 3, DType::kBF16},
                        {70'001, 3, 0, DType::kF16, 1.0}}) {
    const RankedDraw draw = MakeRankedDraw(MakePhiloxKey(5, "w#0"), c.row, low, c.high);
    std::mt19937 random(3);
    std::vector<float> delta(c.row * c.rows);
    for (float& value : delta) {
      value = static_cast<float>(1 + random() % 11) / (random() % 2 == 0 ? 64 : -64);
    }
    const int64_t first = c.first_row * c.row;
    const std::vector<bool> kept = Kept(draw, delta, first, c.dtype);
    const auto begin = static_cast<uint64_t>(low * 0x1p32 + 0.5);
    const auto end = static_cast<uint64_t>(c.high * 0x1p32 + 0.5);
    for (int64_t j = 0; j < c.row * c.rows; ++j) {
      const uint64_t u = PhiloxWord(draw.key, static_cast<uint64_t>(first + j));
      bool want = u < begin;
      if (u >= begin && u < end) {
        // The others of the row share the interval evenly, to 2^-32 of it.
        const int64_t place = j % c.row;
        const uint64_t share = (static_cast<uint64_t>(c.row - 1) << 32) / (end - begin);
        auto rival = static_cast<int64_t>((u - begin) * share >> 32);
        rival += rival >= place;
        ASSERT_LT(rival, c.row);
        const float own = std::abs(delta[j]), other = std::abs(delta[j - place + rival]);
        want = own > other || (own == other && place < rival);
      }
      ASSERT_EQ(kept[j], want) << "element " << j << " of rows of " << c.row;
    }
  }
}

// Over many rows, the share that is kept of each rank is the probability that the rank has.
TEST_P(RankedTest, ProbabilityFollowsTheRank) {
  const int64_t row = 24, rows = 20'000;
  const double density = 0.4, epsilon = 0.15;
  const RankedDraw draw =
      MakeRankedDraw(MakePhiloxKey(9, "w#1"), row, density - epsilon, density + epsilon);
  std::mt19937 random(8);
  std::vector<float> delta;
  std::vector<int> order(row);
  std::iota(order.begin(), order.end(), 1);
  for (int64_t r = 0; r < rows; ++r) {
    std::shuffle(order.begin(), order.end(), random);
    for (int rank : order)
      delta.push_back(static_cast<float>(rank) / (random() % 2 == 0 ? 64 : -64));
  }
  const std::vector<bool> kept = Kept(draw, delta, 0);
  std::vector<int> count(row);
  for (size_t j = 0; j < delta.size(); ++j) {
    count[static_cast<int>(std::abs(delta[j]) * 64) - 1] += kept[j];
  }
  for (int64_t r = 0; r < row; ++r) {
    const double p = density - epsilon + 2 * epsilon * static_cast<double>(r) / (row - 1);
    EXPECT_NEAR(count[r], p * rows, 5 * std::sqrt(p * (1 - p) * rows)) << "rank " << r + 1;
  }
}

TEST_P(RankedTest, PartsOfRowsAreErrors) {
  Inputs inputs(DType::kF32, 2, 20, 0, false, 1);
  inputs.Upload(backend());
  DeviceBytes out(backend(), std::vector<std::byte>(80));
  TaskVectorSum op;
  op.count = 1;
  op.model[0].keep = Keep::kRanked;
  op.model[0].ranked = MakeRankedDraw({}, 10, 0.3, 0.6);
  const View view{out.data(), DType::kF32, 20};
  EXPECT_TRUE(backend().Map(op, inputs.Views(), view, 10).ok());
  EXPECT_EQ(backend().Map(op, inputs.Views(), view, 5).code(), absl::StatusCode::kInternal);
  op.model[0].ranked.row = 15;
  EXPECT_EQ(backend().Map(op, inputs.Views(), view, 0).code(), absl::StatusCode::kInternal);
}

INSTANTIATE_ON_BACKENDS(RankedTest);

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
                                /*first=*/0, RadixLevel{}, absl::MakeSpan(bins))
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
              DeltaMagnitude{.count = count}, views, /*first=*/0,
              RadixLevel{.level = level, .prefix = prefix}, absl::MakeSpan(got));
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
