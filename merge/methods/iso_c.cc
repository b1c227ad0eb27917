// Iso-C and Iso-CTS (No Task Left Behind, arXiv 2502.04959; github.com/danielm1405/iso-merging):
// merges whose singular values are made equal.
//
//   M = sum_t D_t = U S V^T, q = min(n, m) values
//   Iso-C:    out = base + lambda mean(S) U V^T
//   Iso-CTS:  p = round((q - floor(q f)) / T) directions of each task, c = q - p T common ones:
//             U_c, the c leading left vectors of M, and the p leading triplets of
//             (I - U_c U_c^T) D_t; both sides made orthonormal together (polar factor), all values
//             their mean: out = base + lambda mean polar([U_1 ... U_T U_c]) polar([V_...])^T
//
// Tensors that are not linear weights: base + lambda mean of the task vectors, as the authors do.
// Every direction gets the same weight, those of a null space too, and these are rounding noise:
// sums without full rank are refused. A weight that no task changes is the base's; to one that a
// task leaves as it is (frozen layers), that task adds no directions of its own.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/methods/common/joint_space.h"
#include "merge/methods/common/linear_weights.h"
#include "merge/methods/common/singular_vectors.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

using kernels::Matrix;
using kernels::Transpose;

// Singular values below this share of the largest are those of a null space.
constexpr double kNullSpace = 1e-9;

Matrix RowsOf(const OwnMatrix& m, int64_t first, int64_t rows) {
  return {m.view.data + first * m.view.stride, rows, m.view.columns, m.view.stride};
}

TaskVector AsTaskVector(const OwnMatrix& m) {
  return {.shape = {m.view.rows, m.view.columns}, .dense = m.view, .left = {}, .right = {}};
}

absl::Status Deficient(absl::string_view what, int64_t rank, int64_t of) {
  return absl::FailedPreconditionError(absl::StrCat(
      what, " has rank ", rank, " of ", of,
      ", and making its singular values equal would turn rounding noise into weights; leave the "
      "tensor out with `linear_exclude`, or use drm or knots_ties"));
}

absl::Status CheckFullRank(absl::string_view what, absl::Span<const double> values,
                           double largest) {
  const int64_t rank = std::count_if(values.begin(), values.end(),
                                     [&](double value) { return value > kNullSpace * largest; });
  if (rank == static_cast<int64_t>(values.size())) return absl::OkStatus();
  return Deficient(what, rank, static_cast<int64_t>(values.size()));
}

class IsoTask : public TensorTask {
 public:
  // `common_fraction` < 0: Iso-C.
  IsoTask(MatrixShape shape, std::vector<int64_t> ranks, DType dtype, DType result_dtype,
          double lambda, double common_fraction)
      : shape_(shape),
        ranks_(std::move(ranks)),
        count_(static_cast<int>(ranks_.size())),
        dtype_(dtype),
        result_dtype_(result_dtype),
        lambda_(lambda),
        common_fraction_(common_fraction) {}

  const char* name() const override { return common_fraction_ < 0 ? "iso_c" : "iso_cts"; }
  DType result_dtype() const override { return result_dtype_; }
  int64_t bytes() const override {
    const int64_t elements = shape_.rows * shape_.columns, width = sizeof(double);
    const int64_t stacks =
        common_fraction_ < 0 ? 0 : side() * (2 * shape_.rows + shape_.columns) * width;
    return TaskVectors::Bytes(shape_, dtype_, ranks_) + 4 * elements * width +
           (stacks > 0 ? 2 : 1) * SvdBytes(shape_) + stacks + TaskVectors::EmitBytes(shape_) +
           elements * ByteWidth(result_dtype_);
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(const TaskVectors vectors, TaskVectors::Load(context, ranks_));
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    const std::vector<TaskVector> deltas = vectors.Rows(0, shape_.rows);
    ASSIGN_OR_RETURN(OwnMatrix sum, SumOf(backend, deltas));
    ASSIGN_OR_RETURN(const ThinSvd svd, SvdOf(backend, std::move(sum)));
    if (context.reports()) {
      const auto rank = std::count_if(svd.values.begin(), svd.values.end(), [&](double value) {
        return value > kNullSpace * svd.values[0];
      });
      ReportSpectrum(context, "", svd.values, rank);
    }
    // Models that do not differ from the base: all of it is zeros.
    if (svd.values[0] > 0) {
      if (common_fraction_ >= 0) return RunCommonAndTasks(backend, vectors, deltas, svd, result);
      RETURN_IF_ERROR(CheckFullRank("the sum of the task vectors", svd.values, svd.values[0]));
    }
    const double mean =
        std::accumulate(svd.values.begin(), svd.values.end(), 0.0) / static_cast<double>(side());
    const auto rows_of = [&](int64_t first, Matrix out) {
      return algebra->Gemm(Transpose::kNo, RowsOf(svd.u, first, out.rows), Transpose::kNo,
                           svd.vt.view, lambda_ * mean, 0, out);
    };
    return vectors.Emit(backend, 0, shape_.rows, rows_of, result);
  }

 private:
  int64_t side() const { return std::min(shape_.rows, shape_.columns); }

  absl::Status RunCommonAndTasks(kernels::Backend& backend, const TaskVectors& vectors,
                                 Deltas deltas, const ThinSvd& svd, kernels::View result) const {
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    const int64_t q = side();
    const auto asked = static_cast<int64_t>(static_cast<double>(q) * common_fraction_);
    auto own = static_cast<int64_t>(
        std::nearbyint(static_cast<double>(q - asked) / static_cast<double>(count_)));
    if (own * count_ > q) --own;
    const int64_t common = q - own * count_;
    RETURN_IF_ERROR(CheckFullRank("the sum of the task vectors",
                                  absl::MakeConstSpan(svd.values).subspan(0, common),
                                  svd.values[0]));

    // The tasks' vectors first, as the authors stack them.
    ASSIGN_OR_RETURN(OwnMatrix ut, OwnMatrix::Make(backend, q, shape_.rows));
    ASSIGN_OR_RETURN(OwnMatrix vt, OwnMatrix::Make(backend, q, shape_.columns));
    double values = std::accumulate(svd.values.begin(), svd.values.begin() + common, 0.0);
    OwnMatrix common_ut;
    if (common > 0) {
      ASSIGN_OR_RETURN(common_ut, OwnMatrix::Make(backend, common, shape_.rows));
      ASSIGN_OR_RETURN(const OwnMatrix sum, SumOf(backend, deltas));
      RETURN_IF_ERROR(LeftVectors(backend, AsTaskVector(sum), RowsOf(svd.vt, 0, common), svd.values,
                                  common_ut.view));
    }
    int64_t first = 0;
    for (int t = 0; t < count_ && own > 0; ++t) {
      ASSIGN_OR_RETURN(OwnMatrix rest, SumOf(backend, deltas.subspan(t, 1)));
      if (common > 0) {
        ASSIGN_OR_RETURN(const OwnMatrix in_common,
                         OwnMatrix::Make(backend, common, shape_.columns));
        RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, common_ut.view, Transpose::kNo, rest.view, 1,
                                      0, in_common.view));
        RETURN_IF_ERROR(algebra->Gemm(Transpose::kYes, common_ut.view, Transpose::kNo,
                                      in_common.view, -1, 1, rest.view));
        RETURN_IF_ERROR(backend.Synchronize());
      }
      ASSIGN_OR_RETURN(OwnMatrix copy, OwnMatrix::Make(backend, shape_.rows, shape_.columns));
      RETURN_IF_ERROR(backend.Copy(rest.view.data, copy.view.data,
                                   shape_.rows * shape_.columns * int64_t{sizeof(double)}));
      ASSIGN_OR_RETURN(const ThinSvd of_task, SvdOf(backend, std::move(copy)));
      if (of_task.values[0] == 0) continue;
      const absl::Span<const double> leading = absl::MakeConstSpan(of_task.values).subspan(0, own);
      RETURN_IF_ERROR(
          CheckFullRank("what a task vector adds to the common space", leading, svd.values[0]));
      const Matrix own_vt = RowsOf(vt, first, own);
      RETURN_IF_ERROR(backend.Copy(of_task.vt.view.data, own_vt.data,
                                   own * shape_.columns * int64_t{sizeof(double)}));
      RETURN_IF_ERROR(
          LeftVectors(backend, AsTaskVector(rest), own_vt, leading, RowsOf(ut, first, own)));
      values += std::accumulate(leading.begin(), leading.end(), 0.0);
      first += own;
    }
    if (common > 0) {
      RETURN_IF_ERROR(backend.Copy(common_ut.view.data, RowsOf(ut, first, common).data,
                                   common * shape_.rows * int64_t{sizeof(double)}));
      RETURN_IF_ERROR(backend.Copy(svd.vt.view.data, RowsOf(vt, first, common).data,
                                   common * shape_.columns * int64_t{sizeof(double)}));
    }
    ut.view.rows = vt.view.rows = first + common;
    for (OwnMatrix* side : {&ut, &vt}) {
      const absl::Status orthonormal = MakeRowsOrthonormal(backend, *side);
      if (absl::IsFailedPrecondition(orthonormal)) {
        return absl::FailedPreconditionError(
            "the singular vectors that Iso-CTS collects depend on each other, and it has no result "
            "then; leave the tensor out with `linear_exclude`, or use drm");
      }
      RETURN_IF_ERROR(orthonormal);
    }
    const double mean = values / static_cast<double>(first + common);
    const auto rows_of = [&](int64_t first, Matrix out) {
      const Matrix columns = {ut.view.data + first, ut.view.rows, out.rows, ut.view.stride};
      return algebra->Gemm(Transpose::kYes, columns, Transpose::kNo, vt.view, lambda_ * mean, 0,
                           out);
    };
    return vectors.Emit(backend, 0, shape_.rows, rows_of, result);
  }

  const MatrixShape shape_;
  const std::vector<int64_t> ranks_;
  const int count_;
  const DType dtype_, result_dtype_;
  const double lambda_, common_fraction_;
};

absl::StatusOr<Treatment> Treat(const TensorFacts& tensor) {
  if (!IsLinearWeight(tensor)) return Treatment{};
  const MatrixShape shape = AsMatrix(tensor.shape);
  RETURN_IF_ERROR(
      CheckOrder(std::max(shape.rows, shape.columns), "leave it out with `linear_exclude`"));
  // Adapters alone: the ranks tell without looking.
  const int64_t rank = absl::c_accumulate(tensor.ranks, int64_t{0});
  const int64_t full = std::min(shape.rows, shape.columns);
  if (rank < full && absl::c_all_of(tensor.ranks, [](int64_t of_input) { return of_input > 0; })) {
    return Deficient("the sum of the task vectors", rank, full);
  }
  const auto fraction = tensor.params.find("common_fraction");
  Treatment treatment;
  treatment.task = std::make_shared<const IsoTask>(
      shape, tensor.ranks, tensor.dtype, tensor.result_dtype,
      std::get<double>(tensor.params.at("lambda")),
      fraction == tensor.params.end() ? -1 : std::get<double>(fraction->second));
  return treatment;
}

std::vector<Param> Params(bool with_tasks) {
  std::vector<Param> params = {
      {.name = "lambda", .help = "factor of the merged task vector", .fallback = 1.0}};
  if (with_tasks) {
    params.push_back({.name = "common_fraction",
                      .help =
                          "about which share of the directions are those of the sum; the others "
                          "are the tasks' own, as many of each",
                      .fallback = 0.8,
                      .min = 0,
                      .max = 1});
  }
  const std::vector<Param> linear = LinearWeightParams();
  params.insert(params.end(), linear.begin(), linear.end());
  return params;
}

absl::Status Run(MethodContext& context) {
  return RunMeanOfTaskVectors(context, context.number("lambda"));
}

}  // namespace

absl::Span<const MergeMethod> iso_c() {
  static const MergeMethod methods[] = {
      {
          .name = "iso_c",
          .title = "Iso-C",
          .summary = "the sum of the task vectors with all singular values made equal",
          .formula = "sum_t D_t = U S V^T; out = base + lambda mean(S) U V^T; other tensors: base "
                     "+ lambda mean_t D_t",
          .reference = "https://arxiv.org/abs/2502.04959",
          .params = Params(false),
          .base = BaseUse::kRequired,
          .min_inputs = 1,
          .treat = &Treat,
          .run = &Run,
      },
      {
          .name = "iso_cts",
          .title = "Iso-CTS",
          .summary = "directions that the task vectors share and directions of each task, with all "
                     "singular values made equal",
          .formula = "U_c, V_c: leading vectors of sum_t D_t; U_t, V_t: those of (I - U_c U_c^T) "
                     "D_t; out = base + lambda mean(S) polar([U_t U_c]) polar([V_t V_c])^T; other "
                     "tensors: base + lambda mean_t D_t",
          .reference = "https://arxiv.org/abs/2502.04959",
          .params = Params(true),
          .base = BaseUse::kRequired,
          .min_inputs = 1,
          .treat = &Treat,
          .run = &Run,
      }};
  return methods;
}

}  // namespace pewter::methods
