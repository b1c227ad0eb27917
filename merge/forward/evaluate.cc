#include "merge/forward/evaluate.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

using kernels::Backend;
using kernels::Buffer;
using kernels::Floats;
using kernels::Prediction;

// Classes whose logits are made at a time, and rows of them.
constexpr int64_t kClasses = 4096, kRows = 1024;

constexpr Metric kMetrics[] = {Metric::kMlmLoss, Metric::kClmLoss, Metric::kAccuracy};

// What is predicted in a batch: from which of its tokens, and which label.
struct Targets {
  std::vector<int32_t> tokens, labels;
};

absl::StatusOr<Targets> TargetsOf(const ForwardData& data, HeadKind head, int64_t classes,
                                  const Batch& batch) {
  Targets targets;
  const auto add = [&](int64_t token, int32_t label, int64_t place) -> absl::Status {
    if (label == kNoLabel) return absl::OkStatus();
    if (label >= classes) {
      return absl::FailedPreconditionError(absl::StrCat("data ", data.name(), ": label ", place,
                                                        " is ", label, " and the model has ",
                                                        classes, " classes"));
    }
    targets.tokens.push_back(static_cast<int32_t>(token));
    targets.labels.push_back(label);
    return absl::OkStatus();
  };
  const absl::Span<const int32_t> labels = data.labels();
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t begin = batch.starts[row], end = batch.starts[row + 1];
    const int64_t data_row = batch.first_row + row;
    if (head == HeadKind::kClassifier) {
      RETURN_IF_ERROR(add(begin, labels[data_row], data_row));
      continue;
    }
    for (int64_t token = begin; token < end; ++token) {
      int64_t column = batch.columns[token];
      if (head == HeadKind::kCausal && ++column == data.length()) continue;
      const int64_t place = data_row * data.length() + column;
      if (!data.real(data_row, column)) continue;
      RETURN_IF_ERROR(add(token, labels.empty() ? data.ids()[place] : labels[place], place));
    }
  }
  return targets;
}

absl::Status CheckLabels(const ForwardData& data, HeadKind head, const std::string& model) {
  const auto wrong = [&](absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat("data ", data.name(), " has ", what,
                                                      ", which the ", HeadName(head), " ", model,
                                                      " is to predict"));
  };
  if (data.labels().empty()) {
    return head == HeadKind::kCausal ? absl::OkStatus() : wrong("no labels");
  }
  if (head == HeadKind::kClassifier) {
    return data.labels_of_rows() ? absl::OkStatus() : wrong("no label for each row");
  }
  return data.labels_of_rows() ? wrong("no label for each token") : absl::OkStatus();
}

// Logits of `rows` [rows, width], block by block: use(first class, logits, first row).
template <class Use>
absl::Status ForLogits(Backend& backend, Transformer& model, absl::Span<const Floats> inputs,
                       int64_t block, const Use& use) {
  const int64_t classes = model.classes();
  ASSIGN_OR_RETURN(const FloatBuffer logits,
                   FloatBuffer::Make(backend, kRows * std::min(block, classes)));
  for (int64_t first = 0; first < classes; first += block) {
    const int64_t count = std::min(block, classes - first);
    RETURN_IF_ERROR(model.LoadClasses(first, count));
    for (size_t i = 0; i < inputs.size(); ++i) {
      for (int64_t row = 0; row < inputs[i].rows; row += kRows) {
        const int64_t rows = std::min(kRows, inputs[i].rows - row);
        const Floats part = logits.View(rows, count);
        RETURN_IF_ERROR(model.Classify(inputs[i].Rows(row, rows), part));
        RETURN_IF_ERROR(use(static_cast<int64_t>(i), row, first, part));
      }
    }
  }
  return backend.Synchronize();
}

// What the head's last layer reads for some tokens of each batch of a run.
struct HeadInputs {
  std::vector<FloatBuffer> memory;
  std::vector<Floats> views;
};
absl::Status AddHeadInputs(Backend& backend, Transformer& model, const Floats& stream,
                           absl::Span<const int32_t> tokens, HeadInputs& inputs) {
  ASSIGN_OR_RETURN(kernels::Network* const network, backend.network());
  const int64_t rows = static_cast<int64_t>(tokens.size()), width = stream.columns;
  ASSIGN_OR_RETURN(const auto indexes, UploadIntegers(backend, tokens));
  ASSIGN_OR_RETURN(const FloatBuffer gathered, FloatBuffer::Make(backend, rows * width));
  ASSIGN_OR_RETURN(FloatBuffer input, FloatBuffer::Make(backend, rows * width));
  const Floats from = gathered.View(rows, width), to = input.View(rows, width);
  RETURN_IF_ERROR(network->Gather(stream, static_cast<const int32_t*>(indexes->data()), from));
  RETURN_IF_ERROR(model.ReadForHead(from, to));
  RETURN_IF_ERROR(backend.Synchronize());
  inputs.memory.push_back(std::move(input));
  inputs.views.push_back(to);
  return absl::OkStatus();
}

int64_t HeadBytes(const Transformer& model) {
  const int64_t block = std::min(kClasses, model.classes());
  return 4 * (block * (model.shape().width + 1) + kRows * block);
}

// All that is known before anything is computed.
struct Prepared {
  std::unique_ptr<ForwardPass> pass;
  std::vector<Targets> targets;  // of each batch
  int64_t predictions = 0;
};

absl::StatusOr<Prepared> Prepare(const ForwardModel& model, std::shared_ptr<const ForwardData> data,
                                 Metric metric, const ForwardOptions& options) {
  ASSIGN_OR_RETURN(const Metric fitting, DefaultMetric(model));
  Prepared prepared;
  ASSIGN_OR_RETURN(prepared.pass, ForwardPass::Open({model}, data, options));
  Transformer& transformer = prepared.pass->model(0);
  const HeadKind head = transformer.shape().head_kind;
  if (metric != Metric::kAccuracy && metric != fitting) {
    return absl::FailedPreconditionError(
        absl::StrCat("metric ", MetricName(metric), " is not that of model ", model.name, ", a ",
                     HeadName(head), ": ", MetricName(fitting), " is"));
  }
  RETURN_IF_ERROR(CheckLabels(*data, head, model.name));
  for (const Batch& batch : prepared.pass->batches()) {
    ASSIGN_OR_RETURN(Targets found, TargetsOf(*data, head, transformer.classes(), batch));
    prepared.predictions += static_cast<int64_t>(found.tokens.size());
    prepared.targets.push_back(std::move(found));
  }
  if (prepared.predictions == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("data ", data->name(), " has nothing to predict: every label is -100"));
  }
  return prepared;
}

}  // namespace

const char* MetricName(Metric metric) {
  switch (metric) {
    case Metric::kMlmLoss:
      return "mlm_loss";
    case Metric::kClmLoss:
      return "clm_loss";
    case Metric::kAccuracy:
      return "accuracy";
  }
  return "";
}

absl::StatusOr<Metric> ParseMetric(absl::string_view name) {
  for (const Metric metric : kMetrics) {
    if (name == MetricName(metric)) return metric;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("metric `", name, "`: want mlm_loss, clm_loss or accuracy"));
}

absl::StatusOr<Metric> DefaultMetric(const ForwardModel& model) {
  const absl::StatusOr<NetworkShape> shape = ParseNetworkShape(model.config_json);
  if (!shape.ok()) return Annotate(shape.status(), absl::StrCat("model ", model.name));
  switch (shape->head_kind) {
    case HeadKind::kMasked:
      return Metric::kMlmLoss;
    case HeadKind::kCausal:
      return Metric::kClmLoss;
    case HeadKind::kClassifier:
      return Metric::kAccuracy;
    case HeadKind::kNone:
      break;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("model ", model.name, " has no head that predicts anything"));
}

absl::Status CheckEvaluation(const ForwardModel& model, std::shared_ptr<const ForwardData> data,
                             Metric metric, const ForwardOptions& options) {
  return Prepare(model, std::move(data), metric, options).status();
}

absl::StatusOr<Evaluation> Evaluate(const ForwardModel& forward_model,
                                    std::shared_ptr<const ForwardData> data, Metric metric,
                                    const ForwardOptions& options) {
  ASSIGN_OR_RETURN(const Prepared prepared, Prepare(forward_model, data, metric, options));
  const std::unique_ptr<ForwardPass>& pass = prepared.pass;
  const std::vector<Targets>& targets = prepared.targets;
  Transformer& model = pass->model(0);
  const std::vector<Batch>& batches = pass->batches();
  Evaluation evaluation = {.metric = metric, .tokens = prepared.predictions};
  const int64_t all = static_cast<int64_t>(batches.size());
  Backend& backend = *options.backend;
  ASSIGN_OR_RETURN(kernels::Network* const network, backend.network());
  double loss = 0;
  int64_t right = 0;
  for (int64_t first = 0; first < all;) {
    // The rows that the head reads are there until all of the vocabulary has been seen.
    const auto head_bytes = [&](int64_t last) {
      int64_t rows = 0;
      for (int64_t i = first; i < last; ++i) rows += static_cast<int64_t>(targets[i].tokens.size());
      const auto row_bytes = model.shape().width * int64_t{sizeof(float)} +
                             int64_t{sizeof(Prediction) + sizeof(int32_t)};
      return HeadBytes(model) + rows * row_bytes;
    };
    ASSIGN_OR_RETURN(const int64_t count, pass->BatchesThatFit(first, head_bytes));
    RETURN_IF_ERROR(pass->Run(first, first + count, pass->stages() - 1, nullptr));
    HeadInputs inputs;
    std::vector<std::unique_ptr<Buffer>> labels, predictions;
    std::vector<std::vector<Prediction>> results;
    for (int64_t i = 0; i < count; ++i) {
      const Targets& target = targets[first + i];
      RETURN_IF_ERROR(
          AddHeadInputs(backend, model, pass->stream(0, first + i), target.tokens, inputs));
      ASSIGN_OR_RETURN(auto label, UploadIntegers(backend, target.labels));
      labels.push_back(std::move(label));
      results.emplace_back(target.tokens.size());
      const int64_t bytes = static_cast<int64_t>(results.back().size() * sizeof(Prediction));
      ASSIGN_OR_RETURN(auto prediction, backend.Allocate(bytes));
      RETURN_IF_ERROR(backend.Upload(results.back().data(), prediction->data(), bytes));
      predictions.push_back(std::move(prediction));
    }
    RETURN_IF_ERROR(ForLogits(
        backend, model, inputs.views, kClasses,
        [&](int64_t batch, int64_t row, int64_t first_class, const Floats& logits) {
          return network->Predict(logits, first_class,
                                  static_cast<const int32_t*>(labels[batch]->data()) + row,
                                  static_cast<Prediction*>(predictions[batch]->data()) + row);
        }));
    for (int64_t i = 0; i < count; ++i) {
      RETURN_IF_ERROR(
          backend.Download(predictions[i]->data(), results[i].data(), predictions[i]->bytes()));
    }
    RETURN_IF_ERROR(backend.Synchronize());
    for (int64_t i = 0; i < count; ++i) {
      for (size_t j = 0; j < results[i].size(); ++j) {
        const Prediction& p = results[i][j];
        loss += double{p.largest} + std::log(p.sum) - double{p.label};
        right += p.best == targets[first + i].labels[j];
      }
    }
    first += count;
  }
  const auto count = static_cast<double>(evaluation.tokens);
  evaluation.loss = loss / count;
  evaluation.perplexity = std::exp(evaluation.loss);
  evaluation.accuracy = static_cast<double>(right) / count;
  return evaluation;
}

absl::StatusOr<ForwardOutputs> ComputeOutputs(const ForwardModel& forward_model,
                                              std::shared_ptr<const ForwardData> data,
                                              const ForwardOptions& options) {
  ASSIGN_OR_RETURN(const auto pass, ForwardPass::Open({forward_model}, data, options));
  Backend& backend = *options.backend;
  Transformer& model = pass->model(0);
  const int64_t all = static_cast<int64_t>(pass->batches().size());
  RETURN_IF_ERROR(pass->Run(0, all, pass->stages() - 1, nullptr));
  const bool classifier = model.shape().head_kind == HeadKind::kClassifier;
  const bool headless = model.shape().head_kind == HeadKind::kNone;
  ForwardOutputs outputs = {.columns = headless ? model.shape().width : model.classes()};
  HeadInputs inputs;
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < all; ++i) {
    const Batch& batch = pass->batches()[i];
    starts.push_back(outputs.rows);
    outputs.rows += classifier ? batch.rows : batch.tokens();
    if (headless) continue;
    std::vector<int32_t> tokens;
    for (int64_t row = 0; row < batch.rows; ++row) {
      for (int64_t token = batch.starts[row]; token < batch.starts[row + 1]; ++token) {
        tokens.push_back(static_cast<int32_t>(token));
        if (classifier) break;
      }
    }
    RETURN_IF_ERROR(AddHeadInputs(backend, model, pass->stream(0, i), tokens, inputs));
  }
  outputs.values.resize(outputs.rows * outputs.columns);
  const auto fetch = [&](const Floats& from, int64_t row) -> absl::Status {
    RETURN_IF_ERROR(
        backend.Download(from.data, outputs.values.data() + row * outputs.columns,
                         from.rows * from.columns * static_cast<int64_t>(sizeof(float))));
    return backend.Synchronize();
  };
  if (headless) {
    for (int64_t i = 0; i < all; ++i) RETURN_IF_ERROR(fetch(pass->stream(0, i), starts[i]));
    return outputs;
  }
  RETURN_IF_ERROR(ForLogits(backend, model, inputs.views, model.classes(),
                            [&](int64_t batch, int64_t row, int64_t, const Floats& logits) {
                              return fetch(logits, starts[batch] + row);
                            }));
  return outputs;
}

}  // namespace pewter
