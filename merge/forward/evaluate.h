// Losses of models on labelled data, by native forward passes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/forward/data.h"
#include "merge/forward/forward_pass.h"
#include "merge/forward/model.h"

namespace pewter {

enum class Metric { kMlmLoss, kClmLoss, kAccuracy };
const char* MetricName(Metric metric);                       // "mlm_loss", ...
absl::StatusOr<Metric> ParseMetric(absl::string_view name);  // InvalidArgument
// The loss of a language model's head, the accuracy of a classifier's. FailedPrecondition without
// a head.
absl::StatusOr<Metric> DefaultMetric(const ForwardModel& model);

// Means over all predictions. Sums are double, in the order of the data.
struct Evaluation {
  Metric metric = Metric::kMlmLoss;
  int64_t tokens = 0;     // predictions: labelled tokens, or rows of a classifier
  double loss = 0;        // -log p of the label, in nats
  double perplexity = 0;  // exp(loss)
  double accuracy = 0;    // share of labels that have the largest logit, the first of equal ones
  double value() const { return metric == Metric::kAccuracy ? accuracy : loss; }
};

// A masked language model predicts the labels that are not -100, a causal one each label from the
// tokens before it (labels are input_ids where the data has none; a label whose preceding token is
// padding does not count), a classifier the label of each row. Logits are made and used a block of
// the vocabulary at a time; data that does not fit in memory goes through the model in parts, with
// the same result. FailedPrecondition when the metric does not fit the model's head, or the data's
// labels do not: before anything is computed.
absl::StatusOr<Evaluation> Evaluate(const ForwardModel& model,
                                    std::shared_ptr<const ForwardData> data, Metric metric,
                                    const ForwardOptions& options);

// The errors that Evaluate would give before it computes anything.
absl::Status CheckEvaluation(const ForwardModel& model, std::shared_ptr<const ForwardData> data,
                             Metric metric, const ForwardOptions& options);

// All outputs: the logits of every token (of every row, for a classifier), or without a head the
// last features. Row-major; padding has no rows.
struct ForwardOutputs {
  int64_t rows = 0, columns = 0;
  std::vector<float> values;
};
// For small data: everything is in memory.
absl::StatusOr<ForwardOutputs> ComputeOutputs(const ForwardModel& model,
                                              std::shared_ptr<const ForwardData> data,
                                              const ForwardOptions& options);

}  // namespace pewter
