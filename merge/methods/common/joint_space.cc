#include "merge/methods/common/joint_space.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/status.h"

namespace pewter::methods {
namespace {

using kernels::ConstMatrix;
using kernels::ConstView;
using kernels::Matrix;
using kernels::Transpose;

constexpr int64_t kWidth = sizeof(double);
// Products are cut into blocks of this many rows.
constexpr int64_t kRowsAtATime = 512;
// Blocks that the linear algebra widens while it multiplies.
constexpr int64_t kProductBytes = int64_t{8} << 20;
// A vector carried over from the other side has an error of 1e-16 (s_1 / s_j)^2: below this cut
// the shared side's own Gram matrix is taken even where it is the larger.
constexpr double kLeastCarriedOver = 1e-3;

bool TakesOtherSide(MatrixShape shape, int count, Stack stack, const RankCut& cut) {
  return count * BlockLength(stack, shape) < SharedSide(stack, shape) &&
         cut.relative >= kLeastCarriedOver;
}

MatrixShape ShapeOf(const ConstMatrix& m) { return {m.rows, m.columns}; }

// Columns [first, first + columns) of a matrix.
Matrix Columns(const Matrix& m, int64_t first, int64_t columns) {
  return {m.data + first, m.rows, columns, m.stride};
}

absl::StatusOr<Matrix> AllocateMatrix(kernels::Backend& backend, int64_t rows, int64_t columns,
                                      std::unique_ptr<kernels::Buffer>& memory) {
  ASSIGN_OR_RETURN(memory, backend.Allocate(rows * columns * kWidth));
  return Matrix{static_cast<double*>(memory->data()), rows, columns, columns};
}

// How many of the values, largest first, stay.
int64_t RankOf(const std::vector<double>& values, const RankCut& cut) {
  if (values.empty()) return 0;
  const double least = std::max(cut.relative * values[0], cut.absolute);
  return std::count_if(values.begin(), values.end(), [&](double value) { return value > least; });
}

// The vectors of the other side, [rank, count * length], become those of the shared one.
absl::Status CarryOver(kernels::Backend& backend, kernels::LinearAlgebra& algebra,
                       const Matrix& others, absl::Span<const ConstMatrix> deltas, Stack stack,
                       JointBasis& basis) {
  const MatrixShape shape = ShapeOf(deltas[0]);
  const int64_t side = SharedSide(stack, shape), length = BlockLength(stack, shape);
  std::unique_ptr<kernels::Buffer> memory;
  ASSIGN_OR_RETURN(const Matrix vectors, AllocateMatrix(backend, others.rows, side, memory));
  const Transpose transpose = stack == Stack::kHorizontal ? Transpose::kYes : Transpose::kNo;
  for (size_t t = 0; t < deltas.size(); ++t) {
    RETURN_IF_ERROR(algebra.Gemm(Transpose::kNo,
                                 Columns(others, static_cast<int64_t>(t) * length, length),
                                 transpose, deltas[t], 1, t == 0 ? 0 : 1, vectors));
  }
  std::vector<double> inverse;
  for (int64_t j = 0; j < others.rows; ++j) inverse.push_back(1 / basis.spectrum[j]);
  ASSIGN_OR_RETURN(const PlacedValues placed, PlacedValues::Make(backend, std::move(inverse)));
  const kernels::AxisCombination scale = {
      .count = 1, .axis = {.row = side, .count = 1, .values = placed.data()}};
  const int64_t size = others.rows * side;
  RETURN_IF_ERROR(backend.Map(scale, {{vectors.data, DType::kF64, size}},
                              {vectors.data, DType::kF64, size}, 0));
  RETURN_IF_ERROR(backend.Synchronize());  // before the values and the other side's vectors go
  basis.memory = std::move(memory);
  basis.vectors = vectors;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TaskVectors> TaskVectors::Load(TaskContext& context, int count) {
  TaskVectors vectors;
  vectors.shape_ = AsMatrix(context.shape(TaskContext::kBase));
  vectors.dtype_ = context.dtype(TaskContext::kBase);
  ASSIGN_OR_RETURN(vectors.base_, context.Load(TaskContext::kBase, TaskContext::Where::kBackend));
  if (!context.backend().host_memory()) {
    ASSIGN_OR_RETURN(vectors.host_base_,
                     context.Load(TaskContext::kBase, TaskContext::Where::kHost));
  }
  for (int t = 0; t < count; ++t) {
    ASSIGN_OR_RETURN(std::unique_ptr<kernels::Buffer> input,
                     context.Load(t, TaskContext::Where::kBackend));
    vectors.inputs_.push_back(std::move(input));
  }
  return vectors;
}

std::vector<ConstMatrix> TaskVectors::Rows(int64_t first, int64_t rows) const {
  const int64_t offset = first * shape_.columns * ByteWidth(dtype_);
  const auto at = [&](const std::unique_ptr<kernels::Buffer>& buffer) {
    return static_cast<const char*>(buffer->data()) + offset;
  };
  std::vector<ConstMatrix> deltas;
  for (const auto& input : inputs_) {
    deltas.push_back({.data = at(input),
                      .dtype = dtype_,
                      .rows = rows,
                      .columns = shape_.columns,
                      .stride = shape_.columns,
                      .minus = at(base_)});
  }
  return deltas;
}

absl::StatusOr<JointBasis> FindJointBasis(kernels::Backend& backend,
                                          absl::Span<const ConstMatrix> deltas, Stack stack,
                                          const RankCut& cut) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const MatrixShape shape = ShapeOf(deltas[0]);
  const int count = static_cast<int>(deltas.size());
  const bool other_side = TakesOtherSide(shape, count, stack, cut);
  const int64_t length = BlockLength(stack, shape);
  const int64_t order = other_side ? count * length : SharedSide(stack, shape);
  const bool horizontal = stack == Stack::kHorizontal;

  JointBasis basis;
  ASSIGN_OR_RETURN(const Matrix gram, AllocateMatrix(backend, order, order, basis.memory));
  for (int t = 0; t < count; ++t) {
    if (!other_side) {
      RETURN_IF_ERROR(algebra->Gram(horizontal ? Transpose::kNo : Transpose::kYes, deltas[t],
                                    t == 0 ? 0 : 1, gram));
      continue;
    }
    // Only the lower triangle is read.
    for (int s = 0; s <= t; ++s) {
      const Matrix part = {gram.data + t * length * order + s * length, length, length, order};
      RETURN_IF_ERROR(algebra->Gemm(horizontal ? Transpose::kYes : Transpose::kNo, deltas[t],
                                    horizontal ? Transpose::kNo : Transpose::kYes, deltas[s], 1, 0,
                                    part));
    }
  }
  RETURN_IF_ERROR(algebra->SymmetricEigen({{gram, &basis.spectrum}}));
  for (double& value : basis.spectrum) value = std::sqrt(std::max(value, 0.0));
  const int64_t rank = RankOf(basis.spectrum, cut);
  if (!other_side || rank == 0) {
    const int64_t side = SharedSide(stack, shape);
    basis.vectors = {gram.data, rank, side, side};
    return basis;
  }
  const Matrix vectors = {gram.data, rank, order, order};
  const std::unique_ptr<kernels::Buffer> others = std::move(basis.memory);
  RETURN_IF_ERROR(CarryOver(backend, *algebra, vectors, deltas, stack, basis));
  return basis;
}

JointBasisCost CostOfJointBasis(MatrixShape shape, int count, Stack stack, const RankCut& cut) {
  const int64_t side = SharedSide(stack, shape);
  JointBasisCost cost;
  cost.rank = std::min(side, count * BlockLength(stack, shape));
  const bool other_side = TakesOtherSide(shape, count, stack, cut);
  cost.order = other_side ? cost.rank : side;
  const int64_t square = cost.order * cost.order * kWidth;
  // The solver needs twice the matrix besides.
  cost.kept = other_side ? cost.rank * side * kWidth : square;
  cost.peak = std::max(3 * square + 8 * cost.order * kWidth, square + cost.kept) + kProductBytes;
  return cost;
}

Matrix JointBlocks::Of(int t) const {
  return {static_cast<double*>(memory->data()) + t * rank * length, rank, length, length};
}

ConstView JointBlocks::View(int t) const { return {Of(t).data, DType::kF64, rank * length}; }

std::vector<ConstView> JointBlocks::Views() const {
  std::vector<ConstView> views;
  for (int t = 0; t < count; ++t) views.push_back(View(t));
  return views;
}

absl::StatusOr<JointBlocks> ProjectOnBasis(kernels::Backend& backend, const JointBasis& basis,
                                           absl::Span<const ConstMatrix> deltas, Stack stack) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  JointBlocks blocks;
  blocks.rank = basis.rank();
  blocks.length = BlockLength(stack, ShapeOf(deltas[0]));
  blocks.count = static_cast<int>(deltas.size());
  ASSIGN_OR_RETURN(blocks.memory,
                   backend.Allocate(blocks.count * blocks.rank * blocks.length * kWidth));
  for (int t = 0; t < blocks.count; ++t) {
    RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, basis.vectors,
                                  stack == Stack::kHorizontal ? Transpose::kNo : Transpose::kYes,
                                  deltas[t], 1, 0, blocks.Of(t)));
  }
  return blocks;
}

absl::StatusOr<std::vector<double>> RowNorms(kernels::Backend& backend, const JointBlocks& blocks) {
  std::vector<double> norms(blocks.rank * blocks.count);
  for (int t = 0; t < blocks.count; ++t) {
    ASSIGN_OR_RETURN(const std::vector<double> squares,
                     backend.ReduceBlocks(kernels::Gram{.count = 1}, {blocks.View(t)}, 0,
                                          std::max<int64_t>(blocks.length, 1)));
    for (size_t j = 0; j < squares.size(); ++j) {
      norms[j * blocks.count + t] = std::sqrt(squares[j]);
    }
  }
  return norms;
}

absl::StatusOr<PlacedValues> PlacedValues::Make(kernels::Backend& backend,
                                                std::vector<double> values) {
  PlacedValues placed;
  placed.values_ = std::move(values);
  placed.data_ = placed.values_.data();
  if (backend.host_memory()) return placed;
  const auto bytes = static_cast<int64_t>(placed.values_.size()) * kWidth;
  ASSIGN_OR_RETURN(placed.memory_, backend.Allocate(bytes));
  RETURN_IF_ERROR(backend.Upload(placed.values_.data(), placed.memory_->data(), bytes));
  RETURN_IF_ERROR(backend.Synchronize());
  placed.data_ = static_cast<const double*>(placed.memory_->data());
  return placed;
}

absl::Status TaskVectors::Emit(kernels::Backend& backend, int64_t begin, int64_t end,
                               absl::FunctionRef<absl::Status(int64_t first, Matrix out)> rows_of,
                               kernels::View result) const {
  const auto& base = host_base_ == nullptr ? base_ : host_base_;
  const int64_t step = std::min(kRowsAtATime, end - begin);
  std::unique_ptr<kernels::Buffer> memory;
  ASSIGN_OR_RETURN(const Matrix block, AllocateMatrix(backend, step, shape_.columns, memory));
  std::vector<double> values(step * shape_.columns), of_base(values.size());
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first), size = rows * shape_.columns;
    RETURN_IF_ERROR(rows_of(first, {block.data, rows, shape_.columns, shape_.columns}));
    RETURN_IF_ERROR(backend.Download(block.data, values.data(), size * kWidth));
    const int64_t at = first * shape_.columns;
    kernels::Convert(
        {static_cast<const char*>(base->data()) + at * ByteWidth(dtype_), dtype_, size},
        {of_base.data(), DType::kF64, size});
    RETURN_IF_ERROR(backend.Synchronize());
    for (int64_t i = 0; i < size; ++i) values[i] += of_base[i];
    kernels::Convert(
        {values.data(), DType::kF64, size},
        {static_cast<char*>(result.data) + at * ByteWidth(result.dtype), result.dtype, size});
  }
  return absl::OkStatus();
}

int64_t TaskVectors::EmitBytes(MatrixShape shape) {
  return 3 * std::min(kRowsAtATime, shape.rows) * shape.columns * kWidth;
}

absl::Status ExpandRows(kernels::LinearAlgebra& algebra, const JointBasis& basis,
                        const Matrix& block, Stack stack, int64_t first, Matrix out) {
  if (stack == Stack::kHorizontal) {
    return algebra.Gemm(Transpose::kYes, Columns(basis.vectors, first, out.rows), Transpose::kNo,
                        block, 1, 0, out);
  }
  return algebra.Gemm(Transpose::kYes, Columns(block, first, out.rows), Transpose::kNo,
                      basis.vectors, 1, 0, out);
}

}  // namespace pewter::methods
