// TSV-M (Task Singular Vectors, arXiv 2412.00081; github.com/AntoAndGar/task_singular_vectors): of
// each task vector the leading k = floor(min(n, m) / T) singular triplets, the vectors of all tasks
// made orthonormal together on either side:
//
//   D_t ~ U_t S_t V_t^T;  out = base + lambda polar([U_1 ... U_T]) diag(S_1, ..., S_T)
//   polar([V_1 ... V_T])^T
//
// Tensors that are not linear weights: base + lambda mean of the task vectors, as the authors do.
//
// A task vector of lower rank than k has no more triplets than its rank; the authors' code goes on
// with whatever vectors the decomposition makes up for values of zero. So a weight that a task
// leaves as it is (frozen layers) takes none from it, and one that all leave is the base's. Where
// tasks share a direction exactly there is no one polar factor, and the merge is refused.
#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/methods/common/joint_space.h"
#include "merge/methods/common/linear_weights.h"
#include "merge/methods/common/singular_vectors.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

using kernels::Matrix;

// Singular values below this share of a task vector's largest are rounding noise of zeros.
constexpr double kNullSpace = 1e-13;

// Of each task, at most.
int64_t TripletsOf(MatrixShape shape, int count) {
  return static_cast<int64_t>(static_cast<double>(std::min(shape.rows, shape.columns)) *
                              (1.0 / count));
}

Matrix RowsOf(const OwnMatrix& m, int64_t first, int64_t rows) {
  return {m.view.data + first * m.view.stride, rows, m.view.columns, m.view.stride};
}

class TsvTask : public TensorTask {
 public:
  TsvTask(MatrixShape shape, std::vector<int64_t> ranks, DType dtype, DType result_dtype,
          double lambda)
      : shape_(shape),
        ranks_(std::move(ranks)),
        count_(static_cast<int>(ranks_.size())),
        dtype_(dtype),
        result_dtype_(result_dtype),
        lambda_(lambda) {}

  const char* name() const override { return "tsv_m"; }
  DType result_dtype() const override { return result_dtype_; }
  int64_t bytes() const override {
    const int64_t elements = shape_.rows * shape_.columns, width = sizeof(double);
    // A task's decomposition beside the stacked vectors; later that of the stacks.
    const int64_t all = TripletsOf(shape_, count_) * count_;
    return TaskVectors::Bytes(shape_, dtype_, ranks_) +
           width * (3 * elements + all * (shape_.rows + shape_.columns)) + SvdBytes(shape_) +
           TaskVectors::EmitBytes(shape_) + elements * ByteWidth(result_dtype_);
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(const TaskVectors vectors, TaskVectors::Load(context, ranks_));
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    const std::vector<TaskVector> deltas = vectors.Rows(0, shape_.rows);
    const int64_t k = TripletsOf(shape_, count_);
    ASSIGN_OR_RETURN(OwnMatrix ut, OwnMatrix::Make(backend, k * count_, shape_.rows));
    ASSIGN_OR_RETURN(OwnMatrix vt, OwnMatrix::Make(backend, k * count_, shape_.columns));
    std::vector<double> values, kept;
    std::vector<int64_t> counts;  // of triplets, by task
    for (int t = 0; t < count_; ++t) {
      ASSIGN_OR_RETURN(const ThinSvd svd, SvdOf(backend, deltas[t]));
      const auto most = std::min(k, static_cast<int64_t>(svd.values.size()));
      const int64_t rank =
          std::count_if(svd.values.begin(), svd.values.begin() + most,
                        [&](double value) { return value > kNullSpace * svd.values[0]; });
      counts.push_back(rank);
      if (context.reports()) {
        ReportSpectrum(context, absl::StrCat("model ", t, ": "), svd.values, rank);
        const auto square = [&](int64_t n) {
          return std::inner_product(svd.values.begin(), svd.values.begin() + n, svd.values.begin(),
                                    0.0);
        };
        const double all = square(static_cast<int64_t>(svd.values.size()));
        kept.push_back(all > 0 ? square(rank) / all : 0);
      }
      if (rank == 0) continue;
      const auto first = static_cast<int64_t>(values.size());
      const Matrix leading = RowsOf(svd.vt, 0, rank);
      RETURN_IF_ERROR(backend.Copy(leading.data, RowsOf(vt, first, rank).data,
                                   rank * shape_.columns * int64_t{sizeof(double)}));
      RETURN_IF_ERROR(
          LeftVectors(backend, deltas[t], leading, svd.values, RowsOf(ut, first, rank)));
      values.insert(values.end(), svd.values.begin(), svd.values.begin() + rank);
    }
    ut.view.rows = vt.view.rows = static_cast<int64_t>(values.size());
    if (context.reports()) {
      context.Report("kept", std::move(kept));
      RETURN_IF_ERROR(ReportOverlap(context, ut, counts));
    }
    for (OwnMatrix* side : {&ut, &vt}) {
      if (values.empty()) break;
      const absl::Status orthonormal = MakeRowsOrthonormal(backend, *side);
      if (absl::IsFailedPrecondition(orthonormal)) return Dependent();
      RETURN_IF_ERROR(orthonormal);
    }
    for (double& value : values) value *= lambda_;
    RETURN_IF_ERROR(ScaleRows(backend, std::move(values), vt.view));
    const auto rows_of = [&](int64_t first, Matrix out) {
      const Matrix columns = {ut.view.data + first, ut.view.rows, out.rows, ut.view.stride};
      return algebra->Gemm(kernels::Transpose::kYes, columns, kernels::Transpose::kNo, vt.view, 1,
                           0, out);
    };
    return vectors.Emit(backend, 0, shape_.rows, rows_of, result);
  }

 private:
  // By pair of models, row-major: |U_s^T U_t|^2 / the smaller number of their vectors.
  static absl::Status ReportOverlap(TaskContext& context, const OwnMatrix& ut,
                                    absl::Span<const int64_t> counts) {
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    std::vector<double> overlap;
    int64_t first = 0;
    for (int64_t of_s : counts) {
      int64_t other = 0;
      for (int64_t of_t : counts) {
        ASSIGN_OR_RETURN(const OwnMatrix product, OwnMatrix::Make(backend, of_s, of_t));
        RETURN_IF_ERROR(algebra->Gemm(kernels::Transpose::kNo, RowsOf(ut, first, of_s),
                                      kernels::Transpose::kYes, RowsOf(ut, other, of_t), 1, 0,
                                      product.view));
        std::vector<double> values(of_s * of_t);
        RETURN_IF_ERROR(backend.Download(product.view.data, values.data(),
                                         of_s * of_t * int64_t{sizeof(double)}));
        RETURN_IF_ERROR(backend.Synchronize());
        const double square = std::inner_product(values.begin(), values.end(), values.begin(), 0.0);
        overlap.push_back(values.empty() ? 0 : square / static_cast<double>(std::min(of_s, of_t)));
        other += of_t;
      }
      first += of_s;
    }
    context.Report("overlap", std::move(overlap));
    return absl::OkStatus();
  }

  static absl::Status Dependent() {
    return absl::FailedPreconditionError(
        "the leading singular vectors of the task vectors depend on each other (models that are "
        "equal to each other here, or that share directions), and TSV-M has no result then; leave "
        "the tensor out with `linear_exclude`, or use drm");
  }

  const MatrixShape shape_;
  const std::vector<int64_t> ranks_;
  const int count_;
  const DType dtype_, result_dtype_;
  const double lambda_;
};

absl::StatusOr<Treatment> Treat(const TensorFacts& tensor) {
  if (!IsLinearWeight(tensor)) return Treatment{};
  const MatrixShape shape = AsMatrix(tensor.shape);
  if (TripletsOf(shape, tensor.inputs) == 0) {
    return Treatment{.notes = {"smaller than the number of models: the mean of the task vectors"}};
  }
  RETURN_IF_ERROR(
      CheckOrder(std::max(shape.rows, shape.columns), "leave it out with `linear_exclude`"));
  Treatment treatment;
  treatment.task =
      std::make_shared<const TsvTask>(shape, tensor.ranks, tensor.dtype, tensor.result_dtype,
                                      std::get<double>(tensor.params.at("lambda")));
  return treatment;
}

std::vector<Param> Params() {
  std::vector<Param> params = LinearWeightParams();
  params.insert(params.begin(),
                {.name = "lambda", .help = "factor of the merged task vector", .fallback = 1.0});
  return params;
}

}  // namespace

absl::Span<const MergeMethod> tsv_m() {
  static const MergeMethod methods[] = {{
      .name = "tsv_m",
      .title = "TSV-M",
      .summary = "merges the leading singular triplets of the task vectors, their vectors made "
                 "orthonormal across tasks",
      .formula = "D_t ~ U_t S_t V_t^T of rank min(n, m) / T; out = base + lambda polar([U_t]) "
                 "diag(S_t) polar([V_t])^T; other tensors: base + lambda mean_t D_t",
      .reference = "https://arxiv.org/abs/2412.00081",
      .params = Params(),
      .base = BaseUse::kRequired,
      .min_inputs = 1,
      .treat = &Treat,
      .run =
          [](MethodContext& context) {
            return RunMeanOfTaskVectors(context, context.number("lambda"));
          },
  }};
  return methods;
}

}  // namespace pewter::methods
