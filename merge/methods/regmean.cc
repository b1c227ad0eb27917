// RegMean (arXiv 2212.09849): each linear layer becomes the one whose outputs are nearest, in least
// squares, to what every model's layer gives for that model's own inputs X_i:
//
//   G_i = X_i^T X_i, over the rows of X_i (gram_normalize: mean) or as it is (sum)
//   H_i = alpha G_i + (1 - alpha) diag(G_i),  c_i = weight_i / sum_j weight_j
//   out = M + [ (sum_i c_i H_i + e)^-1 sum_i c_i H_i (W_i - M)^T ]^T,  M = sum_i c_i W_i
//
// The residual form has no cancellation where the models agree, and leaves M in the columns of
// inputs that are always 0. e is 1e-10 of the mean of the diagonal. Weights of layers whose inputs
// the statistics do not have, and all other tensors, become M. Everything is computed in double.
#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/methods/common/linear_weights.h"
#include "merge/methods/common/singular_vectors.h"
#include "merge/methods/common/weighted_mean.h"
#include "merge/methods/method.h"
#include "merge/methods/tensor_task.h"

namespace pewter::methods {
namespace {

using kernels::Transpose;

constexpr double kJitter = 1e-10;
constexpr int64_t kWidth = sizeof(double);

// A whole operand as doubles in host memory.
absl::StatusOr<std::vector<double>> LoadDoubles(TaskContext& context, int operand) {
  ASSIGN_OR_RETURN(const auto stored, context.Load(operand, TaskContext::Where::kHost));
  std::vector<double> values(context.shape(operand).elements());
  const auto size = static_cast<int64_t>(values.size());
  kernels::Convert({stored->data(), context.dtype(operand), size},
                   {values.data(), DType::kF64, size});
  return values;
}

class RegMeanTask : public TensorTask {
 public:
  struct Input {
    double share;  // of the mean of the weights
    double scale;  // of the Gram matrix
  };
  RegMeanTask(MatrixShape shape, int axis, std::vector<Input> inputs, double alpha,
              DType result_dtype)
      : rows_(shape.rows),
        columns_(shape.columns),
        axis_(axis),
        inputs_(std::move(inputs)),
        alpha_(alpha),
        result_dtype_(result_dtype) {}

  const char* name() const override { return "regmean"; }
  DType result_dtype() const override { return result_dtype_; }
  int64_t bytes() const override {
    const int64_t elements = rows_ * columns_, order = axis_ == 1 ? columns_ : rows_;
    // The sum of the Gram matrices, one of them as it is stored and as doubles, and where the
    // backend has memory of its own two there; likewise the mean, a weight, and the solution.
    return kWidth * (5 * order * order + 5 * elements) + elements * ByteWidth(result_dtype_);
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    const auto count = static_cast<int>(inputs_.size());
    const int64_t elements = rows_ * columns_;
    const int64_t order = axis_ == 1 ? columns_ : rows_, outputs = elements / order;
    std::vector<double> mean(elements);
    for (int i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::vector<double> weight, LoadDoubles(context, i));
      for (int64_t e = 0; e < elements; ++e) mean[e] += inputs_[i].share * weight[e];
    }

    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    std::vector<double> sum(order * order);
    ASSIGN_OR_RETURN(const OwnMatrix solution, OwnMatrix::Make(backend, order, outputs));
    for (int i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(std::vector<double> gram, LoadDoubles(context, count + i));
      const double diagonal = inputs_[i].share * inputs_[i].scale, others = diagonal * alpha_;
      for (int64_t j = 0; j < order; ++j) {
        for (int64_t k = 0; k < order; ++k) {
          gram[j * order + k] *= j == k ? diagonal : others;
          sum[j * order + k] += gram[j * order + k];
        }
      }
      ASSIGN_OR_RETURN(std::vector<double> weight, LoadDoubles(context, i));
      for (int64_t e = 0; e < elements; ++e) weight[e] -= mean[e];
      ASSIGN_OR_RETURN(const OwnMatrix left, Upload(backend, gram, order));
      ASSIGN_OR_RETURN(const OwnMatrix right, Upload(backend, weight, columns_));
      RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, left.view,
                                    axis_ == 1 ? Transpose::kYes : Transpose::kNo, right.view, 1,
                                    i == 0 ? 0 : 1, solution.view));
      RETURN_IF_ERROR(backend.Synchronize());  // before the operands go
    }

    double trace = 0;
    for (int64_t j = 0; j < order; ++j) trace += sum[j * order + j];
    if (trace > 0) {
      for (int64_t j = 0; j < order; ++j) {
        sum[j * order + j] += kJitter * trace / static_cast<double>(order);
      }
      ASSIGN_OR_RETURN(const OwnMatrix left, Upload(backend, sum, order));
      const absl::Status solved = algebra->SolvePosDef(left.view, solution.view);
      if (absl::IsFailedPrecondition(solved)) {
        return Annotate(solved,
                        "the Gram matrices of the layer's inputs leave no one solution; set "
                        "`alpha` below 1, weights that are not negative, and check the statistics");
      }
      RETURN_IF_ERROR(solved);
      std::vector<double> step(elements);
      RETURN_IF_ERROR(backend.Download(solution.view.data, step.data(), elements * kWidth));
      RETURN_IF_ERROR(backend.Synchronize());
      for (int64_t j = 0; j < order; ++j) {
        for (int64_t o = 0; o < outputs; ++o) {
          mean[axis_ == 1 ? o * order + j : j * outputs + o] += step[j * outputs + o];
        }
      }
    }
    kernels::Convert({mean.data(), DType::kF64, elements}, result);
    return absl::OkStatus();
  }

 private:
  static absl::StatusOr<OwnMatrix> Upload(kernels::Backend& backend,
                                          const std::vector<double>& values, int64_t columns) {
    const auto rows = static_cast<int64_t>(values.size()) / columns;
    ASSIGN_OR_RETURN(OwnMatrix matrix, OwnMatrix::Make(backend, rows, columns));
    RETURN_IF_ERROR(backend.Upload(values.data(), matrix.view.data,
                                   static_cast<int64_t>(values.size()) * kWidth));
    RETURN_IF_ERROR(backend.Synchronize());
    return matrix;
  }

  const int64_t rows_, columns_;
  const int axis_;
  const std::vector<Input> inputs_;
  const double alpha_;
  const DType result_dtype_;
};

absl::StatusOr<Treatment> Treat(const TensorFacts& tensor) {
  if (!IsLinearWeight(tensor)) return Treatment{};
  if (tensor.layer_inputs == nullptr) {
    return Treatment{.notes = {"the statistics do not have its layer's inputs: weighted mean"}};
  }
  const LayerInputs& known = *tensor.layer_inputs;
  const int axis = PatternMatches(tensor, "inputs_first", known.axis == 0) ? 0 : 1;
  const MatrixShape shape = AsMatrix(tensor.shape);
  if (const int64_t order = axis == 1 ? shape.columns : shape.rows; order != known.width) {
    return absl::FailedPreconditionError(
        absl::StrCat("the layer has ", order, " inputs along axis ", axis, " of ",
                     tensor.shape.ToString(), ", and its statistics are of ", known.width,
                     "; `inputs_first` says which weights are stored [inputs, outputs]"));
  }
  RETURN_IF_ERROR(CheckOrder(known.width, "leave it out with `linear_exclude`"));
  std::vector<double> weights;
  for (const ParamValues* params : tensor.input_params) {
    weights.push_back(std::get<double>(params->at("weight")));
  }
  RETURN_IF_ERROR(CheckWeights(weights));
  double sum = 0;
  for (double weight : weights) sum += weight;
  const bool normalize = std::get<std::string>(tensor.params.at("gram_normalize")) == "mean";
  std::vector<RegMeanTask::Input> inputs;
  for (int i = 0; i < tensor.inputs; ++i) {
    inputs.push_back({weights[i] / sum, normalize ? 1 / known.rows[i] : 1});
  }
  Treatment treatment;
  treatment.task = std::make_shared<const RegMeanTask>(shape, axis, std::move(inputs),
                                                       std::get<double>(tensor.params.at("alpha")),
                                                       tensor.result_dtype);
  return treatment;
}

std::vector<Param> Params() {
  std::vector<Param> params = {
      MeanWeightParam("share of this model"),
      {.name = "alpha",
       .help = "factor of the Gram matrices' elements beside the diagonal",
       .fallback = 0.9,
       .min = 0,
       .max = 1},
      {.name = "gram_normalize",
       .help = "mean: every model counts alike; sum: by the rows that its statistics are of",
       .type = ParamType::kString,
       .fallback = "mean",
       .choices = {"mean", "sum"}},
      {.name = "inputs_first",
       .help = "which weights are stored [inputs, outputs]; unset: as the shapes tell, else "
               "[outputs, inputs]",
       .type = ParamType::kPatterns,
       .fallback = Unset{}}};
  for (Param& param : LinearWeightParams()) params.push_back(std::move(param));
  return params;
}

}  // namespace

absl::Span<const MergeMethod> regmean() {
  static const MergeMethod methods[] = {{
      .name = "regmean",
      .title = "RegMean",
      .summary = "makes each linear layer the one whose outputs are nearest to those of all models "
                 "on their own inputs",
      .formula =
          "out = [ (sum_i c_i H_i)^-1 sum_i c_i H_i W_i^T ]^T, H_i = alpha G_i + (1 - alpha) "
          "diag(G_i), G_i = X_i^T X_i from `statistics`; other tensors: sum_i c_i x_i",
      .reference = "https://arxiv.org/abs/2212.09849",
      .params = Params(),
      .statistics = StatisticsUse::kLayerInputs,
      .treat = &Treat,
      .run = &RunWeightedMean,
  }};
  return methods;
}

}  // namespace pewter::methods
