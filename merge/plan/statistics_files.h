// What the recipe's `statistics` give for a model: a file of second moments
// (merge/forward/statistics.h) or of one tensor for each of the model's, opened as tensors to be
// read.
//
// A layer's inputs are SITE.gram.I.I and SITE.count, where SITE is the weight's name without
// ".weight", or else where the forward pass has them (merge/forward/layer_sites.h). I is the
// model's place in the file's list of models; a file of one model is that model's whatever it is
// called, and a file without a list has one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/recipe/recipe.h"

namespace pewter {

class StatisticsFile {
 public:
  // FailedPrecondition when the file has a list of several models and not this one.
  static absl::StatusOr<StatisticsFile> Open(const RecipeStatistics& recipe);

  const std::shared_ptr<const Checkpoint>& checkpoint() const { return checkpoint_; }

  // X^T X of the inputs of the layer whose weight is called `weight`.
  struct Gram {
    std::string tensor;
    int64_t width = 0;
    double rows = 0;          // of X
    std::optional<int> axis;  // of the weight, that runs over the inputs, where that is known
  };
  // An empty `tensor`: the file has none. FailedPrecondition when it is not square or not of
  // floating numbers, or there is no count of rows above 0.
  // `config_json` is the model's.
  absl::StatusOr<Gram> FindGram(absl::string_view config_json, absl::string_view weight) const;

 private:
  std::shared_ptr<const Checkpoint> checkpoint_;
  int model_ = 0;
};

}  // namespace pewter
