// What a recipe's `evaluate:` asks for: how well the merged model does on data, and what lies on
// the straight lines between the models that it is made from.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "merge/evaluate/loss_curve.h"
#include "merge/forward/evaluate.h"

namespace pewter {

// Two models, and the ways in which B is seen.
struct ModelPair {
  ForwardModel a;
  struct View {
    std::string label;  // "not aligned"
    ForwardModel b;
  };
  std::vector<View> views;
};

struct EvaluationPlan {
  std::shared_ptr<const ForwardData> data;
  Metric metric = Metric::kMlmLoss;
  int points = 0;  // of a curve; 0: there are none
  std::vector<ModelPair> pairs;
};

// The errors that ComputeCurves would give before it computes anything.
absl::Status CheckCurves(const EvaluationPlan& plan, const ForwardOptions& options);
// The curves of each pair, in order. Reads all tensors for each point.
absl::StatusOr<std::vector<CurveReport>> ComputeCurves(const EvaluationPlan& plan,
                                                       const ForwardOptions& options);

inline constexpr char kEvaluationFile[] = "evaluation.json";
// Names and texts of the files that tell it: kEvaluationFile, and where there are curves
// evaluation.html and evaluation.svg (evaluation-2.svg for the second pair, and so on).
std::vector<std::pair<std::string, std::string>> EvaluationFiles(
    const EvaluationPlan& plan, const Evaluation& merged, const std::vector<CurveReport>& curves);

}  // namespace pewter
