#include "merge/align/alignment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "alignment_goldens.h"
#include "kernels/assignment.h"
#include "kernels/backend.h"
#include "merge/checkpoint/safetensors.h"
#include "store/object_store.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using nlohmann::json;
using testing::AlignmentGolden;
using testing::AlignmentGoldens;
using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;
using testing::TinyTensor;

std::vector<double> ReadAll(const TensorSource& source) {
  const int64_t count = source.shape().elements();
  std::vector<std::byte> bytes(count * ByteWidth(source.dtype()));
  EXPECT_THAT(source.Read(0, count, absl::MakeSpan(bytes), nullptr), IsOk());
  std::vector<double> values(count);
  kernels::Convert({.data = bytes.data(), .dtype = source.dtype(), .size = count},
                   {.data = values.data(), .dtype = DType::kF64, .size = count});
  return values;
}

// The view of one of a model's tensors.
absl::StatusOr<std::shared_ptr<const TensorSource>> View(const Symmetry& symmetry,
                                                         const Alignment& alignment,
                                                         const Checkpoint& model,
                                                         const std::string& name) {
  auto source = model.OpenTensor(name, 0);
  if (!source.ok()) return source.status();
  return AlignSource(symmetry, *symmetry.Find(name), alignment, *source);
}

// The same by the definition, element by element.
std::vector<double> Gathered(const Symmetry& symmetry, const Alignment& alignment,
                             const TinyTensor& tensor) {
  const SymmetricTensor& symmetric = *symmetry.Find(tensor.name);
  const int rank = tensor.shape.rank();
  std::vector<std::vector<int64_t>> from(rank);
  for (int axis = 0; axis < rank; ++axis) {
    int64_t begin = 0;
    for (const AxisSegment& segment : symmetric.axes[axis]) {
      const SymmetryGroup& group = symmetry.groups()[segment.group];
      const auto it = alignment.groups.find(group.name);
      for (int64_t i = 0; i < group.width; ++i) {
        from[axis].push_back(begin + (it == alignment.groups.end() || it->second.permutation.empty()
                                          ? i
                                          : it->second.permutation[i]));
      }
      begin += group.width;
    }
    for (int64_t i = from[axis].size(); i < tensor.shape[axis]; ++i) from[axis].push_back(i);
  }
  std::vector<double> values(tensor.values.size());
  for (size_t flat = 0; flat < values.size(); ++flat) {
    int64_t rest = flat, source = 0, stride = 1;
    for (int axis = rank - 1; axis >= 0; --axis) {
      source += from[axis][rest % tensor.shape[axis]] * stride;
      rest /= tensor.shape[axis];
      stride *= tensor.shape[axis];
    }
    values[flat] = tensor.values[source];
  }
  return values;
}

double Distance(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(error / std::max(norm, 1e-30));
}

TEST(AlignmentGoldenTest, PlantedOrdersAreUndone) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  for (const AlignmentGolden& golden : goldens) {
    SCOPED_TRACE(golden.name);
    ASSERT_THAT(CheckAlignment(golden.symmetry, golden.planted), IsOk());
    const auto a = testing::ReadTensors(golden.folder + "/a");
    const auto b = testing::ReadTensors(golden.folder + "/b");
    int moved = 0;
    for (const SymmetricTensor& tensor : golden.symmetry.tensors()) {
      SCOPED_TRACE(tensor.tensor.name);
      const auto view = View(golden.symmetry, golden.planted, *golden.b, tensor.tensor.name);
      ASSERT_THAT(view, IsOk());
      const std::vector<double> aligned = ReadAll(**view);
      EXPECT_EQ(aligned, Gathered(golden.symmetry, golden.planted, b.at(tensor.tensor.name)));
      // What is left is the noise of 1 %.
      EXPECT_LT(Distance(aligned, a.at(tensor.tensor.name).values), 0.02);
      moved += aligned != b.at(tensor.tensor.name).values;
    }
    EXPECT_GT(moved, 10);
  }
}

TEST(AlignmentGoldenTest, ReadingInPartsIsReadingWhole) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  std::mt19937_64 engine(1);
  for (const AlignmentGolden& golden : goldens) {
    for (const SymmetricTensor& tensor : golden.symmetry.tensors()) {
      const auto view = View(golden.symmetry, golden.planted, *golden.b, tensor.tensor.name);
      ASSERT_THAT(view, IsOk());
      const int64_t count = (*view)->shape().elements(), width = ByteWidth((*view)->dtype());
      std::vector<std::byte> whole(count * width), parts(count * width);
      ASSERT_THAT((*view)->Read(0, count, absl::MakeSpan(whole), nullptr), IsOk());
      for (int64_t at = 0; at < count;) {
        const int64_t run = std::min<int64_t>(count - at, 1 + engine() % 97);
        ASSERT_THAT(
            (*view)->Read(at, run, absl::MakeSpan(parts).subspan(at * width, run * width), nullptr),
            IsOk());
        at += run;
      }
      EXPECT_EQ(whole, parts) << tensor.tensor.name;
      EXPECT_THAT((*view)->Read(0, count + 1, absl::MakeSpan(whole), nullptr),
                  StatusIs(absl::StatusCode::kInternal, HasSubstr("bad range")));
    }
  }
}

TEST(AlignmentGoldenTest, InverseAndComposition) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  for (const AlignmentGolden& golden : goldens) {
    SCOPED_TRACE(golden.name);
    const auto inverse = Inverse(golden.planted);
    ASSERT_THAT(inverse, IsOk());
    EXPECT_THAT(CheckAlignment(golden.symmetry, *inverse), IsOk());
    EXPECT_EQ(inverse->model, golden.planted.reference);
    for (const auto& both :
         {Compose(golden.planted, *inverse), Compose(*inverse, golden.planted)}) {
      ASSERT_THAT(both, IsOk());
      for (const auto& [name, group] : both->groups) {
        for (size_t i = 0; i < group.permutation.size(); ++i) {
          EXPECT_EQ(group.permutation[i], static_cast<int32_t>(i)) << name;
        }
      }
    }
    const auto twice = Compose(golden.planted, golden.planted);
    ASSERT_THAT(twice, IsOk());
    for (const SymmetricTensor& tensor : golden.symmetry.tensors()) {
      const std::string& name = tensor.tensor.name;
      const auto once = View(golden.symmetry, golden.planted, *golden.b, name);
      ASSERT_THAT(once, IsOk());
      const auto again = AlignSource(golden.symmetry, tensor, golden.planted, *once);
      ASSERT_THAT(again, IsOk());
      const auto composed = View(golden.symmetry, *twice, *golden.b, name);
      ASSERT_THAT(composed, IsOk());
      EXPECT_EQ(ReadAll(**again), ReadAll(**composed)) << name;
    }
  }
}

TEST(AlignmentGoldenTest, TheFileIsReadBack) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  testing::TempFolder folder;
  const auto store = OpenStore(folder.path());
  ASSERT_THAT(store, IsOk());
  for (const AlignmentGolden& golden : goldens) {
    Alignment alignment = golden.planted;
    alignment.report = R"({"objective": 1.5})";
    alignment.model_fingerprint = AlignmentFingerprint(golden.symmetry, *golden.b);
    const auto file = SerializeAlignment(alignment);
    ASSERT_THAT(file, IsOk());
    folder.Write("alignment.safetensors", *file);
    const auto back = ReadAlignment(**store, "alignment.safetensors");
    ASSERT_THAT(back, IsOk());
    EXPECT_EQ(*SerializeAlignment(*back), *file);
    EXPECT_EQ(back->report, alignment.report);
    EXPECT_EQ(back->groups.size(), alignment.groups.size());
    EXPECT_EQ(back->groups.at("res").permutation, alignment.groups.at("res").permutation);
  }
}

// The optima of kernels/assignment.h's problems by another solver.
TEST(AssignmentGoldenTest, OptimaAreTheReferences) {
  const std::filesystem::path lap =
      std::filesystem::path(PEWTER_SOURCE_DIR) / "../shared/goldens/alignment/lap";
  if (!std::filesystem::exists(lap)) GTEST_SKIP() << "no " << lap;
  const json cases = json::parse(std::ifstream(lap / "lap.json"));
  const auto store = OpenStore(lap.string());
  ASSERT_THAT(store, IsOk());
  const auto size = (*store)->Stat("lap.safetensors");
  const auto header = ReadSafetensorsHeader(**store, "lap.safetensors", size->size);
  ASSERT_THAT(header, IsOk());
  std::map<std::string, const TensorInfo*> infos;
  for (const TensorInfo& info : header->tensors) infos[info.name] = &info;
  const auto read = [&](const TensorInfo& info) {
    std::vector<std::byte> bytes(info.bytes);
    EXPECT_THAT((*store)->ReadInto("lap.safetensors", info.offset, absl::MakeSpan(bytes)), IsOk());
    return bytes;
  };
  int compared = 0;
  for (const auto& entry : cases.items()) {
    const std::string& name = entry.key();
    const json& golden = entry.value();
    if (!golden.is_object() || !golden.contains("optimum")) continue;
    SCOPED_TRACE(name);
    const auto it = infos.contains(name) ? infos.find(name) : infos.find(name + ".cost");
    ASSERT_NE(it, infos.end());
    const std::vector<std::byte> bytes = read(*it->second);
    const int64_t n = golden.at("n");
    std::vector<double> costs(n * n);
    if (it->second->dtype == DType::kI8) {
      for (size_t i = 0; i < costs.size(); ++i) costs[i] = static_cast<int8_t>(bytes[i]);
    } else {
      kernels::Convert({.data = bytes.data(), .dtype = it->second->dtype, .size = n * n},
                       {.data = costs.data(), .dtype = DType::kF64, .size = n * n});
    }
    const std::vector<float> narrow(costs.begin(), costs.end());
    const auto solve = [&](const void* data, DType dtype) {
      return kernels::SolveAssignment(
          {.costs = {.data = data, .dtype = dtype, .rows = n, .columns = n, .stride = n},
           .maximize = golden.at("maximize")});
    };
    std::vector<kernels::Assignment> results;
    auto wide = solve(costs.data(), DType::kF64);
    ASSERT_THAT(wide, IsOk());
    results.push_back(*wide);
    if (it->second->dtype != DType::kF64) results.push_back(*solve(narrow.data(), DType::kF32));
    for (const kernels::Assignment& result : results) {
      const double optimum = golden.at("optimum");
      EXPECT_NEAR(result.total, optimum, 1e-9 * std::max(1.0, std::abs(optimum)));
      if (golden.at("unique") != json(true)) continue;
      const std::vector<std::byte> expected = read(*infos.at(name + ".col_ind"));
      std::vector<int32_t> columns(n);
      if (infos.at(name + ".col_ind")->dtype == DType::kI64) {
        for (int64_t i = 0; i < n; ++i) {
          int64_t value;
          std::memcpy(&value, &expected[i * 8], 8);
          columns[i] = static_cast<int32_t>(value);
        }
      } else {
        std::memcpy(columns.data(), expected.data(), n * 4);
      }
      EXPECT_EQ(result.columns, columns);
    }
    ++compared;
  }
  EXPECT_GE(compared, 25);
}

// --- Linear maps
// ----------------------------------------------------------------------------------

// One attention of two heads of two features, without RoPE, and a norm on the stream.
class MapsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const json config = {{"architectures", json::array({"BertForMaskedLM"})},
                         {"model_type", "bert"},
                         {"num_hidden_layers", 1},
                         {"num_attention_heads", 2}};
    const std::string attention = "bert.encoder.layer.0.attention.";
    std::vector<TinyTensor> tensors = {
        testing::RandomTensor("bert.embeddings.word_embeddings.weight", DType::kF32, {7, 4}, 1),
        testing::RandomTensor("bert.embeddings.LayerNorm.weight", DType::kF32, {4}, 2),
        testing::RandomTensor(attention + "output.dense.weight", DType::kF32, {4, 4}, 3)};
    for (const char* name : {"query", "key", "value"}) {
      const std::string prefix = absl::StrCat(attention, "self.", name);
      tensors.push_back(testing::RandomTensor(prefix + ".weight", DType::kF32, {4, 4}, 4));
      tensors.push_back(testing::RandomTensor(prefix + ".bias", DType::kF32, {4}, 5));
    }
    folder_.Write("m/config.json", config.dump());
    testing::WriteSafetensors(folder_ / "m/model.safetensors", tensors);
    model_ = *Checkpoint::Open({.path = folder_ / "m"});
    const std::vector<std::shared_ptr<const Checkpoint>> models = {model_};
    symmetry_ = *Symmetry::Make(**ResolveArchitecture(models, false), models);
    tensors_ = testing::ReadTensors(folder_ / "m");
  }

  static BlockTransform Maps() {
    return {.blocks = 2,
            .dim = 2,
            .forward = {2, 1, 1, 1, 0, -1, 1, 3},
            .inverse = {1, -1, -1, 2, 3, 1, -1, 0}};
  }
  std::vector<double> Aligned(const std::string& name, const Alignment& alignment) {
    EXPECT_THAT(CheckAlignment(symmetry_, alignment), IsOk());
    const auto view = View(symmetry_, alignment, *model_, name);
    EXPECT_THAT(view, IsOk());
    return ReadAll(**view);
  }
  // out[i][j] = sum over head h of left_h[i][.] in[., .], as plain 4 x 4 products.
  using Matrix = std::vector<double>;
  static Matrix Times(const Matrix& a, const Matrix& b, int64_t columns) {
    Matrix c(4 * columns, 0);
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t k = 0; k < 4; ++k) c[i * columns + j] += a[i * 4 + k] * b[k * columns + j];
      }
    }
    return c;
  }
  // [4, 4] with the heads on the diagonal, times the order {2, 3, 1, 0}.
  static Matrix Dense(const std::vector<double>& blocks, bool transposed) {
    Matrix m(16, 0);
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          m[(2 * h + i) * 4 + 2 * h + j] = blocks[h * 4 + (transposed ? j * 2 + i : i * 2 + j)];
        }
      }
    }
    return m;
  }

  testing::TempFolder folder_;
  std::shared_ptr<const Checkpoint> model_;
  Symmetry symmetry_;
  std::map<std::string, TinyTensor> tensors_;
};

TEST_F(MapsTest, HeadsAreReorderedThenMapped) {
  const std::vector<int32_t> order = {2, 3, 1, 0};
  Matrix permutation(16, 0);
  for (int i = 0; i < 4; ++i) permutation[i * 4 + order[i]] = 1;
  Matrix transposed(16, 0);
  for (int i = 0; i < 4; ++i) transposed[order[i] * 4 + i] = 1;
  Alignment alignment;
  alignment.groups["qk.0"] = {.permutation = order, .transform = Maps()};
  alignment.groups["vo.0"] = {.permutation = order, .transform = Maps()};
  const std::string prefix = "bert.encoder.layer.0.attention.";
  const Matrix forward = Dense(Maps().forward, false), inverse = Dense(Maps().inverse, false),
               dual = Dense(Maps().inverse, true);
  for (const auto& [name, map] :
       std::map<std::string, Matrix>{{"query", forward}, {"key", dual}, {"value", forward}}) {
    const std::string weight = absl::StrCat(prefix, "self.", name, ".weight");
    const std::string bias = absl::StrCat(prefix, "self.", name, ".bias");
    EXPECT_LT(Distance(Aligned(weight, alignment),
                       Times(map, Times(permutation, tensors_.at(weight).values, 4), 4)),
              1e-7);
    EXPECT_LT(Distance(Aligned(bias, alignment),
                       Times(map, Times(permutation, tensors_.at(bias).values, 1), 1)),
              1e-7);
  }
  const std::string output = prefix + "output.dense.weight";
  EXPECT_LT(Distance(Aligned(output, alignment),
                     Times(Times(tensors_.at(output).values, transposed, 4), inverse, 4)),
            1e-7);
  // What a head computes is the same: W_O W_V and Q^T K.
  const auto product = [&](const Matrix& o, const Matrix& v) { return Times(o, v, 4); };
  EXPECT_LT(
      Distance(
          product(Aligned(output, alignment), Aligned(prefix + "self.value.weight", alignment)),
          product(tensors_.at(output).values, tensors_.at(prefix + "self.value.weight").values)),
      1e-6);
}

TEST_F(MapsTest, InverseAndComposition) {
  Alignment alignment;
  alignment.groups["vo.0"] = {.permutation = {2, 3, 1, 0}, .transform = Maps()};
  Alignment other;
  other.groups["vo.0"] = {.permutation = {3, 2, 0, 1}, .transform = Maps()};
  const auto inverse = Inverse(alignment);
  ASSERT_THAT(inverse, IsOk());
  const auto both = Compose(alignment, other);
  ASSERT_THAT(both, IsOk());
  for (const char* name : {"self.value.weight", "self.value.bias", "output.dense.weight"}) {
    const std::string full = absl::StrCat("bert.encoder.layer.0.attention.", name);
    const auto once = View(symmetry_, alignment, *model_, full);
    const auto undone = AlignSource(symmetry_, *symmetry_.Find(full), *inverse, *once);
    ASSERT_THAT(undone, IsOk());
    EXPECT_LT(Distance(ReadAll(**undone), tensors_.at(full).values), 1e-6) << name;
    const auto twice = AlignSource(symmetry_, *symmetry_.Find(full), other, *once);
    EXPECT_LT(Distance(ReadAll(**twice), Aligned(full, *both)), 1e-6) << name;
  }
  other.groups["vo.0"].permutation = {0, 2, 1, 3};
  EXPECT_THAT(Compose(alignment, other), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                  HasSubstr("vo.0: features leave the run")));
}

TEST_F(MapsTest, TheFileHasTheMaps) {
  Alignment alignment;
  alignment.groups["vo.0"] = {.permutation = {2, 3, 1, 0}, .transform = Maps()};
  alignment.groups["qk.0"] = {.transform = Maps()};
  const auto file = SerializeAlignment(alignment);
  ASSERT_THAT(file, IsOk());
  folder_.Write("x.safetensors", *file);
  const auto store = *OpenStore(folder_.path());
  const auto back = ReadAlignment(*store, "x.safetensors");
  ASSERT_THAT(back, IsOk());
  EXPECT_EQ(*SerializeAlignment(*back), *file);
  EXPECT_EQ(back->groups.at("qk.0").transform.inverse, Maps().inverse);

  Alignment damaged = alignment;
  damaged.groups["qk.0"].transform.inverse[0] += 0.1;
  folder_.Write("x.safetensors", *SerializeAlignment(damaged));
  EXPECT_THAT(ReadAlignment(*store, "x.safetensors"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("do not undo each other")));
  damaged = alignment;
  damaged.groups["vo.0"].permutation[0] = 3;
  folder_.Write("x.safetensors", *SerializeAlignment(damaged));
  EXPECT_THAT(ReadAlignment(*store, "x.safetensors"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("vo.0.permutation")));
  testing::WriteSafetensors(folder_ / "y.safetensors",
                            {testing::RandomTensor("a", DType::kF32, {2}, 1)});
  EXPECT_THAT(ReadAlignment(*store, "y.safetensors"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("no alignment")));
  EXPECT_THAT(ReadAlignment(*store, "z.safetensors"),
              StatusIs(absl::StatusCode::kNotFound, ::testing::_));
}

TEST_F(MapsTest, WhatTheModelDoesNotAllow) {
  const auto refused = [&](const std::string& group, GroupAlignment of, absl::string_view message) {
    Alignment alignment;
    alignment.groups[group] = std::move(of);
    EXPECT_THAT(CheckAlignment(symmetry_, alignment),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(message)));
  };
  refused("ff.7", {}, "no group ff.7");
  refused("head", {}, "tied to the embeddings");
  refused("res", {.permutation = {0, 1, 1, 2}}, "res: not a permutation of 4");
  refused("res", {.permutation = {0, 1}}, "res: not a permutation of 4");
  refused("vo.0", {.permutation = {0, 2, 1, 3}}, "attn.0: features leave their head");
  refused("vo.0", {.permutation = {2, 3, 0, 1}}, "orders of their own");
  refused("res", {.transform = Maps()}, "scales them one by one");
  BlockTransform wide = {.blocks = 1, .dim = 4, .forward = std::vector<double>(16, 0)};
  for (int i = 0; i < 4; ++i) wide.forward[i * 5] = 1;
  wide.inverse = wide.forward;
  refused("vo.0", {.transform = wide}, "must be one a head, of 2 features");
  BlockTransform wrong = Maps();
  wrong.inverse[3] = 7;
  refused("vo.0", {.transform = wrong}, "linear map 0 and its inverse");
  wrong = Maps();
  wrong.blocks = 3;
  refused("vo.0", {.transform = wrong}, "do not make 4");
  Alignment other;
  other.family = "llama";
  EXPECT_THAT(CheckAlignment(symmetry_, other),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("llama"), HasSubstr("bert"))));
}

// RoPE turns pairs of features (i, i + dim / 2): a map may turn and scale them, and the keys'
// undoes the queries'.
TEST(RotaryMapsTest, PairsTurnTogether) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  for (const AlignmentGolden& golden : goldens) {
    if (golden.name != "llama_gqa" && golden.name != "qwen3_qknorm") continue;
    const Attention& attention = golden.symmetry.attentions()[0];
    const int64_t dim = attention.head_dim, half = dim / 2;
    BlockTransform queries = {.blocks = attention.heads, .dim = dim},
                   keys = {.blocks = attention.kv_heads, .dim = dim};
    const double scale = 1.5;
    const auto fill = [&](BlockTransform& maps, double size) {
      maps.forward.assign(maps.blocks * dim * dim, 0);
      maps.inverse = maps.forward;
      for (int64_t block = 0; block < maps.blocks; ++block) {
        const int64_t kv = maps.blocks == attention.kv_heads
                               ? block
                               : block / (attention.heads / attention.kv_heads);
        for (int64_t i = 0; i < half; ++i) {
          const double angle = 0.3 * kv + 0.7 * i, c = std::cos(angle), s = std::sin(angle);
          const auto set = [&](std::vector<double>& m, int64_t row, int64_t column, double value) {
            m[(block * dim + row) * dim + column] = value;
          };
          set(maps.forward, i, i, size * c);
          set(maps.forward, i, i + half, -size * s);
          set(maps.forward, i + half, i, size * s);
          set(maps.forward, i + half, i + half, size * c);
          set(maps.inverse, i, i, c / size);
          set(maps.inverse, i, i + half, s / size);
          set(maps.inverse, i + half, i, -s / size);
          set(maps.inverse, i + half, i + half, c / size);
        }
      }
    };
    fill(queries, scale);
    fill(keys, 1 / scale);
    Alignment alignment;
    alignment.groups["q.0"].transform = queries;
    alignment.groups["k.0"].transform = keys;
    if (golden.name == "qwen3_qknorm") {
      EXPECT_THAT(CheckAlignment(golden.symmetry, alignment),
                  StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("pass a norm")));
      continue;
    }
    EXPECT_THAT(CheckAlignment(golden.symmetry, alignment), IsOk());
    alignment.groups["k.0"].transform = {};
    EXPECT_THAT(CheckAlignment(golden.symmetry, alignment),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("do not cancel")));
    fill(keys, scale);
    alignment.groups["k.0"].transform = keys;
    EXPECT_THAT(CheckAlignment(golden.symmetry, alignment),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("do not cancel")));
    // Two pairs mixed.
    for (double* m : {queries.forward.data(), queries.inverse.data()}) {
      for (int64_t j = 0; j < dim; ++j) std::swap(m[j], m[dim + j]);
    }
    for (int64_t i = 0; i < dim; ++i) {
      for (int64_t j = i; j < dim; ++j) {
        queries.inverse[i * dim + j] = queries.forward[j * dim + i] / (scale * scale);
        queries.inverse[j * dim + i] = queries.forward[i * dim + j] / (scale * scale);
      }
    }
    alignment.groups["q.0"].transform = queries;
    EXPECT_THAT(
        CheckAlignment(golden.symmetry, alignment),
        StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("turn and scale the pairs")));
  }
}

}  // namespace
}  // namespace pewter
