#include "merge/methods/common/joint_space.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
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
// Elements that are converted at a time.
constexpr int64_t kRun = int64_t{1} << 15;
// A vector that follows from the other side's has an error of 1e-16 (s_1 / s_j)^2: below this cut
// the shared side's own Gram matrix is taken even where it is the larger.
constexpr double kLeastOfOtherSide = 1e-3;

// How the shared side's vectors are found.
enum class Way {
  kSharedSide,  // from its Gram matrix
  kOtherSide,   // from the other side's
  kFactors,     // in the space that the factors of products span
};
Way WayOf(MatrixShape shape, absl::Span<const int64_t> ranks, Stack stack, const RankCut& cut) {
  const int64_t side = SharedSide(stack, shape);
  if (!ranks.empty() && absl::c_all_of(ranks, [](int64_t rank) { return rank > 0; }) &&
      absl::c_accumulate(ranks, int64_t{0}) < side) {
    return Way::kFactors;
  }
  const bool dense = absl::c_all_of(ranks, [](int64_t rank) { return rank == 0; });
  const bool shorter = static_cast<int64_t>(ranks.size()) * BlockLength(stack, shape) < side;
  return dense && shorter && cut.relative >= kLeastOfOtherSide ? Way::kOtherSide : Way::kSharedSide;
}

std::vector<int64_t> RanksOf(Deltas deltas) {
  std::vector<int64_t> ranks;
  for (const TaskVector& delta : deltas) ranks.push_back(delta.left.columns);
  return ranks;
}

// Columns [first, first + columns) of a matrix.
Matrix Columns(const Matrix& m, int64_t first, int64_t columns) {
  return {m.data + first, m.rows, columns, m.stride};
}

// Rows [first, first + rows) of a matrix.
ConstMatrix RowsOf(ConstMatrix m, int64_t first, int64_t rows) {
  const int64_t offset = first * m.stride * ByteWidth(m.dtype);
  m.data = static_cast<const char*>(m.data) + offset;
  if (m.minus != nullptr) m.minus = static_cast<const char*>(m.minus) + offset;
  m.rows = rows;
  return m;
}

// How many of the values, largest first, stay.
int64_t RankOf(const std::vector<double>& values, const RankCut& cut) {
  if (values.empty()) return 0;
  const double least = std::max(cut.relative * values[0], cut.absolute);
  return std::count_if(values.begin(), values.end(), [&](double value) { return value > least; });
}

// Rows of a matrix times a number each, in place; rows follow each other without a gap.
absl::Status ScaleRows(kernels::Backend& backend, const Matrix& m, std::vector<double> factors) {
  ASSIGN_OR_RETURN(const PlacedValues placed, PlacedValues::Make(backend, std::move(factors)));
  const kernels::AxisCombination scale = {
      .count = 1, .axis = {.row = m.columns, .count = 1, .values = placed.data()}};
  const int64_t size = m.rows * m.columns;
  RETURN_IF_ERROR(
      backend.Map(scale, {{m.data, DType::kF64, size}}, {m.data, DType::kF64, size}, 0));
  return backend.Synchronize();  // before the values go
}

// The factor of a product on the shared side, [side, rank] or transposed, and the Gram matrix of
// the other one: D D^T = F S F^T.
absl::Status AddGramOfProduct(kernels::Backend& backend, kernels::LinearAlgebra& algebra,
                              const TaskVector& delta, Stack stack, double beta, Matrix gram) {
  const bool horizontal = stack == Stack::kHorizontal;
  const int64_t side = gram.rows, rank = delta.left.columns;
  ASSIGN_OR_RETURN(const OwnMatrix square, OwnMatrix::Make(backend, rank, rank));
  ASSIGN_OR_RETURN(const OwnMatrix half, OwnMatrix::Make(backend, side, rank));
  const Matrix& other = horizontal ? delta.right : delta.left;
  const Matrix& shared = horizontal ? delta.left : delta.right;
  RETURN_IF_ERROR(
      algebra.Gram(horizontal ? Transpose::kNo : Transpose::kYes, other, 0, square.view));
  const Transpose transpose = horizontal ? Transpose::kNo : Transpose::kYes;
  RETURN_IF_ERROR(algebra.Gemm(transpose, shared, Transpose::kNo, square.view, 1, 0, half.view));
  RETURN_IF_ERROR(algebra.Gemm(Transpose::kNo, half.view,
                               horizontal ? Transpose::kYes : Transpose::kNo, shared, 1, beta,
                               gram));
  return backend.Synchronize();  // before the parts go
}

// Of products alone: with F = [F_1 ... F_T] = Q R for the factors on the shared side, the stack is
// Q times one of as many rows as the ranks' sum.
absl::Status FindBasisOfFactors(kernels::Backend& backend, kernels::LinearAlgebra& algebra,
                                Deltas deltas, Stack stack, const RankCut& cut, JointBasis& basis) {
  const bool horizontal = stack == Stack::kHorizontal;
  const int64_t side = SharedSide(stack, deltas[0].shape);
  const int64_t order = absl::c_accumulate(RanksOf(deltas), int64_t{0});
  ASSIGN_OR_RETURN(const OwnMatrix identity, MakeIdentity(backend, order));
  ASSIGN_OR_RETURN(const OwnMatrix q, OwnMatrix::Make(backend, side, order));
  ASSIGN_OR_RETURN(const OwnMatrix r, OwnMatrix::Make(backend, order, order));
  ASSIGN_OR_RETURN(const OwnMatrix gram, OwnMatrix::Make(backend, order, order));
  int64_t column = 0;
  for (const TaskVector& delta : deltas) {
    const int64_t rank = delta.left.columns;
    // Places the factor: a product with rows of the identity is exact.
    const Matrix place = {identity.view.data + column * order, rank, order, order};
    RETURN_IF_ERROR(algebra.Gemm(horizontal ? Transpose::kNo : Transpose::kYes,
                                 horizontal ? delta.left : delta.right, Transpose::kNo, place, 1,
                                 column == 0 ? 0 : 1, q.view));
    column += rank;
  }
  RETURN_IF_ERROR(algebra.QrFactor(q.view, r.view));
  column = 0;
  for (const TaskVector& delta : deltas) {
    const int64_t rank = delta.left.columns;
    TaskVector in_space = delta;
    const Matrix of_r = Columns(r.view, column, rank);
    OwnMatrix turned;
    if (horizontal) {
      in_space.left = of_r;
    } else {
      ASSIGN_OR_RETURN(turned, OwnMatrix::Make(backend, rank, order));
      in_space.right = turned.view;
      RETURN_IF_ERROR(
          algebra.Gemm(Transpose::kYes, of_r, Transpose::kNo, identity.view, 1, 0, turned.view));
    }
    RETURN_IF_ERROR(
        AddGramOfProduct(backend, algebra, in_space, stack, column == 0 ? 0 : 1, gram.view));
    column += rank;
  }
  RETURN_IF_ERROR(algebra.SymmetricEigen({{gram.view, &basis.spectrum}}));
  for (double& value : basis.spectrum) value = std::sqrt(std::max(value, 0.0));
  const int64_t rank = RankOf(basis.spectrum, cut);
  const Matrix leading = {gram.view.data, rank, order, order};
  ASSIGN_OR_RETURN(OwnMatrix vectors, OwnMatrix::Make(backend, rank, side));
  RETURN_IF_ERROR(
      algebra.Gemm(Transpose::kNo, leading, Transpose::kYes, q.view, 1, 0, vectors.view));
  basis.memory = std::move(vectors.memory);
  basis.vectors = vectors.view;
  return backend.Synchronize();  // before the parts go
}

// to = x a b, where the product with `a` is the smaller.
absl::Status MultiplyTwice(kernels::Backend& backend, const Matrix& x, Transpose transpose_a,
                           const Matrix& a, Transpose transpose_b, const Matrix& b, Matrix to) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const int64_t rank = transpose_a == Transpose::kNo ? a.columns : a.rows;
  ASSIGN_OR_RETURN(const OwnMatrix half, OwnMatrix::Make(backend, x.rows, rank));
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, x, transpose_a, a, 1, 0, half.view));
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, half.view, transpose_b, b, 1, 0, to));
  return backend.Synchronize();  // before the half goes
}

}  // namespace

absl::StatusOr<OwnMatrix> OwnMatrix::Make(kernels::Backend& backend, int64_t rows,
                                          int64_t columns) {
  OwnMatrix m;
  ASSIGN_OR_RETURN(m.memory, backend.Allocate(rows * columns * kWidth));
  m.view = {static_cast<double*>(m.memory->data()), rows, columns, columns};
  return m;
}

absl::StatusOr<OwnMatrix> MakeIdentity(kernels::Backend& backend, int64_t size) {
  std::vector<double> values(size * size);
  for (int64_t i = 0; i < size; ++i) values[i * size + i] = 1;
  ASSIGN_OR_RETURN(OwnMatrix identity, OwnMatrix::Make(backend, size, size));
  RETURN_IF_ERROR(backend.Upload(values.data(), identity.view.data, size * size * kWidth));
  RETURN_IF_ERROR(backend.Synchronize());  // before the values go
  return identity;
}

absl::Status MultiplyTransposed(kernels::Backend& backend, const Matrix& x, const TaskVector& d,
                                Matrix to) {
  if (d.product()) {
    return MultiplyTwice(backend, x, Transpose::kYes, d.right, Transpose::kYes, d.left, to);
  }
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  return algebra->Gemm(Transpose::kNo, x, Transpose::kYes, d.dense, 1, 0, to);
}

absl::Status Multiply(kernels::Backend& backend, const Matrix& x, const TaskVector& d, Matrix to) {
  if (d.product()) {
    return MultiplyTwice(backend, x, Transpose::kNo, d.left, Transpose::kNo, d.right, to);
  }
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  return algebra->Gemm(Transpose::kNo, x, Transpose::kNo, d.dense, 1, 0, to);
}

absl::StatusOr<TaskVectors> TaskVectors::Load(TaskContext& context,
                                              absl::Span<const int64_t> ranks) {
  TaskVectors vectors;
  vectors.shape_ = AsMatrix(context.shape(TaskContext::kBase));
  vectors.dtype_ = context.dtype(TaskContext::kBase);
  ASSIGN_OR_RETURN(vectors.base_, context.Load(TaskContext::kBase, TaskContext::Where::kBackend));
  if (!context.backend().host_memory()) {
    ASSIGN_OR_RETURN(vectors.host_base_,
                     context.Load(TaskContext::kBase, TaskContext::Where::kHost));
  }
  kernels::Backend& backend = context.backend();
  for (size_t t = 0; t < ranks.size(); ++t) {
    const int input = static_cast<int>(t);
    Input& loaded = vectors.inputs_.emplace_back();
    if (ranks[t] == 0) {
      ASSIGN_OR_RETURN(loaded.memory, context.Load(input, TaskContext::Where::kBackend));
      continue;
    }
    ASSIGN_OR_RETURN(const TaskContext::Factors factors, context.LoadFactors(input));
    loaded.rank = factors.rank;
    const int64_t left = static_cast<int64_t>(factors.left.size()) * kWidth,
                  right = static_cast<int64_t>(factors.right.size()) * kWidth;
    ASSIGN_OR_RETURN(loaded.memory, backend.Allocate(left + right));
    auto* const data = static_cast<char*>(loaded.memory->data());
    RETURN_IF_ERROR(backend.Upload(factors.left.data(), data, left));
    RETURN_IF_ERROR(backend.Upload(factors.right.data(), data + left, right));
    RETURN_IF_ERROR(backend.Synchronize());  // before the factors go
  }
  return vectors;
}

int64_t TaskVectors::Bytes(MatrixShape shape, DType dtype, absl::Span<const int64_t> ranks) {
  int64_t bytes = 2 * shape.rows * shape.columns * ByteWidth(dtype);
  for (int64_t rank : ranks) {
    // Factors are in host memory first.
    bytes += rank == 0 ? shape.rows * shape.columns * ByteWidth(dtype)
                       : 2 * rank * (shape.rows + shape.columns) * kWidth;
  }
  return bytes;
}

std::vector<TaskVector> TaskVectors::Rows(int64_t first, int64_t rows) const {
  const int64_t offset = first * shape_.columns * ByteWidth(dtype_);
  std::vector<TaskVector> deltas;
  for (const Input& input : inputs_) {
    TaskVector& delta = deltas.emplace_back();
    delta.shape = {rows, shape_.columns};
    if (input.rank > 0) {
      auto* const data = static_cast<double*>(input.memory->data());
      delta.left = {data + first * input.rank, rows, input.rank, input.rank};
      delta.right = {data + shape_.rows * input.rank, input.rank, shape_.columns, shape_.columns};
      continue;
    }
    delta.dense = {.data = static_cast<const char*>(input.memory->data()) + offset,
                   .dtype = dtype_,
                   .rows = rows,
                   .columns = shape_.columns,
                   .stride = shape_.columns,
                   .minus = static_cast<const char*>(base_->data()) + offset};
  }
  return deltas;
}

absl::StatusOr<JointBasis> FindJointBasis(kernels::Backend& backend, Deltas deltas, Stack stack,
                                          const RankCut& cut) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const MatrixShape shape = deltas[0].shape;
  const int count = static_cast<int>(deltas.size());
  const Way way = WayOf(shape, RanksOf(deltas), stack, cut);
  JointBasis basis;
  if (way == Way::kFactors) {
    RETURN_IF_ERROR(FindBasisOfFactors(backend, *algebra, deltas, stack, cut, basis));
    return basis;
  }
  const bool other_side = way == Way::kOtherSide;
  const int64_t length = BlockLength(stack, shape);
  const int64_t order = other_side ? count * length : SharedSide(stack, shape);
  const bool horizontal = stack == Stack::kHorizontal;

  ASSIGN_OR_RETURN(OwnMatrix own, OwnMatrix::Make(backend, order, order));
  basis.memory = std::move(own.memory);
  const Matrix gram = own.view;
  for (int t = 0; t < count; ++t) {
    const double beta = t == 0 ? 0 : 1;
    if (deltas[t].product()) {
      RETURN_IF_ERROR(AddGramOfProduct(backend, *algebra, deltas[t], stack, beta, gram));
      continue;
    }
    if (!other_side) {
      RETURN_IF_ERROR(algebra->Gram(horizontal ? Transpose::kNo : Transpose::kYes, deltas[t].dense,
                                    beta, gram));
      continue;
    }
    // Only the lower triangle is read.
    const Transpose transpose = horizontal ? Transpose::kYes : Transpose::kNo;
    for (int s = 0; s <= t; ++s) {
      const Matrix part = {gram.data + t * length * order + s * length, length, length, order};
      RETURN_IF_ERROR(s == t ? algebra->Gram(transpose, deltas[t].dense, 0, part)
                             : algebra->Gemm(transpose, deltas[t].dense,
                                             horizontal ? Transpose::kNo : Transpose::kYes,
                                             deltas[s].dense, 1, 0, part));
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
  basis.others = {gram.data, rank, order, order};
  return basis;
}

JointBasisCost CostOfJointBasis(MatrixShape shape, absl::Span<const int64_t> ranks, Stack stack,
                                const RankCut& cut) {
  const int64_t side = SharedSide(stack, shape);
  const Way way = WayOf(shape, ranks, stack, cut);
  const int64_t sum_of_ranks = absl::c_accumulate(ranks, int64_t{0});
  const int64_t largest = ranks.empty() ? 0 : *absl::c_max_element(ranks);
  JointBasisCost cost;
  if (way == Way::kFactors) {
    cost.order = cost.rank = sum_of_ranks;
  } else {
    cost.rank = std::min(side, static_cast<int64_t>(ranks.size()) * BlockLength(stack, shape));
    cost.order = way == Way::kOtherSide ? cost.rank : side;
  }
  const int64_t square = cost.order * cost.order * kWidth;
  cost.kept = way == Way::kFactors ? cost.rank * side * kWidth : square;
  if (way == Way::kOtherSide) cost.kept += cost.order * BlockLength(stack, shape) * kWidth;
  // The solver needs two and a half times the matrix besides; factors that are multiplied have a
  // half product.
  cost.peak = std::max(7 * square / 2 + 8 * cost.order * kWidth,
                       (way == Way::kFactors ? square : 0) + cost.kept) +
              2 * largest * (side + largest) * kWidth;
  // Q, R and the identity, with the workspace of the QR.
  if (way == Way::kFactors) {
    cost.peak += cost.order * side * kWidth + 2 * square + 64 * cost.order * kWidth;
  }
  return cost;
}

Matrix JointBlocks::Of(int t) const {
  return {static_cast<double*>(memory[t]->data()), rank, length, length};
}

ConstView JointBlocks::View(int t) const { return {Of(t).data, DType::kF64, rank * length}; }

std::vector<ConstView> JointBlocks::Views() const {
  std::vector<ConstView> views;
  for (int t = 0; t < count; ++t) views.push_back(View(t));
  return views;
}

absl::StatusOr<JointBlocks> ProjectOnBasis(kernels::Backend& backend, const JointBasis& basis,
                                           Deltas deltas, Stack stack, TaskVectors* used_up) {
  JointBlocks blocks;
  blocks.rank = basis.rank();
  blocks.length = BlockLength(stack, deltas[0].shape);
  blocks.count = static_cast<int>(deltas.size());
  for (int t = 0; t < blocks.count; ++t) {
    ASSIGN_OR_RETURN(blocks.memory.emplace_back(),
                     backend.Allocate(blocks.rank * blocks.length * kWidth));
    if (blocks.rank == 0) continue;
    if (basis.of_other_side()) {
      const Matrix from = Columns(basis.others, t * blocks.length, blocks.length),
                   to = blocks.Of(t);
      for (int64_t j = 0; j < blocks.rank; ++j) {
        RETURN_IF_ERROR(backend.Copy(from.data + j * from.stride, to.data + j * to.stride,
                                     blocks.length * kWidth));
      }
      RETURN_IF_ERROR(
          ScaleRows(backend, to, {basis.spectrum.begin(), basis.spectrum.begin() + blocks.rank}));
    } else {
      RETURN_IF_ERROR(stack == Stack::kHorizontal
                          ? Multiply(backend, basis.vectors, deltas[t], blocks.Of(t))
                          : MultiplyTransposed(backend, basis.vectors, deltas[t], blocks.Of(t)));
    }
    if (used_up == nullptr || basis.of_other_side()) continue;
    RETURN_IF_ERROR(backend.Synchronize());
    used_up->Release(t);
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

void ReportSpectrum(TaskContext& context, absl::string_view part, absl::Span<const double> values,
                    int64_t kept) {
  const auto count = static_cast<int64_t>(values.size()), shown = std::min(count, kReportedValues);
  std::vector<double> some;
  for (int64_t i = 0; i < shown; ++i) {
    some.push_back(values[shown == 1 ? 0 : i * (count - 1) / (shown - 1)]);
  }
  context.Report(absl::StrCat(part, "spectrum"), std::move(some));
  context.Report(absl::StrCat(part, "directions"),
                 {static_cast<double>(count), static_cast<double>(kept)});
}

void ReportTasks(TaskContext& context, absl::string_view part, absl::Span<const double> norms,
                 absl::Span<const double> squares) {
  const size_t count = squares.size();
  std::vector<double> energy(count), products(count * count);
  for (size_t j = 0; j < norms.size(); j += count) {
    for (size_t s = 0; s < count; ++s) {
      const double of_s = norms[j + s] * norms[j + s];
      energy[s] += of_s;
      for (size_t t = 0; t < count; ++t) {
        products[s * count + t] += of_s * norms[j + t] * norms[j + t];
      }
    }
  }
  std::vector<double> overlap(products.size()), share(count);
  for (size_t s = 0; s < count; ++s) {
    if (squares[s] > 0) share[s] = energy[s] / squares[s];
    for (size_t t = 0; t < count; ++t) {
      const double lengths =
          std::sqrt(products[s * count + s]) * std::sqrt(products[t * count + t]);
      if (lengths > 0) overlap[s * count + t] = products[s * count + t] / lengths;
    }
  }
  context.Report(absl::StrCat(part, "in_directions"), std::move(share));
  context.Report(absl::StrCat(part, "overlap"), std::move(overlap));
}

absl::StatusOr<double> KeptSquare(kernels::Backend& backend, const JointBlocks& blocks, int t,
                                  const kernels::ElectedMean& op) {
  ASSIGN_OR_RETURN(const OwnMatrix kept, OwnMatrix::Make(backend, blocks.rank, blocks.length));
  const int64_t size = blocks.rank * blocks.length;
  RETURN_IF_ERROR(backend.Map(op, {blocks.View(t)}, {kept.view.data, DType::kF64, size}, 0));
  ASSIGN_OR_RETURN(
      const std::vector<double> squares,
      backend.Reduce(kernels::Gram{.count = 1}, {{kept.view.data, DType::kF64, size}}, 0));
  return absl::c_accumulate(squares, 0.0);
}

absl::StatusOr<double> SquaredNorm(kernels::Backend& backend, const TaskVector& delta) {
  const int64_t size = delta.shape.rows * delta.shape.columns;
  if (!delta.product()) {
    ASSIGN_OR_RETURN(const std::vector<double> squares,
                     backend.Reduce(kernels::Gram{.count = 1, .from_base = true},
                                    {{delta.dense.minus, delta.dense.dtype, size},
                                     {delta.dense.data, delta.dense.dtype, size}},
                                    0));
    return absl::c_accumulate(squares, 0.0);
  }
  // The trace of (L^T L) (R R^T).
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const int64_t rank = delta.left.columns;
  ASSIGN_OR_RETURN(const OwnMatrix left, OwnMatrix::Make(backend, rank, rank));
  ASSIGN_OR_RETURN(const OwnMatrix right, OwnMatrix::Make(backend, rank, rank));
  RETURN_IF_ERROR(algebra->Gram(Transpose::kYes, delta.left, 0, left.view));
  RETURN_IF_ERROR(algebra->Gram(Transpose::kNo, delta.right, 0, right.view));
  ASSIGN_OR_RETURN(const std::vector<double> products,
                   backend.Reduce(kernels::Gram{.count = 2},
                                  {{left.view.data, DType::kF64, rank * rank},
                                   {right.view.data, DType::kF64, rank * rank}},
                                  0));
  // Of each run of elements the pairs (0, 0), (1, 0) and (1, 1).
  double trace = 0;
  for (size_t i = 1; i < products.size(); i += 3) trace += products[i];
  return trace;
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
  ASSIGN_OR_RETURN(const OwnMatrix block, OwnMatrix::Make(backend, step, shape_.columns));
  std::vector<double> downloaded(backend.host_memory() ? 0 : step * shape_.columns);
  double* const values = backend.host_memory() ? block.view.data : downloaded.data();
  std::vector<double> of_base(std::min(kRun, step * shape_.columns));
  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = std::min(step, end - first), size = rows * shape_.columns;
    RETURN_IF_ERROR(rows_of(first, {block.view.data, rows, shape_.columns, shape_.columns}));
    if (!backend.host_memory()) {
      RETURN_IF_ERROR(backend.Download(block.view.data, values, size * kWidth));
    }
    RETURN_IF_ERROR(backend.Synchronize());
    for (int64_t run = 0; run < size; run += kRun) {
      const int64_t count = std::min(kRun, size - run), at = first * shape_.columns + run;
      kernels::Convert(
          {static_cast<const char*>(base->data()) + at * ByteWidth(dtype_), dtype_, count},
          {of_base.data(), DType::kF64, count});
      for (int64_t i = 0; i < count; ++i) values[run + i] += of_base[i];
      kernels::Convert(
          {values + run, DType::kF64, count},
          {static_cast<char*>(result.data) + at * ByteWidth(result.dtype), result.dtype, count});
    }
  }
  return absl::OkStatus();
}

int64_t TaskVectors::EmitBytes(MatrixShape shape) {
  return 2 * std::min(kRowsAtATime, shape.rows) * shape.columns * kWidth + kRun * kWidth;
}

absl::StatusOr<Expansion> Expansion::Make(kernels::Backend& backend, const JointBasis& basis,
                                          const Matrix& block, Stack stack, Deltas deltas) {
  Expansion expansion(basis, block, stack, deltas);
  if (!basis.of_other_side()) return expansion;
  // The shared side's vectors are D_t times the other's, over s_j: with the merged block they are
  // multiplied first, which leaves matrices as small as a block.
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  std::vector<double> inverse;
  for (int64_t j = 0; j < basis.rank(); ++j) inverse.push_back(1 / basis.spectrum[j]);
  RETURN_IF_ERROR(ScaleRows(backend, block, std::move(inverse)));
  for (size_t t = 0; t < deltas.size(); ++t) {
    const Matrix others =
        Columns(basis.others, static_cast<int64_t>(t) * block.columns, block.columns);
    ASSIGN_OR_RETURN(OwnMatrix factor, OwnMatrix::Make(backend, block.columns, block.columns));
    const bool horizontal = stack == Stack::kHorizontal;
    RETURN_IF_ERROR(algebra->Gemm(Transpose::kYes, horizontal ? others : block, Transpose::kNo,
                                  horizontal ? block : others, 1, 0, factor.view));
    expansion.factors_.push_back(std::move(factor));
  }
  return expansion;
}

absl::Status Expansion::Rows(kernels::LinearAlgebra& algebra, int64_t first, Matrix out) const {
  const bool horizontal = stack_ == Stack::kHorizontal;
  if (factors_.empty()) {
    return algebra.Gemm(Transpose::kYes,
                        Columns(horizontal ? basis_.vectors : block_, first, out.rows),
                        Transpose::kNo, horizontal ? block_ : basis_.vectors, 1, 0, out);
  }
  for (size_t t = 0; t < factors_.size(); ++t) {
    const Matrix& factor = factors_[t].view;
    const ConstMatrix& delta = deltas_[t].dense;
    const ConstMatrix left =
        horizontal ? RowsOf(delta, first, out.rows) : RowsOf(factor, first, out.rows);
    RETURN_IF_ERROR(algebra.Gemm(Transpose::kNo, left, Transpose::kNo,
                                 horizontal ? ConstMatrix(factor) : delta, 1, t == 0 ? 0 : 1, out));
  }
  return absl::OkStatus();
}

}  // namespace pewter::methods
