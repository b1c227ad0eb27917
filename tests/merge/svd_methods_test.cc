// Methods that merge by singular vectors, through the public door: against references computed
// elsewhere in float64 (a folder beside the checkout), by what must hold of their definitions
// whatever the numbers, and with inputs on which a decomposition is of no use.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "merge/pewter.h"
#include "nlohmann/json.hpp"
#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::ReadFile;
using testing::ReadTensors;
using testing::StatusIs;
using testing::TempFolder;
using testing::TinyTensor;
using testing::WriteSafetensors;

// Row-major.
struct Dense {
  int64_t rows = 0, columns = 0;
  std::vector<double> values;

  Dense(int64_t r, int64_t c) : rows(r), columns(c), values(r * c) {}
  double& operator()(int64_t i, int64_t j) { return values[i * columns + j]; }
  double operator()(int64_t i, int64_t j) const { return values[i * columns + j]; }
};

Dense Transposed(const Dense& m) {
  Dense t(m.columns, m.rows);
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) t(j, i) = m(i, j);
  }
  return t;
}

Dense Times(const Dense& a, const Dense& b) {
  Dense c(a.rows, b.columns);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t k = 0; k < a.columns; ++k) {
      for (int64_t j = 0; j < b.columns; ++j) c(i, j) += a(i, k) * b(k, j);
    }
  }
  return c;
}

Dense Scaled(Dense m, double factor) {
  for (double& value : m.values) value *= factor;
  return m;
}

Dense Random(int64_t rows, int64_t columns, int seed) {
  Dense m(rows, columns);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  for (double& value : m.values) value = normal(engine);
  return m;
}

// What fine-tuning looks like: a few strong directions, some of them of all tasks, and noise.
std::vector<Dense> RandomTasks(int64_t rows, int64_t columns, int count, int seed) {
  std::vector<Dense> tasks;
  const Dense common = Random(rows, 3, seed);
  for (int t = 0; t < count; ++t) {
    Dense task = Times(common, Random(3, columns, seed + 10 * t + 1));
    const Dense own =
        Times(Random(rows, 2, seed + 10 * t + 2), Random(2, columns, seed + 10 * t + 3));
    const Dense noise = Random(rows, columns, seed + 10 * t + 4);
    for (size_t i = 0; i < task.values.size(); ++i) {
      task.values[i] = 0.02 * task.values[i] + 0.03 * own.values[i] + 0.01 * noise.values[i];
    }
    tasks.push_back(std::move(task));
  }
  return tasks;
}

// Products of rotations.
Dense RandomOrthogonal(int64_t side, int seed) {
  Dense q(side, side);
  for (int64_t i = 0; i < side; ++i) q(i, i) = 1;
  std::mt19937_64 engine(seed);
  for (int64_t n = 0; n < 6 * side; ++n) {
    const auto a = static_cast<int64_t>(engine() % side), b = static_cast<int64_t>(engine() % side);
    if (a == b) continue;
    const double angle = static_cast<double>(engine() % 1000) * 0.006283;
    for (int64_t j = 0; j < side; ++j) {
      const double x = q(a, j), y = q(b, j);
      q(a, j) = std::cos(angle) * x - std::sin(angle) * y;
      q(b, j) = std::sin(angle) * x + std::cos(angle) * y;
    }
  }
  return q;
}

// Directions that are not rounding noise, by elimination with the largest entry as pivot.
int64_t RankOf(Dense m) {
  const auto least = [&](const Dense& d) {
    double largest = 0;
    for (double value : d.values) largest = std::max(largest, std::abs(value));
    return 1e-9 * largest;
  }(m);
  for (int64_t rank = 0;; ++rank) {
    int64_t row = 0, column = 0;
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.columns; ++j) {
        if (std::abs(m(i, j)) > std::abs(m(row, column))) row = i, column = j;
      }
    }
    const double pivot = m(row, column);
    if (std::abs(pivot) <= least) return rank;
    for (int64_t i = 0; i < m.rows; ++i) {
      const double factor = m(i, column) / pivot;
      if (i == row) continue;
      for (int64_t j = 0; j < m.columns; ++j) m(i, j) -= factor * m(row, j);
    }
    for (int64_t j = 0; j < m.columns; ++j) m(row, j) = 0;
  }
}

double LargestOf(const std::vector<double>& values) {
  double largest = 0;
  for (double value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

double LargestDifference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference;  // NaN shows
  }
  return largest;
}

using Models = std::vector<std::vector<TinyTensor>>;  // the base, then one for each task

// Merges in a folder of its own. `weights` may be empty.
absl::StatusOr<std::map<std::string, TinyTensor>> Merge(const Models& models,
                                                        const std::string& method,
                                                        const std::string& parameters,
                                                        const std::vector<double>& weights = {},
                                                        const std::string& dtype = "float64",
                                                        const PlanOptions& options = {}) {
  const TempFolder folder;
  std::string recipe =
      absl::StrCat("merge_method: ", method, "\nbase_model: ", folder / "m0", "\nmodels:\n");
  for (size_t i = 0; i < models.size(); ++i) {
    fs::create_directory(folder / absl::StrCat("m", i));
    WriteSafetensors(folder / absl::StrCat("m", i, "/model.safetensors"), models[i]);
    if (i == 0) continue;
    absl::StrAppend(&recipe, "  - model: ", folder / absl::StrCat("m", i), "\n");
    if (!weights.empty()) {
      absl::StrAppend(&recipe, "    parameters: {weight: ", absl::StrCat(weights[i - 1]), "}\n");
    }
  }
  absl::StrAppend(&recipe, "parameters: {", parameters, "}\ndtype: ", dtype, "\n");
  absl::StatusOr<Recipe> parsed = ParseRecipe(recipe);
  if (!parsed.ok()) return parsed.status();
  PlanOptions own = options;
  own.device = "cpu";
  absl::StatusOr<Plan> plan = MakePlan(*parsed, own);
  if (!plan.ok()) return plan.status();
  absl::StatusOr<Manifest> manifest = RunPlan(*plan, {.output = folder / "out"});
  if (!manifest.ok()) return manifest.status();
  return ReadTensors(folder / "out");
}

// One weight on a base of zeros, so that task vectors are what they are to the last bit.
Models OnZeros(const std::vector<Dense>& tasks, const std::string& name = "fc.weight") {
  const Shape shape{tasks[0].rows, tasks[0].columns};
  Models models = {{{name, DType::kF64, shape, std::vector<double>(shape.elements())}}};
  for (const Dense& task : tasks) models.push_back({{name, DType::kF64, shape, task.values}});
  return models;
}

Dense MergeOnZeros(const std::vector<Dense>& tasks, const std::string& method,
                   const std::string& parameters, const std::vector<double>& weights = {}) {
  const auto merged = Merge(OnZeros(tasks), method, parameters, weights);
  EXPECT_THAT(merged, IsOk());
  Dense result(tasks[0].rows, tasks[0].columns);
  if (merged.ok()) result.values = merged->at("fc.weight").values;
  return result;
}

std::vector<Dense> Each(const std::vector<Dense>& tasks,
                        const std::function<Dense(const Dense&)>& fn) {
  std::vector<Dense> changed;
  for (const Dense& task : tasks) changed.push_back(fn(task));
  return changed;
}

// --- References -------------------------------------------------------------------------------

fs::path GoldenFolder() { return fs::path(PEWTER_SOURCE_DIR) / "../shared/goldens/svd"; }

std::vector<json> GoldenCases() {
  std::vector<json> cases;
  if (!fs::exists(GoldenFolder() / "cases.json")) return cases;
  const json index = json::parse(ReadFile(GoldenFolder() / "cases.json"));
  for (const json& one : index["cases"]) {
    if (fs::exists(GoldenFolder() / one["file"].get<std::string>())) cases.push_back(one);
  }
  return cases;
}

class SvdGoldenTest : public ::testing::TestWithParam<int> {};

// The case's parameters as ours.
void Translate(const json& one, std::string& method, std::string& parameters,
               std::vector<double>& weights) {
  const json& params = one["params"];
  method = one["method"];
  std::vector<std::string> settings;
  if (method == "drm") {
    settings.push_back("direction: " + params["direction"].get<std::string>());
    settings.push_back(absl::StrCat("density: ", 1 - params["drop"].get<double>()));
    settings.push_back(params["disjoint"].get<bool>() ? "disjoint_mean: true"
                                                      : "disjoint_mean: false");
    if (params.contains("nonlinear_drop")) {
      settings.push_back(
          absl::StrCat("other_density: ", 1 - params["nonlinear_drop"].get<double>()));
    }
    if (params.contains("sign_resolution")) {
      settings.push_back(params["sign_resolution"].get<bool>() ? "sign_resolution: true"
                                                               : "sign_resolution: false");
    }
    if (params.contains("coeffs")) weights = params["coeffs"].get<std::vector<double>>();
    settings.push_back("split_qkv: true");
  } else {
    if (method == "tsvm") method = "tsv_m";
    if (params.contains("alpha")) {
      settings.push_back(absl::StrCat("lambda: ", params["alpha"].get<double>()));
    }
    if (params.contains("scale")) {
      settings.push_back(absl::StrCat("lambda: ", params["scale"].get<double>()));
    }
    if (params.contains("common_fraction")) {
      settings.push_back(
          absl::StrCat("common_fraction: ", params["common_fraction"].get<double>()));
    }
    if (params.contains("topk_percent")) {
      settings.push_back(absl::StrCat("density: ", params["topk_percent"].get<double>() / 100));
    }
  }
  parameters = absl::StrJoin(settings, ", ");
}

// Base and tasks of a case; adapters as what they add up to.
Models ModelsOf(const json& one, const std::map<std::string, TinyTensor>& stored) {
  Models models;
  for (int t = -1; t < one["T"].get<int>(); ++t) {
    std::vector<TinyTensor>& model = models.emplace_back();
    for (const auto& [name, facts] : one["tensors"].items()) {
      const TinyTensor& base = stored.at("base." + name);
      TinyTensor tensor = base;
      const std::string own = absl::StrCat("task", t, ".", name);
      if (t >= 0 && facts["kind"] == "lora") {
        const TinyTensor &a = stored.at(own + ".lora_A"), &b = stored.at(own + ".lora_B");
        Dense of_a(a.shape[0], a.shape[1]), of_b(b.shape[0], b.shape[1]);
        of_a.values = a.values;
        of_b.values = b.values;
        const Dense product = Scaled(Times(of_b, of_a), facts["scale"]);
        tensor.dtype = DType::kF64;
        for (size_t i = 0; i < tensor.values.size(); ++i) tensor.values[i] += product.values[i];
      } else if (t >= 0) {
        tensor = stored.at(own);
      }
      tensor.name = name;
      model.push_back(std::move(tensor));
    }
  }
  return models;
}

TEST_P(SvdGoldenTest, Agrees) {
  const std::vector<json> cases = GoldenCases();
  if (cases.empty()) GTEST_SKIP() << "no references at " << GoldenFolder();
  const json& one = cases[GetParam()];
  SCOPED_TRACE(one["id"].get<std::string>());
  const auto stored = ReadTensors(GoldenFolder() / one["file"].get<std::string>());
  std::string method, parameters;
  std::vector<double> weights;
  Translate(one, method, parameters, weights);
  const Models models = ModelsOf(one, stored);
  for (const auto& [dtype, tolerance] :
       {std::pair<std::string, double>{"float64", 1e-9}, {"float32", 5e-5}}) {
    const auto merged = Merge(models, method, parameters, weights, dtype);
    ASSERT_THAT(merged, IsOk());
    for (const auto& [name, facts] : one["tensors"].items()) {
      const std::vector<double>& base = stored.at("base." + name).values;
      const std::vector<double>& want = stored.at("expected_delta." + name).values;
      std::vector<double> got = merged->at(name).values;
      for (size_t i = 0; i < got.size(); ++i) got[i] -= base[i];
      EXPECT_LE(LargestDifference(got, want), tolerance * LargestOf(want)) << dtype << " " << name;
    }
  }
}

std::string GoldenName(int index) {
  const std::vector<json> cases = GoldenCases();
  return cases.empty() ? "none" : cases[index]["id"].get<std::string>();
}

INSTANTIATE_TEST_SUITE_P(References, SvdGoldenTest,
                         ::testing::Range(0, std::max(1, static_cast<int>(GoldenCases().size()))),
                         [](const auto& info) { return GoldenName(info.param); });

// --- DRM --------------------------------------------------------------------------------------

struct Setting {
  const char* direction;
  int64_t rows, columns;
  int tasks;
};

class DrmTest : public ::testing::TestWithParam<Setting> {
 protected:
  static constexpr double kTolerance = 1e-11;

  std::vector<Dense> Tasks(int seed = 1) const {
    return RandomTasks(GetParam().rows, GetParam().columns, GetParam().tasks, seed);
  }
  bool horizontal() const { return GetParam().direction == std::string("horizontal"); }
  std::string Parameters(const std::string& more = "") const {
    return absl::StrCat("direction: ", GetParam().direction, more.empty() ? "" : ", ", more);
  }
  Dense MergeTasks(const std::vector<Dense>& tasks, const std::string& more = "",
                   const std::vector<double>& weights = {}) const {
    return MergeOnZeros(tasks, "drm", Parameters(more), weights);
  }
  static void ExpectNear(const Dense& got, const Dense& want) {
    EXPECT_GT(LargestOf(want.values), 0);
    EXPECT_LE(LargestDifference(got.values, want.values), kTolerance * LargestOf(want.values));
  }
};

TEST_P(DrmTest, TasksMayComeInAnyOrder) {
  const std::vector<Dense> tasks = Tasks();
  std::vector<double> weights;
  for (size_t t = 0; t < tasks.size(); ++t) weights.push_back(0.5 + 0.25 * static_cast<double>(t));
  const Dense want = MergeTasks(tasks, "", weights);
  ExpectNear(MergeTasks({tasks.rbegin(), tasks.rend()}, "", {weights.rbegin(), weights.rend()}),
             want);
}

TEST_P(DrmTest, ScalingAllTaskVectorsScalesTheMerge) {
  const std::vector<Dense> tasks = Tasks();
  const Dense want = MergeTasks(tasks);
  // A power of two to the last bit.
  EXPECT_EQ(MergeTasks(Each(tasks, [](const Dense& d) { return Scaled(d, 0.125); })).values,
            Scaled(want, 0.125).values);
  ExpectNear(MergeTasks(Each(tasks, [](const Dense& d) { return Scaled(d, 0.3); })),
             Scaled(want, 0.3));
}

TEST_P(DrmTest, ARotationOfTheSharedSideRotatesTheMerge) {
  const std::vector<Dense> tasks = Tasks();
  const Dense q = RandomOrthogonal(horizontal() ? GetParam().rows : GetParam().columns, 5);
  const auto rotate = [&](const Dense& d) { return horizontal() ? Times(q, d) : Times(d, q); };
  ExpectNear(MergeTasks(Each(tasks, rotate)), rotate(MergeTasks(tasks)));
}

TEST_P(DrmTest, ZerosOnTheSharedSideChangeNothing) {
  const std::vector<Dense> tasks = Tasks();
  const int64_t more = 7;
  const auto extend = [&](const Dense& d) {
    Dense larger(d.rows + (horizontal() ? more : 0), d.columns + (horizontal() ? 0 : more));
    for (int64_t i = 0; i < d.rows; ++i) {
      for (int64_t j = 0; j < d.columns; ++j) larger(i, j) = d(i, j);
    }
    return larger;
  };
  ExpectNear(MergeTasks(Each(tasks, extend)), extend(MergeTasks(tasks)));
}

TEST_P(DrmTest, TheOtherDirectionIsThatOfTheTransposed) {
  const std::vector<Dense> tasks = Tasks();
  const Dense other =
      MergeOnZeros(Each(tasks, Transposed), "drm",
                   absl::StrCat("direction: ", horizontal() ? "vertical" : "horizontal"));
  ExpectNear(Transposed(other), MergeTasks(tasks));
  // And no other: the two directions are different merges.
  const Dense untransposed = MergeOnZeros(
      tasks, "drm", absl::StrCat("direction: ", horizontal() ? "vertical" : "horizontal"));
  const Dense want = MergeTasks(tasks);
  EXPECT_GT(LargestDifference(untransposed.values, want.values), 1e-3 * LargestOf(want.values));
}

TEST_P(DrmTest, CopiesOfATaskMergeToTheMergeOfOne) {
  const Dense task = Tasks()[0];
  // 0.25 of the entries is a whole number.
  const Dense want = MergeTasks({task}, "density: 0.25");
  ExpectNear(MergeTasks({task, task, task}, "density: 0.25"), want);
}

// Nothing is below the threshold, nothing has another sign.
TEST_P(DrmTest, OneTaskOfWhichAllIsKeptIsItself) {
  const Dense task = Tasks()[0];
  ExpectNear(MergeTasks({task}, "density: 0.999999999, rank_cut: 1e-6"), task);
}

// What is projected cancels to the last bit. Where blocks are eigenvectors it does so but for
// rounding, and a sum that is nearly 0 elects a sign, as it does in the definition's arithmetic.
TEST_P(DrmTest, OppositeTasksCancel) {
  const Dense task = Tasks()[0];
  const Dense merged = MergeTasks({task, Scaled(task, -1)});
  const int64_t side = horizontal() ? task.rows : task.columns;
  const bool projected = 2 * (horizontal() ? task.columns : task.rows) >= side;
  EXPECT_LE(LargestOf(merged.values), projected ? 0 : 2 * LargestOf(task.values));
}

TEST_P(DrmTest, WeightsScaleAfterTheElection) {
  const std::vector<Dense> tasks = Tasks();
  const std::vector<double> twos(tasks.size(), 2.0);
  EXPECT_EQ(MergeTasks(tasks, "", twos).values, Scaled(MergeTasks(tasks), 2).values);
  // Without the disjoint mean all models divide; a weight of 0 takes its model out of the sum.
  std::vector<double> first(tasks.size(), 0.0);
  first[0] = static_cast<double>(tasks.size());
  ExpectNear(MergeTasks(tasks, "disjoint_mean: false", first),
             Scaled(MergeTasks(tasks, "disjoint_mean: true", first),
                    1.0 / static_cast<double>(tasks.size())));
}

// A task that changes nothing is absent from the mean; its zeros count among the entries.
TEST_P(DrmTest, ATaskOfZerosIsAbsent) {
  const std::vector<Dense> tasks = Tasks();
  std::vector<Dense> with_zeros = tasks;
  with_zeros.emplace_back(GetParam().rows, GetParam().columns);
  const auto share = static_cast<double>(tasks.size()) / static_cast<double>(tasks.size() + 1);
  ExpectNear(MergeTasks(with_zeros, absl::StrCat("density: ", 0.25 * share)),
             MergeTasks(tasks, "density: 0.25"));
}

// Tasks whose shared spaces are orthogonal: each direction belongs to one of them, and the rows
// that the others have there are nothing.
TEST_P(DrmTest, TasksThatShareNothingAreMergedOneByOne) {
  const Dense a = Tasks()[0], b = Tasks(77)[0];
  const auto place = [&](const Dense& d, bool second) {
    const int64_t rows = d.rows * (horizontal() ? 2 : 1),
                  columns = d.columns * (horizontal() ? 1 : 2);
    Dense larger(rows, columns);
    for (int64_t i = 0; i < d.rows; ++i) {
      for (int64_t j = 0; j < d.columns; ++j) {
        // Interleaved, so that no block structure helps.
        larger(horizontal() ? 2 * i + (second ? 1 : 0) : i,
               horizontal() ? j : 2 * j + (second ? 1 : 0)) = d(i, j);
      }
    }
    return larger;
  };
  const std::vector<Dense> apart = {place(a, false), place(b, true)};
  const Dense merged = MergeTasks(apart, "density: 0.15");
  // A third that is all zeros takes part in nothing but the count: a smaller density of more.
  std::vector<Dense> more = apart;
  more.emplace_back(apart[0].rows, apart[0].columns);
  ExpectNear(MergeTasks(more, "density: 0.1"), merged);
  // An entry comes from one task, undivided: doubling one doubles its part and leaves the other's
  // directions (the ranks agree: no singular value is near the cut).
  const Dense doubled = MergeTasks(apart, "density: 0.15", {2, 1});
  int64_t twice = 0, same = 0;
  for (size_t i = 0; i < merged.values.size(); ++i) {
    if (std::abs(merged.values[i]) < 1e-6) continue;
    const double ratio = doubled.values[i] / merged.values[i];
    if (std::abs(ratio - 2) < 1e-6) ++twice;
    if (std::abs(ratio - 1) < 1e-6) ++same;
  }
  EXPECT_GT(twice, static_cast<int64_t>(merged.values.size()) / 4);
  EXPECT_GT(same, static_cast<int64_t>(merged.values.size()) / 4);
}

TEST_P(DrmTest, NoTaskDiffersFromTheBase) {
  Models models = OnZeros(Tasks());
  for (std::vector<TinyTensor>& model : models) {
    for (size_t i = 0; i < model[0].values.size(); ++i) {
      model[0].values[i] = std::sin(static_cast<double>(i));
    }
  }
  const auto merged = Merge(models, "drm", Parameters());
  ASSERT_THAT(merged, IsOk());
  EXPECT_EQ(merged->at("fc.weight").values, models[0][0].values);
}

TEST_P(DrmTest, TasksOfRankOne) {
  const Dense u = Random(GetParam().rows, 1, 3), v = Random(1, GetParam().columns, 4);
  const Dense task = Times(u, v);
  const Dense merged = MergeTasks({task, Scaled(task, 0.5)}, "density: 0.5");
  // What is kept lies in the one direction.
  const Dense& line = horizontal() ? u : v;
  double square = 0;
  for (double value : line.values) square += value * value;
  Dense projected = horizontal() ? Times(u, Times(Transposed(u), merged))
                                 : Times(Times(merged, Transposed(v)), v);
  ExpectNear(Scaled(projected, 1 / square), merged);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, DrmTest,
    ::testing::Values(Setting{"horizontal", 24, 40, 3}, Setting{"vertical", 24, 40, 3},
                      Setting{"horizontal", 40, 24, 2}, Setting{"vertical", 40, 24, 4},
                      // The other side is the smaller one.
                      Setting{"horizontal", 60, 12, 3}, Setting{"vertical", 12, 60, 3}),
    [](const auto& info) {
      const Setting& s = info.param;
      return absl::StrCat(s.direction, "_", s.rows, "x", s.columns, "_of_", s.tasks);
    });

TEST(Drm, DirectionByRank) {
  // All columns in one direction: horizontally of rank 1.
  const Dense u = Random(20, 1, 1);
  std::vector<Dense> tasks;
  for (int t = 0; t < 3; ++t) tasks.push_back(Times(u, Random(1, 20, 2 + t)));
  const Dense horizontal = MergeOnZeros(tasks, "drm", "direction: horizontal");
  const Dense vertical = MergeOnZeros(tasks, "drm", "direction: vertical");
  ASSERT_NE(horizontal.values, vertical.values);
  EXPECT_EQ(MergeOnZeros(tasks, "drm", "direction: auto_rank").values, horizontal.values);
  const std::vector<Dense> turned = Each(tasks, Transposed);
  EXPECT_EQ(MergeOnZeros(turned, "drm", "direction: auto_rank").values,
            MergeOnZeros(turned, "drm", "direction: vertical").values);
}

TEST(Drm, DirectionByOrthogonality) {
  // Each task has rows of its own and all share their columns' places: the singular matrices of
  // the vertical stack are orthogonal, those of the horizontal one are not.
  const Dense v = Random(4, 30, 1);
  std::vector<Dense> tasks;
  for (int t = 0; t < 3; ++t) {
    Dense task(30, 30);
    const Dense rows = Times(Random(10, 4, 5 + t), v);
    for (int64_t i = 0; i < 10; ++i) {
      for (int64_t j = 0; j < 30; ++j) task(10 * t + i, j) = rows(i, j);
    }
    tasks.push_back(std::move(task));
  }
  const Dense chosen = MergeOnZeros(tasks, "drm", "direction: auto_orthogonality");
  const Dense turned =
      MergeOnZeros(Each(tasks, Transposed), "drm", "direction: auto_orthogonality");
  // Whatever is chosen, for the transposed it is the other.
  EXPECT_LE(LargestDifference(Transposed(turned).values, chosen.values),
            1e-11 * LargestOf(chosen.values));
  const bool horizontal =
      chosen.values == MergeOnZeros(tasks, "drm", "direction: horizontal").values;
  const bool vertical = chosen.values == MergeOnZeros(tasks, "drm", "direction: vertical").values;
  EXPECT_NE(horizontal, vertical);
}

TEST(Drm, QueryKeyAndValueAreMergedIndependently) {
  const std::vector<Dense> tasks = RandomTasks(48, 16, 2, 9);
  const auto merged = Merge(OnZeros(tasks, "attn.in_proj_weight"), "drm", "split_qkv: true");
  ASSERT_THAT(merged, IsOk());
  std::vector<double> want;
  for (int64_t part = 0; part < 3; ++part) {
    const auto rows = [&](const Dense& d) {
      Dense own(16, 16);
      std::copy_n(d.values.begin() + part * 256, 256, own.values.begin());
      return own;
    };
    const Dense one = MergeOnZeros(Each(tasks, rows), "drm", "");
    want.insert(want.end(), one.values.begin(), one.values.end());
  }
  EXPECT_EQ(merged->at("attn.in_proj_weight").values, want);
}

TEST(Drm, PatternsSayWhatIsLinear) {
  Models models(3);
  const std::vector<Dense> tasks = RandomTasks(16, 16, 2, 4);
  const Shape square{16, 16};
  for (const char* name : {"embed_tokens.weight", "fc.weight", "gate.weight", "head.weight"}) {
    models[0].push_back({name, DType::kF64, square, std::vector<double>(256)});
    for (int t = 0; t < 2; ++t) {
      models[t + 1].push_back({name, DType::kF64, square, tasks[t].values});
    }
  }
  const Dense linear = MergeOnZeros(tasks, "drm", "");
  // Elementwise: where the signs agree the mean, else the one of the larger, as its sign is the
  // sum's.
  std::vector<double> elementwise;
  for (size_t i = 0; i < 256; ++i) {
    const double a = tasks[0].values[i], b = tasks[1].values[i];
    elementwise.push_back(a * b > 0 ? (a + b) / 2 : std::abs(a) > std::abs(b) ? a : b);
  }
  const auto check = [&](const std::string& parameters, const std::string& name,
                         const std::vector<double>& want) {
    const auto merged = Merge(models, "drm", parameters);
    ASSERT_THAT(merged, IsOk());
    EXPECT_LE(LargestDifference(merged->at(name).values, want), 1e-15) << parameters << " " << name;
  };
  check("density: 0.2", "fc.weight", linear.values);
  check("density: 0.2", "embed_tokens.weight", elementwise);
  check("linear_exclude: 'no such'", "embed_tokens.weight", linear.values);
  check("linear_exclude: ['gate', 'head']", "gate.weight", elementwise);
  check("linear_exclude: ['gate', 'head']", "head.weight", elementwise);
  check("linear_exclude: ['gate', 'head']", "fc.weight", linear.values);
  check("linear_include: ['f.*']", "gate.weight", elementwise);
  // From the beginning of the name.
  check("linear_include: ['weight']", "fc.weight", elementwise);
  check("ignore: ['head', 'g']", "head.weight", std::vector<double>(256));
  check("ignore: ['head', 'g']", "fc.weight", linear.values);
  // A density of 1 is the mean of what is not zero, whatever the weights.
  std::vector<double> mean;
  for (size_t i = 0; i < 256; ++i) mean.push_back((tasks[0].values[i] + tasks[1].values[i]) / 2);
  check("density: 1, weight: 3", "fc.weight", mean);
  EXPECT_THAT(Merge(models, "drm", "ignore: '('"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("ignore"), HasSubstr("regular expression"))));
}

TEST(Drm, SumsOfZeroTakeTheSignOfTheMost) {
  Models models = {{{"bias", DType::kF64, {4}, {0, 0, 0, 0}}},
                   {{"bias", DType::kF64, {4}, {2, 1, -1, 3}}},
                   {{"bias", DType::kF64, {4}, {4, -1, 1, -1}}}};
  // Signs: +, 0, 0, +.
  auto merged = Merge(models, "drm", "");
  ASSERT_THAT(merged, IsOk());
  EXPECT_EQ(merged->at("bias").values, (std::vector<double>{3, 1, 1, 3}));
  merged = Merge(models, "drm", "sign_resolution: false");
  ASSERT_THAT(merged, IsOk());
  EXPECT_EQ(merged->at("bias").values, (std::vector<double>{3, 0, 0, 1}));
  merged = Merge(models, "drm", "", {1, 0});
  ASSERT_THAT(merged, IsOk());
  EXPECT_EQ(merged->at("bias").values, (std::vector<double>{2, 1, 0, 3}));
}

TEST(Drm, ValuesThatAreNotFiniteAreRefused) {
  Models models = OnZeros(RandomTasks(8, 8, 2, 1));
  models[1][0].values[5] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(Merge(models, "drm", ""),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("fc.weight"), HasSubstr("NaN or infinite"))));
}

TEST(Drm, ThreadsDoNotMatter) {
  Models models(3);
  for (int i = 0; i < 6; ++i) {
    const std::vector<Dense> tasks = RandomTasks(30 + i, 20, 2, i);
    const Models one = OnZeros(tasks, absl::StrCat("layer", i, ".weight"));
    for (int m = 0; m < 3; ++m) models[m].push_back(one[m][0]);
  }
  const auto alone = Merge(models, "drm", "", {}, "float32", {.threads = 1});
  const auto together = Merge(models, "drm", "", {}, "float32", {.threads = 4});
  ASSERT_THAT(alone, IsOk());
  ASSERT_THAT(together, IsOk());
  for (const auto& [name, tensor] : *alone) EXPECT_EQ(together->at(name).values, tensor.values);
}

TEST(Drm, WhatDoesNotFitIsRefusedWhilePlanning) {
  EXPECT_THAT(Merge(OnZeros(RandomTasks(300, 300, 3, 1)), "drm", "", {}, "float32",
                    {.memory_bytes = 4 << 20}),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("fc.weight"), HasSubstr("raise --memory"))));
}

// Files of holes: nothing of them is read.
TEST(Drm, EigenvalueProblemsThatAreTooLargeAreRefused) {
  const TempFolder folder;
  const int64_t side = 33'000;
  const std::string header = absl::StrCat(R"({"fc.weight":{"dtype":"BF16","shape":[)", side, ",",
                                          side, R"(],"data_offsets":[0,)", 2 * side * side, "]}}");
  std::string recipe =
      absl::StrCat("merge_method: drm\nbase_model: ", folder / "m0", "\nmodels:\n");
  for (int i = 0; i < 3; ++i) {
    const std::string file = folder / absl::StrCat("m", i, "/model.safetensors");
    fs::create_directory(folder / absl::StrCat("m", i));
    uint64_t size = header.size();
    std::string bytes(reinterpret_cast<const char*>(&size), 8);
    testing::WriteFile(file, bytes + header);
    fs::resize_file(file, 8 + size + 2 * side * side);
    if (i > 0) absl::StrAppend(&recipe, "  - model: ", folder / absl::StrCat("m", i), "\n");
  }
  const auto parsed = ParseRecipe(recipe);
  ASSERT_THAT(parsed, IsOk());
  EXPECT_THAT(
      MakePlan(*parsed, {.memory_bytes = int64_t{1} << 60}),
      StatusIs(absl::StatusCode::kResourceExhausted,
               AllOf(HasSubstr("fc.weight"), HasSubstr("33000"), HasSubstr("linear_exclude"))));
}

// --- Adapters ---------------------------------------------------------------------------------

// Merges adapters on a base of zeros by their factors, and what they add up to by itself.
class AdapterTest : public ::testing::TestWithParam<const char*> {
 protected:
  static constexpr int64_t kRows = 28, kColumns = 20;

  struct Adapter {
    Dense a, b;
    double scale;
  };
  static Adapter MakeAdapter(int64_t rank, int seed) {
    const auto rounded = [](Dense m) {
      for (double& value : m.values) value = static_cast<float>(0.1 * value);
      return m;
    };
    return {rounded(Random(rank, kColumns, seed)), rounded(Random(kRows, rank, seed + 1)), 2};
  }
  static Dense DeltaOf(const Adapter& adapter) {
    return Scaled(Times(adapter.b, adapter.a), adapter.scale);
  }

  // Folder 0 is the base, `whole` models follow, then adapters.
  absl::StatusOr<Plan> PlanOf(const std::vector<Dense>& whole,
                              const std::vector<Adapter>& adapters) {
    const auto write = [&](const std::string& name, const Dense& values) {
      fs::create_directories(folder_ / name);
      WriteSafetensors(folder_ / (name + "/model.safetensors"),
                       {{"fc.weight", DType::kF64, {kRows, kColumns}, values.values}});
    };
    write("base", Dense(kRows, kColumns));
    std::vector<std::string> models;
    for (const Dense& dense : whole) {
      write(absl::StrCat("whole", models.size()), dense);
      models.push_back(folder_ / absl::StrCat("whole", models.size()));
    }
    for (const Adapter& adapter : adapters) {
      const std::string name = absl::StrCat("adapter", models.size());
      const int64_t rank = adapter.a.rows;
      folder_.Write(name + "/adapter_config.json",
                    absl::StrCat(R"({"peft_type":"LORA","r":)", rank, R"(,"lora_alpha":)",
                                 adapter.scale * static_cast<double>(rank), "}"));
      const std::string prefix = "base_model.model.fc";
      WriteSafetensors(
          folder_ / (name + "/adapter_model.safetensors"),
          {{prefix + ".lora_A.weight", DType::kF32, {rank, kColumns}, adapter.a.values},
           {prefix + ".lora_B.weight", DType::kF32, {kRows, rank}, adapter.b.values}});
      models.push_back(absl::StrCat(folder_ / "base", "+", folder_ / name));
    }
    std::string recipe =
        absl::StrCat("merge_method: ", Method(), "\nbase_model: ", folder_ / "base", "\nmodels:\n");
    for (const std::string& model : models) absl::StrAppend(&recipe, "  - model: ", model, "\n");
    absl::StrAppend(&recipe, "parameters: {", Parameters(), "}\ndtype: float64\n");
    absl::StatusOr<Recipe> parsed = ParseRecipe(recipe);
    if (!parsed.ok()) return parsed.status();
    PlanOptions options;
    options.device = "cpu";
    return MakePlan(*parsed, options);
  }

  void ExpectSame(const std::vector<Dense>& whole, const std::vector<Adapter>& adapters) {
    const auto plan = PlanOf(whole, adapters);
    ASSERT_THAT(plan, IsOk());
    const auto manifest = RunPlan(*plan, {.output = folder_ / "out"});
    ASSERT_THAT(manifest, IsOk());
    const std::vector<double> got = ReadTensors(folder_ / "out").at("fc.weight").values;
    std::vector<Dense> dense = whole;
    for (const Adapter& adapter : adapters) dense.push_back(DeltaOf(adapter));
    const Dense want = MergeOnZeros(dense, Method(), Parameters());
    EXPECT_GT(LargestOf(want.values), 0);
    EXPECT_LE(LargestDifference(got, want.values), 1e-9 * LargestOf(want.values));
    // By its factors an adapter's own weight is never made, nor is the base read for it.
    const json read = json::parse(manifest->json)["inputs"];
    for (const json& model : read) {
      if (model["model"].get<std::string>().find('+') == std::string::npos) continue;
      EXPECT_FALSE(model["files"][0].contains("crc32c")) << model.dump(1);
    }
  }

  std::string Method() const {
    return std::string(GetParam()).starts_with("drm") ? "drm" : GetParam();
  }
  std::string Parameters() const {
    return GetParam() == std::string("drm_vertical") ? "direction: vertical" : "";
  }

  const TempFolder folder_;
};

TEST_P(AdapterTest, TheirFactorsMergeAsTheirProducts) {
  ExpectSame({}, {MakeAdapter(3, 1), MakeAdapter(5, 20), MakeAdapter(3, 40)});
}

// The ranks sum to more than either side.
TEST_P(AdapterTest, OfRanksBeyondTheWeight) {
  ExpectSame({}, {MakeAdapter(16, 1), MakeAdapter(15, 20)});
}

TEST_P(AdapterTest, BesideWholeModels) {
  ExpectSame(RandomTasks(kRows, kColumns, 2, 5), {MakeAdapter(4, 1), MakeAdapter(8, 20)});
}

INSTANTIATE_TEST_SUITE_P(Methods, AdapterTest,
                         ::testing::Values("drm", "drm_vertical", "knots_ties", "tsv_m"),
                         [](const auto& info) { return std::string(info.param); });

// As an adapter again, of their ranks' sum, and cut to the nearest of a smaller rank.
TEST_P(AdapterTest, AsAnAdapter) {
  if (Method() != "drm") return;
  const std::vector<Adapter> adapters = {MakeAdapter(3, 1), MakeAdapter(5, 20), MakeAdapter(2, 40)};
  ASSERT_THAT(PlanOf({}, adapters), IsOk());  // writes them
  const auto merge = [&](const std::string& more, const std::string& out) {
    std::string recipe = "merge_method: drm\noutput: {format: lora}\nmodels:\n";
    for (int i = 0; i < 3; ++i) {
      absl::StrAppend(&recipe, "  - model: ", folder_ / absl::StrCat("adapter", i), "\n");
    }
    absl::StrAppend(&recipe, "parameters: {", Parameters(), Parameters().empty() ? "" : ", ", more,
                    "}\n");
    Dense product(kRows, kColumns);
    const absl::StatusOr<Recipe> parsed = ParseRecipe(recipe);
    EXPECT_THAT(parsed, IsOk());
    if (!parsed.ok()) return product;
    PlanOptions options;
    options.device = "cpu";
    const absl::StatusOr<Plan> plan = MakePlan(*parsed, options);
    EXPECT_THAT(plan, IsOk());
    if (!plan.ok()) return product;
    EXPECT_THAT(RunPlan(*plan, {.output = folder_ / out}), IsOk());
    const auto tensors = ReadTensors(folder_ / (out + "/adapter_model.safetensors"));
    const TinyTensor& a = tensors.at("base_model.model.fc.lora_A.weight");
    const TinyTensor& b = tensors.at("base_model.model.fc.lora_B.weight");
    Dense of_a(a.shape[0], a.shape[1]), of_b(b.shape[0], b.shape[1]);
    of_a.values = a.values;
    of_b.values = b.values;
    EXPECT_EQ(of_a.rows, of_b.columns);
    return Times(of_b, of_a);
  };
  std::vector<Dense> dense;
  for (const Adapter& adapter : adapters) dense.push_back(DeltaOf(adapter));
  const Dense want = MergeOnZeros(dense, "drm", Parameters());
  const Dense whole = merge("svd_rank: 10", "whole");
  EXPECT_GT(LargestOf(want.values), 0);
  EXPECT_LE(LargestDifference(whole.values, want.values), 1e-6 * LargestOf(want.values));
  const Dense cut = merge("svd_rank: 4", "cut");
  EXPECT_EQ(RankOf(cut), 4);
  // A projection: what is left out is orthogonal to it.
  double product = 0, square = 0;
  for (size_t i = 0; i < cut.values.size(); ++i) {
    product += cut.values[i] * (want.values[i] - cut.values[i]);
    square += want.values[i] * want.values[i];
  }
  EXPECT_LE(std::abs(product), 1e-6 * square);
}

class IsoAdapterTest : public AdapterTest {};

TEST_P(IsoAdapterTest, SumsWithoutFullRankAreRefusedWhilePlanning) {
  EXPECT_THAT(PlanOf({}, {MakeAdapter(3, 1), MakeAdapter(5, 20)}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("fc.weight"), HasSubstr("rank 8 of 20"))));
}

TEST_P(IsoAdapterTest, BesideWholeModels) {
  if (GetParam() == std::string("iso_cts")) return;  // an adapter has too few directions of its own
  ExpectSame(RandomTasks(kRows, kColumns, 2, 5), {MakeAdapter(4, 1)});
}

INSTANTIATE_TEST_SUITE_P(Methods, IsoAdapterTest, ::testing::Values("iso_c", "iso_cts"),
                         [](const auto& info) { return std::string(info.param); });

// --- The others -------------------------------------------------------------------------------

constexpr char kRefusal[] = "linear_exclude";

class FamilyTest : public ::testing::TestWithParam<const char*> {
 protected:
  static absl::StatusOr<std::map<std::string, TinyTensor>> MergeTasks(
      const std::vector<Dense>& tasks, const std::string& parameters = "") {
    return Merge(OnZeros(tasks), GetParam(), parameters);
  }
};

TEST_P(FamilyTest, TasksMayComeInAnyOrder) {
  if (GetParam() == std::string("knots_dare_ties")) return;  // draws go by place
  const std::vector<Dense> tasks = RandomTasks(18, 30, 3, 2);
  const auto want = MergeTasks(tasks), got = MergeTasks({tasks.rbegin(), tasks.rend()});
  ASSERT_THAT(want, IsOk());
  ASSERT_THAT(got, IsOk());
  const std::vector<double>& expected = want->at("fc.weight").values;
  EXPECT_LE(LargestDifference(got->at("fc.weight").values, expected), 1e-10 * LargestOf(expected));
}

TEST_P(FamilyTest, LambdaScalesTheMerge) {
  const std::vector<Dense> tasks = RandomTasks(20, 14, 2, 3);
  const auto one = MergeTasks(tasks), two = MergeTasks(tasks, "lambda: 2");
  ASSERT_THAT(one, IsOk());
  ASSERT_THAT(two, IsOk());
  std::vector<double> doubled = one->at("fc.weight").values;
  for (double& value : doubled) value *= 2;
  EXPECT_GT(LargestOf(doubled), 0);
  EXPECT_LE(LargestDifference(two->at("fc.weight").values, doubled), 1e-14 * LargestOf(doubled));
}

// The definitions have no side: what is transposed, merges transposed. KnOTS has one, and Iso-CTS
// takes what is common out on the left.
TEST_P(FamilyTest, TheTransposedMergeIsTransposed) {
  if (GetParam() != std::string("tsv_m") && GetParam() != std::string("iso_c")) return;
  const std::vector<Dense> tasks = RandomTasks(20, 14, 2, 4);
  const auto want = MergeTasks(tasks), got = MergeTasks(Each(tasks, Transposed));
  ASSERT_THAT(want, IsOk());
  ASSERT_THAT(got, IsOk());
  Dense turned(14, 20);
  turned.values = got->at("fc.weight").values;
  EXPECT_LE(LargestDifference(Transposed(turned).values, want->at("fc.weight").values),
            1e-9 * LargestOf(turned.values));
}

TEST_P(FamilyTest, NoTaskDiffersFromTheBase) {
  Models models = OnZeros({Dense(6, 9), Dense(6, 9)});
  for (std::vector<TinyTensor>& model : models) {
    for (size_t i = 0; i < 54; ++i) model[0].values[i] = std::cos(static_cast<double>(i));
  }
  const auto merged = Merge(models, GetParam(), "");
  ASSERT_THAT(merged, IsOk());
  EXPECT_EQ(merged->at("fc.weight").values, models[0][0].values);
}

// A task that leaves a weight as it is adds nothing of its own, wherever it is listed.
TEST_P(FamilyTest, ATaskOfZeros) {
  if (GetParam() == std::string("knots_dare_ties")) return;  // draws go by place
  const std::vector<Dense> tasks = RandomTasks(20, 14, 2, 3);
  const Dense zeros(20, 14);
  const auto last = MergeTasks({tasks[0], tasks[1], zeros}),
             first = MergeTasks({zeros, tasks[0], tasks[1]});
  ASSERT_THAT(last, IsOk());
  ASSERT_THAT(first, IsOk());
  const std::vector<double>& values = last->at("fc.weight").values;
  EXPECT_GT(LargestOf(values), 0);
  EXPECT_LE(LargestDifference(first->at("fc.weight").values, values), 1e-10 * LargestOf(values));
  if (GetParam() == std::string("iso_c")) {
    EXPECT_LE(LargestDifference(MergeTasks(tasks)->at("fc.weight").values, values),
              1e-12 * LargestOf(values));
  }
  if (GetParam() != std::string("tsv_m")) return;
  // floor(14 / 3) triplets of each of the two: the merge has no more directions.
  Dense merged(20, 14);
  merged.values = values;
  EXPECT_EQ(RankOf(merged), 8);
}

TEST_P(FamilyTest, OneTask) {
  const std::vector<Dense> tasks = RandomTasks(16, 12, 1, 3);
  const std::string density = std::string(GetParam()).starts_with("knots") ? "density: 1" : "";
  const auto merged = MergeTasks(
      tasks, GetParam() == std::string("knots_dare_ties") ? "density: 1, drop: 0" : density);
  ASSERT_THAT(merged, IsOk());
  const std::vector<double>& values = merged->at("fc.weight").values;
  // All its triplets, or all that KnOTS aligns: itself. Iso makes its values equal.
  const bool iso = std::string(GetParam()).starts_with("iso");
  const double difference = LargestDifference(values, tasks[0].values);
  const double largest = LargestOf(tasks[0].values);
  EXPECT_EQ(difference <= 1e-11 * largest, !iso) << difference;
}

TEST_P(FamilyTest, ValuesThatAreNotFiniteAreRefused) {
  Models models = OnZeros(RandomTasks(8, 8, 2, 1));
  models[2][0].values[5] = std::numeric_limits<double>::infinity();
  EXPECT_THAT(Merge(models, GetParam(), ""),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("fc.weight"), HasSubstr("NaN or infinite"))));
}

// Methods that give every direction the same weight, or make directions orthogonal, refuse what
// has too few of them; KnOTS does not care.
TEST_P(FamilyTest, TasksOfLowRankAndIdenticalTasks) {
  const Dense low = Times(Random(16, 2, 1), Random(2, 12, 2));
  const auto merged = MergeTasks({low, Scaled(low, 0.5)});
  const Dense full = Random(16, 12, 3);
  const auto identical = MergeTasks({full, full});
  if (std::string(GetParam()).starts_with("knots")) {
    EXPECT_THAT(merged, IsOk());
    EXPECT_THAT(identical, IsOk());
    return;
  }
  EXPECT_THAT(merged, StatusIs(absl::StatusCode::kFailedPrecondition,
                               AllOf(HasSubstr("fc.weight"), HasSubstr(kRefusal))));
  if (GetParam() == std::string("iso_c")) {
    EXPECT_THAT(identical, IsOk());
  } else if (GetParam() == std::string("tsv_m")) {
    EXPECT_THAT(identical, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(kRefusal)));
  }
}

TEST_P(FamilyTest, OtherTensorsAreTheMean) {
  Models models = {{{"bias", DType::kF64, {3}, {1, 1, 1}}},
                   {{"bias", DType::kF64, {3}, {2, 1, -1}}},
                   {{"bias", DType::kF64, {3}, {4, 2, 1}}}};
  for (std::vector<TinyTensor>& model : models) {
    Dense weight = Random(5, 4, static_cast<int>(&model - models.data()));
    model.push_back({"fc.weight", DType::kF64, {5, 4}, weight.values});
  }
  const auto merged = Merge(models, GetParam(), "lambda: 0.5");
  ASSERT_THAT(merged, IsOk());
  EXPECT_EQ(merged->at("bias").values, (std::vector<double>{2, 1.25, 0.5}));
}

TEST_P(FamilyTest, WhatDoesNotFitIsRefusedWhilePlanning) {
  EXPECT_THAT(Merge(OnZeros(RandomTasks(300, 300, 3, 1)), GetParam(), "", {}, "float32",
                    {.memory_bytes = 4 << 20}),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("fc.weight"), HasSubstr("raise --memory"))));
}

INSTANTIATE_TEST_SUITE_P(Methods, FamilyTest,
                         ::testing::Values("tsv_m", "iso_c", "iso_cts", "knots_ties",
                                           "knots_dare_ties"),
                         [](const auto& info) { return std::string(info.param); });

// --- Reports ----------------------------------------------------------------------------------

json ReportOf(const std::vector<Dense>& tasks, const std::string& method,
              const std::string& parameters, const std::string& output = "{report: true}") {
  const TempFolder folder;
  const Models models = OnZeros(tasks);
  std::string recipe = absl::StrCat("merge_method: ", method, "\nbase_model: ", folder / "m0",
                                    "\noutput: ", output, "\nmodels:\n");
  for (size_t i = 0; i < models.size(); ++i) {
    fs::create_directory(folder / absl::StrCat("m", i));
    WriteSafetensors(folder / absl::StrCat("m", i, "/model.safetensors"), models[i]);
    if (i > 0) absl::StrAppend(&recipe, "  - model: ", folder / absl::StrCat("m", i), "\n");
  }
  absl::StrAppend(&recipe, "parameters: {", parameters, "}\ndtype: float64\n");
  const absl::StatusOr<Recipe> parsed = ParseRecipe(recipe);
  EXPECT_THAT(parsed, IsOk());
  if (!parsed.ok()) return {};
  PlanOptions options;
  options.device = "cpu";
  const absl::StatusOr<Plan> plan = MakePlan(*parsed, options);
  EXPECT_THAT(plan, IsOk());
  if (!plan.ok()) return {};
  const absl::StatusOr<Manifest> manifest = RunPlan(*plan, {.output = folder / "out"});
  EXPECT_THAT(manifest, IsOk());
  return manifest.ok() ? json::parse(manifest->json) : json();
}

// Two tasks of one direction each, orthogonal, of norms 3 and 4; a third of both.
TEST(Report, TellsWhatTheJointSpaceIs) {
  Dense a(6, 8), b(6, 8), both(6, 8);
  a(1, 2) = both(1, 2) = 3;
  b(4, 5) = both(4, 5) = 4;
  const json drm = ReportOf({a, b, both}, "drm", "density: 0.9")["report"]["fc.weight"];
  // The stack's squared singular values are 16 + 16 and 9 + 9.
  EXPECT_EQ(drm["directions"], json({6.0, 2.0}));
  ASSERT_EQ(drm["spectrum"].size(), 6u);
  EXPECT_NEAR(drm["spectrum"][0].get<double>(), std::sqrt(32), 1e-12);
  EXPECT_NEAR(drm["spectrum"][1].get<double>(), std::sqrt(18), 1e-12);
  for (int t = 0; t < 3; ++t) EXPECT_NEAR(drm["in_directions"][t].get<double>(), 1, 1e-12);
  for (int t = 0; t < 3; ++t) EXPECT_NEAR(drm["kept"][t].get<double>(), 1, 1e-12);
  // Energies (0, 9), (16, 0) and (16, 9) in the two directions.
  EXPECT_NEAR(drm["overlap"][1].get<double>(), 0, 1e-12);
  EXPECT_NEAR(drm["overlap"][2].get<double>(), 9 / std::sqrt(16 * 16 + 9 * 9), 1e-12);
  EXPECT_NEAR(drm["overlap"][5].get<double>(), 16 / std::sqrt(16 * 16 + 9 * 9), 1e-12);

  // The smaller entries of each row go, but of the third task nothing is left in one direction.
  const json cut = ReportOf({a, b, both}, "drm", "rank_cut: 0.9")["report"]["fc.weight"];
  EXPECT_EQ(cut["directions"], json({6.0, 1.0}));
  EXPECT_NEAR(cut["in_directions"][0].get<double>(), 0, 1e-12);
  EXPECT_NEAR(cut["in_directions"][2].get<double>(), 16.0 / 25, 1e-12);

  // All models together keep one entry each and one more: of the third the smaller goes.
  const json knots = ReportOf({a, b, both}, "knots_ties", "density: 0")["report"]["fc.weight"];
  EXPECT_NEAR(knots["kept"][0].get<double>(), 1, 1e-12);
  EXPECT_NEAR(knots["kept"][2].get<double>(), 16.0 / 25, 1e-12);
}

TEST(Report, OfTheOthers) {
  const std::vector<Dense> tasks = RandomTasks(12, 10, 2, 5);
  const json tsv = ReportOf(tasks, "tsv_m", "")["report"]["fc.weight"];
  EXPECT_EQ(tsv["model 1: directions"], json({10.0, 5.0}));
  EXPECT_GT(tsv["kept"][0].get<double>(), 0.5);
  EXPECT_LT(tsv["kept"][0].get<double>(), 1);
  EXPECT_NEAR(tsv["overlap"][0].get<double>(), 1, 1e-12);
  EXPECT_GT(tsv["overlap"][1].get<double>(), 0);
  EXPECT_LT(tsv["overlap"][1].get<double>(), 1);
  EXPECT_EQ(ReportOf(tasks, "iso_c", "")["report"]["fc.weight"]["directions"], json({10.0, 10.0}));
  // Not where it is not asked for; said where there is none.
  EXPECT_FALSE(ReportOf(tasks, "drm", "", "{format: safetensors}").contains("report"));
  const json none = ReportOf(tasks, "task_arithmetic", "weight: 1");
  EXPECT_FALSE(none.contains("report"));
  EXPECT_THAT(none["warnings"].dump(), HasSubstr("decomposes nothing"));
}

// All singular values of the merge are the mean of those of the sum.
TEST(IsoC, SingularValuesAreEqual) {
  const std::vector<Dense> tasks = RandomTasks(12, 20, 3, 8);
  const Dense merged = MergeOnZeros(tasks, "iso_c", "");
  const Dense gram = Times(merged, Transposed(merged));
  const double square = gram(0, 0);
  for (int64_t i = 0; i < 12; ++i) {
    for (int64_t j = 0; j < 12; ++j) EXPECT_NEAR(gram(i, j), i == j ? square : 0, 1e-11 * square);
  }
}

// Two weights share one threshold a model, so that merging them apart gives something else.
TEST(Knots, ThresholdsAreThoseOfAllWeights) {
  const std::vector<Dense> large = RandomTasks(12, 16, 2, 5);
  const std::vector<Dense> small =
      Each(RandomTasks(10, 8, 2, 6), [](const Dense& d) { return Scaled(d, 0.001); });
  Models both = OnZeros(large, "large.weight");
  const Models others = OnZeros(small, "small.weight");
  for (size_t m = 0; m < both.size(); ++m) both[m].push_back(others[m][0]);
  const auto merged = Merge(both, "knots_ties", "density: 0.1");
  ASSERT_THAT(merged, IsOk());
  EXPECT_EQ(LargestOf(merged->at("small.weight").values), 0);
  EXPECT_GT(LargestOf(MergeOnZeros(small, "knots_ties", "density: 0.1").values), 0);
  // All kept, of one model: itself.
  const Dense whole = MergeOnZeros({large[0]}, "knots_ties", "density: 1");
  EXPECT_LE(LargestDifference(whole.values, large[0].values), 1e-13 * LargestOf(whole.values));
}

TEST(Knots, DropsAtRandomAndKeepsTheMean) {
  const Dense task = RandomTasks(60, 90, 1, 5)[0];
  const Dense merged = MergeOnZeros({task}, "knots_dare_ties", "density: 1, drop: 0.4");
  double product = 0, square = 0;
  for (size_t i = 0; i < task.values.size(); ++i) {
    product += merged.values[i] * task.values[i];
    square += task.values[i] * task.values[i];
  }
  EXPECT_NEAR(product / square, 1, 0.1);
  EXPECT_GT(LargestDifference(merged.values, task.values), 0.1 * LargestOf(task.values));
  EXPECT_EQ(MergeOnZeros({task}, "knots_dare_ties", "density: 1, drop: 0.4").values, merged.values);
}

}  // namespace
}  // namespace pewter
