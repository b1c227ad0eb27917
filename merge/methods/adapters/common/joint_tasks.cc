#include "merge/methods/adapters/common/joint_tasks.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/status.h"
#include "kernels/linear_algebra.h"
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/tasks.h"
#include "merge/methods/common/joint_space.h"
#include "merge/methods/common/singular_vectors.h"
#include "merge/methods/common/trimmed_merge.h"

namespace pewter::adapters {
namespace {

using kernels::Matrix;
using kernels::Transpose;
using methods::OwnMatrix;
using methods::Stack;

constexpr int64_t kWidth = sizeof(double);

class DrmTask : public TensorTask {
 public:
  explicit DrmTask(const AdapterModule& module) : module_(module) {
    for (const AdapterInput& input : module.inputs) {
      ranks_.push_back(input.rank);
      merge_.weights.push_back(input.number("weight"));
    }
    merge_.density = std::get<double>(*module.Find("density"));
    merge_.disjoint = std::get<bool>(*module.Find("disjoint_mean"));
    cut_.relative = std::get<double>(*module.Find("rank_cut"));
    if (std::get<std::string>(*module.Find("direction")) == "vertical") stack_ = Stack::kVertical;
  }

  const char* name() const override { return "drm"; }
  int64_t bytes() const override {
    const MatrixShape shape = {module_.out, module_.in};
    const methods::JointBasisCost cost = CostOfJointBasis(shape, ranks_, stack_, cut_);
    const int64_t length = BlockLength(stack_, shape), sides = module_.out + module_.in;
    int64_t factors = 0;
    for (int64_t rank : ranks_) factors += 2 * rank * sides * kWidth;
    const int64_t blocks = static_cast<int64_t>(ranks_.size()) * cost.rank * (length + 2) * kWidth;
    const int64_t merged =
        methods::SvdBytes({cost.rank, length}) + 2 * module_.rank * sides * kWidth;
    return factors + std::max(cost.peak, cost.kept + blocks + merged) +
           module_.rank * sides * int64_t{sizeof(float)};
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    kernels::Backend& backend = context.backend();
    std::vector<OwnMatrix> memory;
    ASSIGN_OR_RETURN(const std::vector<methods::TaskVector> deltas, Load(context, memory));
    ASSIGN_OR_RETURN(const methods::JointBasis basis,
                     FindJointBasis(backend, deltas, stack_, cut_));
    auto* const to_a = static_cast<float*>(result.data);
    float* const to_b = to_a + module_.rank * module_.in;
    std::fill_n(to_a, module_.rank * (module_.in + module_.out), 0.0f);
    if (basis.rank() == 0) return absl::OkStatus();  // all adapters are zero here
    ASSIGN_OR_RETURN(methods::JointBlocks blocks,
                     ProjectOnBasis(backend, basis, deltas, stack_, nullptr));
    RETURN_IF_ERROR(MergeTrimmed(backend, blocks, basis.spectrum[0], merge_, {}));

    // The merge is V^T M for the basis' rows V, with M = U S W^T.
    const Matrix merged = blocks.Of(0);
    OwnMatrix block = {std::move(blocks.memory[0]), merged};
    ASSIGN_OR_RETURN(const methods::ThinSvd svd, methods::SvdOf(backend, std::move(block)));
    const auto values = static_cast<int64_t>(svd.values.size());
    const int64_t rank = std::min(module_.rank, values), side = basis.vectors.columns;
    ASSIGN_OR_RETURN(const OwnMatrix on_side, OwnMatrix::Make(backend, rank, side));
    const Matrix leading = {svd.u.view.data, svd.u.view.rows, rank, svd.u.view.stride};
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    RETURN_IF_ERROR(
        algebra->Gemm(Transpose::kYes, leading, Transpose::kNo, basis.vectors, 1, 0, on_side.view));
    ASSIGN_OR_RETURN(const std::vector<double> shared, Fetch(backend, on_side.view));
    ASSIGN_OR_RETURN(
        const std::vector<double> others,
        Fetch(backend, {svd.vt.view.data, rank, svd.vt.view.columns, svd.vt.view.stride}));
    const bool horizontal = stack_ == Stack::kHorizontal;
    const std::vector<double>& of_b = horizontal ? shared : others;
    const std::vector<double>& of_a = horizontal ? others : shared;
    for (int64_t k = 0; k < rank; ++k) {
      const double* const row_b = of_b.data() + k * module_.out;
      const double* const row_a = of_a.data() + k * module_.in;
      const double largest = *std::max_element(
          row_b, row_b + module_.out, [](double x, double y) { return std::abs(x) < std::abs(y); });
      const double sign = largest < 0 ? -1 : 1;
      for (int64_t i = 0; i < module_.out; ++i) {
        to_b[i * module_.rank + k] = static_cast<float>(sign * svd.values[k] * row_b[i]);
      }
      for (int64_t j = 0; j < module_.in; ++j) {
        to_a[k * module_.in + j] = static_cast<float>(sign * row_a[j]);
      }
    }
    return absl::OkStatus();
  }

 private:
  static absl::StatusOr<std::vector<double>> Fetch(kernels::Backend& backend, const Matrix& m) {
    std::vector<double> values(m.rows * m.columns);
    RETURN_IF_ERROR(
        backend.Download(m.data, values.data(), static_cast<int64_t>(values.size()) * kWidth));
    RETURN_IF_ERROR(backend.Synchronize());
    return values;
  }

  // An operand as double, times a factor.
  static absl::StatusOr<OwnMatrix> LoadOne(TaskContext& context, int operand, int64_t rows,
                                           int64_t columns, double factor) {
    ASSIGN_OR_RETURN(const auto stored, context.Load(operand, TaskContext::Where::kHost));
    const auto* const from = static_cast<const float*>(stored->data());
    std::vector<double> values(from, from + rows * columns);
    for (double& value : values) value *= factor;
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(OwnMatrix m, OwnMatrix::Make(backend, rows, columns));
    RETURN_IF_ERROR(backend.Upload(values.data(), m.view.data, rows * columns * kWidth));
    RETURN_IF_ERROR(backend.Synchronize());  // before the values go
    return m;
  }

  absl::StatusOr<std::vector<methods::TaskVector>> Load(TaskContext& context,
                                                        std::vector<OwnMatrix>& memory) const {
    std::vector<methods::TaskVector> deltas;
    for (size_t i = 0; i < module_.inputs.size(); ++i) {
      const AdapterInput& input = module_.inputs[i];
      const int a = static_cast<int>(2 * i), b = a + 1;
      ASSIGN_OR_RETURN(OwnMatrix left, LoadOne(context, b, module_.out, input.rank, input.scale));
      ASSIGN_OR_RETURN(OwnMatrix right, LoadOne(context, a, input.rank, module_.in, 1));
      methods::TaskVector& delta = deltas.emplace_back();
      delta.shape = {module_.out, module_.in};
      delta.left = left.view;
      delta.right = right.view;
      memory.push_back(std::move(left));
      memory.push_back(std::move(right));
    }
    return deltas;
  }

  const AdapterModule module_;
  std::vector<int64_t> ranks_;
  methods::TrimmedMerge merge_;
  methods::RankCut cut_;
  Stack stack_ = Stack::kHorizontal;
};

}  // namespace

std::vector<Param> JointParams() {
  Param weight = WeightParam();
  weight.help = "factor of this adapter's entries in the mean, after the signs are elected";
  weight.fallback = 1.0;
  return WithRankParams(
      {weight,
       {.name = "density",
        .help = "share of the entries of the normalised singular matrices that is kept, of all "
                "adapters together; 1: nothing is trimmed",
        .fallback = 0.2,
        .min = 0,
        .max = 1},
       {.name = "direction",
        .help = "which way the adapters' products are stacked",
        .type = ParamType::kString,
        .fallback = "horizontal",
        .choices = {"horizontal", "vertical"}},
       {.name = "disjoint_mean",
        .help = "divide by the number of adapters that count at a place; false: by all",
        .type = ParamType::kBool,
        .fallback = true},
       {.name = "rank_cut",
        .help = "directions whose singular value is not above this share of the largest are "
                "dropped",
        .fallback = 0.01,
        .min = 1e-6,
        .max = 1}});
}

std::shared_ptr<const TensorTask> MakeDrmTask(const AdapterMethod&, const AdapterModule& module) {
  return std::make_shared<const DrmTask>(module);
}

}  // namespace pewter::adapters
