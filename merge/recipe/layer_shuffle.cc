#include "merge/recipe/layer_shuffle.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/random.h"

namespace pewter {
namespace {

class Draws {
 public:
  explicit Draws(uint64_t seed) : key_(MakePhiloxKey(seed, "shuffle-layers")) {}
  // In [0, 1).
  double Uniform() { return PhiloxWord(key_, next_++) / 4294967296.0; }
  // In [0, count).
  int64_t Below(int64_t count) {
    return static_cast<int64_t>(Uniform() * static_cast<double>(count));
  }

 private:
  const PhiloxKey key_;
  uint64_t next_ = 0;
};

struct Run {
  size_t model = 0;
  int64_t first = 0;
  int64_t end = 0;
};

// The model whose part of the weights' sum a draw falls into.
size_t Pick(absl::Span<const ShuffleModel> models, double total, Draws& draws) {
  double left = draws.Uniform() * total;
  size_t last = 0;
  for (size_t i = 0; i < models.size(); ++i) {
    if (models[i].weight == 0) continue;
    last = i;
    if (left < models[i].weight) break;
    left -= models[i].weight;
  }
  return last;
}

std::vector<Run> KeepOrder(absl::Span<const ShuffleModel> models, double total, Draws& draws) {
  std::vector<Run> runs;
  for (int64_t layer = 0; layer < models[0].layers; ++layer) {
    const size_t model = Pick(models, total, draws);
    if (!runs.empty() && runs.back().model == model) {
      runs.back().end = layer + 1;
    } else {
      runs.push_back({.model = model, .first = layer, .end = layer + 1});
    }
  }
  return runs;
}

std::vector<Run> ShuffleAll(absl::Span<const ShuffleModel> models, Draws& draws) {
  std::vector<Run> runs;
  for (size_t i = 0; i < models.size(); ++i) {
    const auto count =
        static_cast<int64_t>(static_cast<double>(models[i].layers) * models[i].weight);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t layer = draws.Below(models[i].layers);
      runs.push_back({.model = i, .first = layer, .end = layer + 1});
    }
  }
  for (size_t i = runs.size(); i > 1; --i) {
    std::swap(runs[i - 1], runs[draws.Below(static_cast<int64_t>(i))]);
  }
  return runs;
}

// In single quotes, where only the quote itself needs care.
std::string Quote(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "''"}}), "'");
}

}  // namespace

absl::StatusOr<std::string> ShuffleLayers(absl::Span<const ShuffleModel> models, ShuffleOrder order,
                                          uint64_t seed, const std::string& dtype) {
  if (models.empty()) return absl::InvalidArgumentError("there is no model to take layers from");
  constexpr double kMostLayers = 100'000;
  double total = 0;
  double layers = 0;
  for (const ShuffleModel& model : models) {
    if (!std::isfinite(model.weight) || model.weight < 0) {
      return absl::InvalidArgumentError(absl::StrCat("the weight of model ", model.ref,
                                                     " must be 0 or more, not ", model.weight));
    }
    if (order == ShuffleOrder::kKept && model.weight > 0 && model.layers < models[0].layers) {
      return absl::InvalidArgumentError(absl::StrCat(
          "model ", model.ref, " has ", model.layers, " layers, fewer than the first, ",
          models[0].ref, ", which has ", models[0].layers));
    }
    total += model.weight;
    layers += order == ShuffleOrder::kFull ? model.weight * static_cast<double>(model.layers) : 0;
  }
  if (total <= 0) return absl::InvalidArgumentError("the weights are all 0");
  if (layers > kMostLayers) {
    return absl::InvalidArgumentError(absl::StrCat("the weights ask for ", layers, " layers"));
  }
  Draws draws(seed);
  const std::vector<Run> runs =
      order == ShuffleOrder::kKept ? KeepOrder(models, total, draws) : ShuffleAll(models, draws);
  if (runs.empty()) {
    return absl::InvalidArgumentError(
        "no layer is left: a model gives its number of layers times its weight, rounded down");
  }
  std::string text = "merge_method: passthrough\nslices:\n";
  for (const Run& run : runs) {
    absl::StrAppend(&text, "  - sources: [{model: ", Quote(models[run.model].ref),
                    ", layer_range: [", run.first, ", ", run.end, "]}]\n");
  }
  if (!dtype.empty()) absl::StrAppend(&text, "dtype: ", dtype, "\n");
  return text;
}

}  // namespace pewter
