// Fisher merging (arXiv 2111.09832): the mean of the models, element by element weighed with the
// diagonal Fisher information that a file gives for each:
//
//   out = sum_i c_i (F_i + epsilon) x_i / sum_i c_i (F_i + epsilon)
//   c_i = weight_i / (normalize ? |F_i| + epsilon : 1), |F_i| over all tensors of the model
//
// Tensors that no file has are the weighted mean. Everything is computed in double.
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/methods/common/weighted_mean.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

// Sums of the squares of F by model.
class FisherNorms : public Measure {
 public:
  explicit FisherNorms(const MeasureFacts& facts) : squares_(facts.elements.size()) {}

  bool done() const override { return done_; }
  absl::Status See(MethodContext& tensor) override {
    kernels::FisherSums op;
    op.count = tensor.inputs();
    std::vector<int> operands;
    for (int i = 0; i < op.count; ++i) operands.push_back(tensor.StatisticsOf(i));
    ASSIGN_OR_RETURN(const std::vector<double> sums, tensor.Reduce(op, operands));
    std::lock_guard lock(mutex_);
    for (int i = 0; i < op.count; ++i) {
      if (sums[2 * i + 1] > 0) {
        return absl::FailedPreconditionError(
            absl::StrCat("of the Fisher information of input ", i, ", ", sums[2 * i + 1],
                         " elements are below 0: the file has something else"));
      }
      squares_[tensor.model(i)].push_back(sums[2 * i]);
    }
    return absl::OkStatus();
  }
  absl::Status See(const TensorTask&, TaskContext&) override {
    return absl::InternalError("fisher has no tasks");
  }
  absl::Status EndRound() override {
    done_ = true;
    return absl::OkStatus();
  }
  std::vector<double> Found() const override {
    std::vector<double> norms;
    for (std::vector<double> terms : squares_) {
      // Tensors come in any order; the sum must not depend on it.
      std::sort(terms.begin(), terms.end());
      norms.push_back(std::sqrt(std::accumulate(terms.begin(), terms.end(), 0.0)));
    }
    return norms;
  }

 private:
  std::mutex mutex_;
  std::vector<std::vector<double>> squares_;  // by model, of each tensor; guarded by mutex_
  bool done_ = false;
};

absl::Status Run(MethodContext& context) {
  if (!context.has_statistics()) return RunWeightedMean(context);
  kernels::FisherMean op;
  op.count = context.inputs();
  op.epsilon = context.number("epsilon");
  std::vector<int> operands = context.AllOperands();
  for (int i = 0; i < op.count; ++i) {
    op.weight[i] = context.number(i, "weight");
    operands.push_back(context.StatisticsOf(i));
  }
  RETURN_IF_ERROR(CheckWeights({op.weight, static_cast<size_t>(op.count)}));
  if (context.flag("normalize")) {
    for (int i = 0; i < op.count; ++i) {
      const double norm = context.measured()[context.model(i)] + op.epsilon;
      if (!(norm > 0)) {
        return absl::FailedPreconditionError(
            "the Fisher information of a model is 0 everywhere; set `epsilon` above 0");
      }
      op.weight[i] /= norm;
    }
  }
  return context.Map(op, operands);
}

absl::StatusOr<Treatment> Treat(const TensorFacts& tensor) {
  if (tensor.has_statistics) return Treatment{.measured = true};
  return Treatment{.notes = {"the statistics do not have it: weighted mean"}};
}

}  // namespace

absl::Span<const MergeMethod> fisher() {
  static const MergeMethod methods[] = {{
      .name = "fisher",
      .title = "Fisher merging",
      .summary = "averages the models, each element by how much each model's diagonal Fisher "
                 "information says that it matters",
      .formula =
          "out = sum_i c_i (F_i + epsilon) x_i / sum_i c_i (F_i + epsilon), c_i = weight_i / "
          "(normalize ? |F_i| + epsilon : 1), F_i from `statistics`",
      .reference = "https://arxiv.org/abs/2111.09832",
      .params = {MeanWeightParam("share of this model"),
                 {.name = "normalize",
                  .help = "divide the Fisher information of each model by its norm",
                  .type = ParamType::kBool,
                  .scope = ParamScopeKind::kJob,
                  .fallback = true},
                 {.name = "epsilon",
                  .help = "added to the Fisher information, so that there is a mean where it is 0",
                  .scope = ParamScopeKind::kJob,
                  .fallback = 1e-6,
                  .min = 0}},
      .max_inputs = kernels::kMaxInputs / 2,
      .in_double = true,
      .statistics = StatisticsUse::kLikeTensors,
      .treat = &Treat,
      .measure = [](const MeasureFacts& facts) -> std::unique_ptr<Measure> {
        return std::make_unique<FisherNorms>(facts);
      },
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
