// The joint space of a weight's task vectors: what methods that merge by singular vectors share.
//
// Task vectors D_t [n, m] are stacked as [D_1 ... D_T] (horizontal: their columns are vectors of
// one space) or as [D_1; ...; D_T] (vertical: their rows are). The stack's singular vectors on the
// shared side are the eigenvectors of the joint Gram matrix sum_t D_t D_t^T (or D_t^T D_t). Those
// on the other side are not formed: u_j^T D_t = s_j v_jt, a *block* of the stack. Where the stack
// has a smaller extent on the other side, the Gram matrix of that side is taken: its vectors are
// the v_jt, which give the blocks without a product, and are carried over.
//
// A task vector may be a product L R of an adapter's factors, and stays one: it takes part in Gram
// matrices and projections by its factors. Where all are products whose ranks sum to less than the
// shared side, [L_1 ... L_T] = Q R leaves an eigenvalue problem of the sum of the ranks.
//
// All is double, in the memory of the backend; sizes are elements. Errors are the backend's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/linear_algebra.h"
#include "merge/methods/common/low_rank.h"
#include "merge/methods/tensor_task.h"

namespace pewter::methods {

// A matrix in the backend's memory that is its own.
struct OwnMatrix {
  std::unique_ptr<kernels::Buffer> memory;
  kernels::Matrix view;

  static absl::StatusOr<OwnMatrix> Make(kernels::Backend& backend, int64_t rows, int64_t columns);
};

absl::StatusOr<OwnMatrix> MakeIdentity(kernels::Backend& backend, int64_t size);

enum class Stack { kHorizontal, kVertical };

// Of a matrix [rows, columns]: the extent that the stacked matrices share, and the other one.
inline int64_t SharedSide(Stack stack, MatrixShape shape) {
  return stack == Stack::kHorizontal ? shape.rows : shape.columns;
}
inline int64_t BlockLength(Stack stack, MatrixShape shape) {
  return stack == Stack::kHorizontal ? shape.columns : shape.rows;
}

// A task vector, or some rows of one.
struct TaskVector {
  MatrixShape shape;
  kernels::ConstMatrix dense;   // where it is no product
  kernels::Matrix left, right;  // [rows, rank], [rank, columns]; a rank of 0: it is no product

  bool product() const { return left.columns > 0; }
};
using Deltas = absl::Span<const TaskVector>;

// Base and inputs of a task, whole.
class TaskVectors {
 public:
  // `ranks`: TensorFacts::ranks.
  static absl::StatusOr<TaskVectors> Load(TaskContext& context, absl::Span<const int64_t> ranks);
  // What Load takes.
  static int64_t Bytes(MatrixShape shape, DType dtype, absl::Span<const int64_t> ranks);

  MatrixShape shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  // Rows [first, first + rows) of each task vector.
  std::vector<TaskVector> Rows(int64_t first, int64_t rows) const;

  // Frees task vector `t`; the base stays. No delta of it is used afterwards.
  void Release(int t) { inputs_[t].memory = nullptr; }

  // Writes base + delta into rows [begin, end) of a task's result, where rows [first, first +
  // out.rows) of delta are what `rows_of(first, out)` sets `out` to.
  absl::Status Emit(kernels::Backend& backend, int64_t begin, int64_t end,
                    absl::FunctionRef<absl::Status(int64_t first, kernels::Matrix out)> rows_of,
                    kernels::View result) const;
  // What it holds besides the result.
  static int64_t EmitBytes(MatrixShape shape);

 private:
  MatrixShape shape_;
  DType dtype_ = DType::kF32;
  std::unique_ptr<kernels::Buffer> base_, host_base_;  // null: the base is in host memory
  struct Input {
    std::unique_ptr<kernels::Buffer> memory;  // the tensor, or L and then R
    int64_t rank = 0;
  };
  std::vector<Input> inputs_;
};

// to = x d^T for x [k, columns], and x d for x [k, rows].
absl::Status MultiplyTransposed(kernels::Backend& backend, const kernels::Matrix& x,
                                const TaskVector& d, kernels::Matrix to);
absl::Status Multiply(kernels::Backend& backend, const kernels::Matrix& x, const TaskVector& d,
                      kernels::Matrix to);

struct JointBasis {
  // Singular values of the stack, largest first: all that are not zero by its extents.
  std::vector<double> spectrum;
  std::unique_ptr<kernels::Buffer> memory;
  // One of the two, the other has no columns:
  kernels::Matrix vectors;  // [rank, side]: orthonormal rows, those of the largest values
  kernels::Matrix others;  // [rank, count * length]: the v_jt of all t in a row. The other side was
                           // the smaller: the blocks are these times the values

  bool of_other_side() const { return others.columns > 0; }
  int64_t rank() const { return of_other_side() ? others.rows : vectors.rows; }
};

// Which singular values are kept: those above relative * the largest, and above absolute. Values
// below 1e-7 of the largest are noise.
struct RankCut {
  double relative = 0;
  double absolute = 0;
};

absl::StatusOr<JointBasis> FindJointBasis(kernels::Backend& backend, Deltas deltas, Stack stack,
                                          const RankCut& cut);
// The order of the eigenvalue problem that it solves, and bytes that it takes at most while it runs
// and keeps.
struct JointBasisCost {
  int64_t order = 0;
  int64_t peak = 0;
  int64_t kept = 0;
  int64_t rank = 0;  // at most
};
JointBasisCost CostOfJointBasis(MatrixShape shape, absl::Span<const int64_t> ranks, Stack stack,
                                const RankCut& cut);

// The blocks s_j v_jt of all task vectors, [rank, length] each.
struct JointBlocks {
  std::vector<std::unique_ptr<kernels::Buffer>> memory;  // of each block
  int64_t rank = 0;
  int64_t length = 0;
  int count = 0;

  kernels::Matrix Of(int t) const;
  kernels::ConstView View(int t) const;
  std::vector<kernels::ConstView> Views() const;
};
// `used_up`: the task vectors, each of which is released as soon as it has its block, unless the
// way back (Expansion) needs it; or null.
absl::StatusOr<JointBlocks> ProjectOnBasis(kernels::Backend& backend, const JointBasis& basis,
                                           Deltas deltas, Stack stack, TaskVectors* used_up);

// Norms of the blocks' rows: that of row j of block t is value j * count + t.
absl::StatusOr<std::vector<double>> RowNorms(kernels::Backend& backend, const JointBlocks& blocks);

// What a user is told of a tensor, or of `part` of it (TaskContext::Report):
//   spectrum        at most kReportedValues singular values, evenly spaced from first to last
//   directions      how many there are, and how many of these are kept
//   in_directions   by model: the share of its task vector's energy (squared norm) in those
//   kept            by model: the share that is left when entries are trimmed, too
//   overlap         by pair of models, row-major: the cosine between how their energies are spread
//                   over the directions
inline constexpr int64_t kReportedValues = 128;
void ReportSpectrum(TaskContext& context, absl::string_view part, absl::Span<const double> values,
                    int64_t kept);
// `norms` as RowNorms gives them, `squares` the models' squared norms.
void ReportTasks(TaskContext& context, absl::string_view part, absl::Span<const double> norms,
                 absl::Span<const double> squares);
// `op` of block `t` alone, whose terms are what is kept of it.
absl::StatusOr<double> KeptSquare(kernels::Backend& backend, const JointBlocks& blocks, int t,
                                  const kernels::ElectedMean& op);
absl::StatusOr<double> SquaredNorm(kernels::Backend& backend, const TaskVector& delta);

// Values of rows or columns where the ops of a backend can read them.
class PlacedValues {
 public:
  static absl::StatusOr<PlacedValues> Make(kernels::Backend& backend, std::vector<double> values);
  const double* data() const { return data_; }

 private:
  std::vector<double> values_;
  std::unique_ptr<kernels::Buffer> memory_;
  const double* data_ = nullptr;
};

// The matrix [n, m] whose block is `block`. Basis, block and deltas must outlive it.
class Expansion {
 public:
  // `block` is destroyed where the basis is of the other side.
  static absl::StatusOr<Expansion> Make(kernels::Backend& backend, const JointBasis& basis,
                                        const kernels::Matrix& block, Stack stack, Deltas deltas);
  // Rows [first, first + out.rows).
  absl::Status Rows(kernels::LinearAlgebra& algebra, int64_t first, kernels::Matrix out) const;

 private:
  Expansion(const JointBasis& basis, const kernels::Matrix& block, Stack stack, Deltas deltas)
      : basis_(basis), block_(block), stack_(stack), deltas_(deltas) {}

  const JointBasis& basis_;
  kernels::Matrix block_;
  Stack stack_;
  Deltas deltas_;
  std::vector<OwnMatrix> factors_;  // by model: what D_t is multiplied with; none: the basis is
};

}  // namespace pewter::methods
