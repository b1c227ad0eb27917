#include "merge/plan/row_approximator.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numbers>
#include <numeric>
#include <thread>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "base/status.h"
#include "kernels/backends.h"
#include "kernels/linear_algebra.h"

namespace pewter {
namespace {

using kernels::ConstMatrix;
using kernels::Matrix;
using kernels::Transpose;
using Method = TokenApproximation::Method;
using Weights = TokenApproximation::Weights;
using Subwords = TokenApproximation::Subwords;

// Rows that are made at a time: fewer where each needs a large system of equations.
constexpr int64_t kMostRows = 256, kLeastRows = 8;
constexpr int64_t kEquations = int64_t{1} << 21;  // coefficients of a batch
// Rows that are multiplied at a time.
constexpr int64_t kBlockRows = 2048;
// Of a row's own norm: what is less is the rounding of what went before.
constexpr double kNegligible = 1e-6;
constexpr double kLeastDistance = 1e-6;
constexpr double kLeastNorm = 1e-8;
// Values of matrices that came from float32 are not known any better.
constexpr double kFloatEpsilon = std::numeric_limits<float>::epsilon();

// The order of additions is part of the result: eight sums, however wide the processor is.
double Dot(const double* a, const double* b, int64_t size) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  for (; i < size; ++i) lanes[0] += a[i] * b[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

void AddTo(double* sum, const double* row, double weight, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += weight * row[i];
}

// fn(i) for each i below `count`, on some threads; the first error in order.
absl::Status ForEach(int threads, int64_t count, absl::FunctionRef<absl::Status(int64_t)> fn) {
  std::vector<absl::Status> statuses(count);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) statuses[i] = fn(i);
  };
  {
    std::vector<std::jthread> workers;
    for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) workers.emplace_back(work);
    work();
  }
  for (const absl::Status& status : statuses) RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

int64_t Width(const TensorSource& source) { return source.shape()[1]; }

// Calls fn(place in `rows`, how many) for rows that follow one another, a block of them at most.
absl::Status ForRuns(absl::Span<const int32_t> rows,
                     absl::FunctionRef<absl::Status(size_t first, size_t count)> fn) {
  for (size_t i = 0; i < rows.size();) {
    size_t run = 1;
    while (run < kBlockRows && i + run < rows.size() &&
           rows[i + run] == rows[i] + static_cast<int32_t>(run)) {
      ++run;
    }
    RETURN_IF_ERROR(fn(i, run));
    i += run;
  }
  return absl::OkStatus();
}

// The listed rows one after the other, in the source's dtype.
absl::Status ReadRows(const TensorSource& source, absl::Span<const int32_t> rows, std::byte* out,
                      ReadObserver* observer) {
  const int64_t width = Width(source), bytes = width * ByteWidth(source.dtype());
  return ForRuns(rows, [&](size_t first, size_t count) -> absl::Status {
    const auto elements = static_cast<int64_t>(count) * width;
    std::byte* const to = out + static_cast<int64_t>(first) * bytes;
    RETURN_IF_ERROR(source.Read(rows[first] * width, elements, {to, count * bytes}, observer));
    int64_t at = 0;
    if (kernels::FindNonFinite({to, source.dtype(), elements}, &at)) {
      return absl::FailedPreconditionError(absl::StrCat(
          source.name(), ": element ", rows[first] * width + at,
          " is NaN or infinite, so that no rows can be made from it; mend the checkpoint"));
    }
    return absl::OkStatus();
  });
}

absl::Status ReadRows(const TensorSource& source, absl::Span<const int32_t> rows, double* out,
                      ReadObserver* observer) {
  const int64_t width = Width(source);
  std::vector<std::byte> bytes;
  return ForRuns(rows, [&](size_t first, size_t count) -> absl::Status {
    const auto elements = static_cast<int64_t>(count) * width;
    bytes.resize(elements * ByteWidth(source.dtype()));
    RETURN_IF_ERROR(ReadRows(source, rows.subspan(first, count), bytes.data(), observer));
    kernels::Convert({bytes.data(), source.dtype(), elements},
                     {out + static_cast<int64_t>(first) * width, DType::kF64, elements});
    return absl::OkStatus();
  });
}

// fn(rows of a block, their values [block, width]) in order.
absl::Status ForBlocks(
    const TensorSource& source, absl::Span<const int32_t> rows, ReadObserver* observer,
    absl::FunctionRef<absl::Status(absl::Span<const int32_t> rows, double* values)> fn) {
  std::vector<double> values(std::min<int64_t>(kBlockRows, rows.size()) * Width(source));
  for (size_t first = 0; first < rows.size(); first += kBlockRows) {
    const absl::Span<const int32_t> block = rows.subspan(first, kBlockRows);
    RETURN_IF_ERROR(ReadRows(source, block, values.data(), observer));
    RETURN_IF_ERROR(fn(block, values.data()));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> MeanRow(const TensorSource& source,
                                            absl::Span<const int32_t> rows,
                                            ReadObserver* observer) {
  const int64_t width = Width(source);
  std::vector<double> mean(width, 0.0);
  RETURN_IF_ERROR(
      ForBlocks(source, rows, observer, [&](absl::Span<const int32_t> block, double* v) {
        for (size_t i = 0; i < block.size(); ++i) AddTo(mean.data(), v + i * width, 1, width);
        return absl::OkStatus();
      }));
  for (double& value : mean) value /= static_cast<double>(std::max<size_t>(rows.size(), 1));
  return mean;
}

// Standard normal draws by Box and Muller's transform, of two words for each element.
void Draw(PhiloxKey key, int64_t row, int64_t width, double* out) {
  for (int64_t i = 0; i < width; ++i) {
    uint32_t words[4];
    PhiloxBlock(key, static_cast<uint64_t>(row * width + i), 0, words);
    const double radius = std::sqrt(-2 * std::log((words[0] + 0.5) / 4294967296.0));
    out[i] = radius * std::cos(2 * std::numbers::pi * (words[1] / 4294967296.0));
  }
}

// A matrix in the memory of a backend.
struct Held {
  std::unique_ptr<kernels::Buffer> memory;
  Matrix matrix;
};

// A backend's linear algebra on matrices that come from the host and go back to it.
class Algebra {
 public:
  static absl::StatusOr<std::unique_ptr<Algebra>> Open(const std::string& device, int threads) {
    ASSIGN_OR_RETURN(const kernels::Device resolved, kernels::ResolveDevice(device));
    std::unique_ptr<Algebra> algebra(new Algebra);
    ASSIGN_OR_RETURN(algebra->backend_, kernels::OpenBackend(resolved, threads));
    ASSIGN_OR_RETURN(algebra->algebra_, algebra->backend_->linear_algebra());
    return algebra;
  }

  kernels::Backend& backend() { return *backend_; }
  kernels::LinearAlgebra* operator->() { return algebra_; }

  absl::StatusOr<Held> New(int64_t rows, int64_t columns) {
    Held held;
    ASSIGN_OR_RETURN(held.memory, backend_->Allocate(Bytes(rows, columns)));
    held.matrix = {static_cast<double*>(held.memory->data()), rows, columns, columns};
    return held;
  }
  absl::StatusOr<Held> Put(const double* host, int64_t rows, int64_t columns) {
    ASSIGN_OR_RETURN(Held held, New(rows, columns));
    RETURN_IF_ERROR(Copy(host, held.matrix));
    return held;
  }
  absl::Status Copy(const double* host, const Matrix& to) {
    RETURN_IF_ERROR(backend_->Upload(host, to.data, Bytes(to.rows, to.columns)));
    return backend_->Synchronize();
  }
  absl::StatusOr<std::vector<double>> Get(const Matrix& from) {
    std::vector<double> host(from.rows * from.columns);
    RETURN_IF_ERROR(Get(from, host.data()));
    return host;
  }
  absl::Status Get(const Matrix& from, double* host) {
    RETURN_IF_ERROR(backend_->Download(from.data, host, Bytes(from.rows, from.columns)));
    return backend_->Synchronize();
  }
  // a b, or with one of them transposed.
  absl::StatusOr<Held> Product(Transpose transpose_a, const Matrix& a, Transpose transpose_b,
                               const Matrix& b) {
    ASSIGN_OR_RETURN(Held c, New(transpose_a == Transpose::kYes ? a.columns : a.rows,
                                 transpose_b == Transpose::kYes ? b.rows : b.columns));
    RETURN_IF_ERROR(algebra_->Gemm(transpose_a, a, transpose_b, b, 1, 0, c.matrix));
    return c;
  }
  // Rows are eigenvectors afterwards; values largest first.
  absl::StatusOr<std::vector<double>> Eigen(const Matrix& a) {
    std::vector<double> values;
    const kernels::LinearAlgebra::EigenProblem problem[] = {{.a = a, .values = &values}};
    RETURN_IF_ERROR(algebra_->SymmetricEigen(problem));
    return values;
  }

 private:
  static int64_t Bytes(int64_t rows, int64_t columns) {
    return std::max<int64_t>(1, rows * columns) * static_cast<int64_t>(sizeof(double));
  }

  std::unique_ptr<kernels::Backend> backend_;
  kernels::LinearAlgebra* algebra_ = nullptr;  // the backend's
};

// Some rows of a tensor in their stored dtype, on the host and where the backend computes, less
// `center` where that is not empty.
class Points {
 public:
  static absl::StatusOr<std::unique_ptr<Points>> Load(Algebra& algebra, const TensorSource& source,
                                                      absl::Span<const int32_t> rows,
                                                      ReadObserver* observer) {
    std::unique_ptr<Points> points(new Points);
    points->dtype_ = source.dtype();
    points->rows_ = static_cast<int64_t>(rows.size());
    points->width_ = Width(source);
    points->host_.resize(points->rows_ * points->width_ * ByteWidth(points->dtype_));
    RETURN_IF_ERROR(ReadRows(source, rows, points->host_.data(), observer));
    if (algebra.backend().host_memory()) return points;
    const auto bytes = static_cast<int64_t>(points->host_.size());
    ASSIGN_OR_RETURN(points->device_, algebra.backend().Allocate(bytes));
    RETURN_IF_ERROR(algebra.backend().Upload(points->host_.data(), points->device_->data(), bytes));
    RETURN_IF_ERROR(algebra.backend().Synchronize());
    return points;
  }

  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  const std::vector<double>& center() const { return center_; }
  void SetCenter(std::vector<double> center) { center_ = std::move(center); }

  // Rows where the backend computes, without the center.
  ConstMatrix Block(int64_t first, int64_t count) const {
    const void* const data = device_ != nullptr ? device_->data() : host_.data();
    return {.data = static_cast<const std::byte*>(data) + first * width_ * ByteWidth(dtype_),
            .dtype = dtype_,
            .rows = count,
            .columns = width_,
            .stride = width_};
  }
  void Row(int64_t row, double* out) const {
    kernels::Convert({host_.data() + row * width_ * ByteWidth(dtype_), dtype_, width_},
                     {out, DType::kF64, width_});
    if (!center_.empty()) AddTo(out, center_.data(), -1, width_);
  }

 private:
  Points() = default;

  DType dtype_ = DType::kF32;
  int64_t rows_ = 0, width_ = 0;
  std::vector<std::byte> host_;
  std::unique_ptr<kernels::Buffer> device_;  // null: the backend computes in host memory
  std::vector<double> center_;
};

// An index into points and its weight.
struct Term {
  int64_t point = 0;
  double weight = 0;
};
using Terms = std::vector<Term>;

// fn(first point, products [targets, points of the block]) for all blocks of points.
absl::Status ForProducts(
    Algebra& algebra, const Points& points, absl::Span<const double> targets,
    absl::FunctionRef<absl::Status(int64_t first, int64_t count, const double* products)> fn) {
  const int64_t width = points.width(), count = static_cast<int64_t>(targets.size()) / width;
  ASSIGN_OR_RETURN(const Held placed, algebra.Put(targets.data(), count, width));
  for (int64_t first = 0; first < points.rows(); first += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, points.rows() - first);
    ASSIGN_OR_RETURN(const Held products, algebra.New(count, rows));
    RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, placed.matrix, Transpose::kYes,
                                  points.Block(first, rows), 1, 0, products.matrix));
    ASSIGN_OR_RETURN(const std::vector<double> host, algebra.Get(products.matrix));
    RETURN_IF_ERROR(fn(first, rows, host.data()));
  }
  return absl::OkStatus();
}

// For each target the point, not taken yet, whose product with it is the greatest in magnitude; the
// first of equal ones, -1 when all are taken.
absl::StatusOr<std::vector<int64_t>> Greatest(Algebra& algebra, const Points& points, int threads,
                                              absl::Span<const double> targets,
                                              absl::Span<const std::vector<int64_t>> taken) {
  const int64_t width = points.width();
  std::vector<int64_t> best(taken.size(), -1);
  std::vector<double> greatest(taken.size(), -1), of_center(taken.size(), 0);
  if (!points.center().empty()) {
    for (size_t i = 0; i < taken.size(); ++i) {
      of_center[i] = Dot(targets.data() + i * width, points.center().data(), width);
    }
  }
  RETURN_IF_ERROR(ForProducts(
      algebra, points, targets, [&](int64_t first, int64_t count, const double* products) {
        return ForEach(threads, static_cast<int64_t>(taken.size()), [&](int64_t target) {
          const double* const own = products + target * count;
          for (int64_t i = 0; i < count; ++i) {
            const double product = std::abs(own[i] - of_center[target]);
            if (!(product > greatest[target])) continue;
            const auto& gone = taken[target];
            if (std::find(gone.begin(), gone.end(), first + i) != gone.end()) continue;
            greatest[target] = product;
            best[target] = first + i;
          }
          return absl::OkStatus();
        });
      }));
  return best;
}

// Solves symmetric systems that may be singular, of n equations each: the shortest solution that
// fits best. Eigenvalues below `least` of the greatest magnitude are zeros.
absl::Status SolveSymmetric(Algebra& algebra, int64_t n, double least,
                            absl::Span<const double> matrices, absl::Span<double> sides) {
  const int64_t count = static_cast<int64_t>(sides.size()) / std::max<int64_t>(n, 1);
  if (count == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Held placed, algebra.Put(matrices.data(), count * n, n));
  std::vector<std::vector<double>> values(count);
  std::vector<kernels::LinearAlgebra::EigenProblem> problems;
  for (int64_t i = 0; i < count; ++i) {
    problems.push_back({.a = {placed.matrix.data + i * n * n, n, n, n}, .values = &values[i]});
  }
  RETURN_IF_ERROR(algebra->SymmetricEigen(problems));
  ASSIGN_OR_RETURN(const std::vector<double> vectors, algebra.Get(placed.matrix));
  for (int64_t i = 0; i < count; ++i) {
    double* const side = sides.data() + i * n;
    const double bound = least * std::max(std::abs(values[i].front()), std::abs(values[i].back()));
    std::vector<double> solution(n, 0.0);
    for (int64_t j = 0; j < n; ++j) {
      if (!(std::abs(values[i][j]) > bound)) continue;
      const double* const vector = vectors.data() + (i * n + j) * n;
      AddTo(solution.data(), vector, Dot(vector, side, n) / values[i][j], n);
    }
    std::copy(solution.begin(), solution.end(), side);
  }
  return absl::OkStatus();
}

// Orthogonal matching pursuit of one target. The Gram matrix of the chosen points is kept as a
// Cholesky factor that grows by a row.
class Pursuit {
 public:
  Pursuit(const Points& points, absl::Span<const double> target, double* rest)
      : points_(points), target_(target), rest_(rest) {
    std::copy(target.begin(), target.end(), rest);
    norm_ = left_ = Dot(target.data(), target.data(), points.width());
  }

  // Nothing but rounding is left.
  bool done() const { return !(left_ > kNegligible * kNegligible * norm_); }

  void Add(int64_t point) {
    const int64_t width = points_.width();
    std::vector<double> added(width), other(width), row;
    points_.Row(point, added.data());
    const double norm = Dot(added.data(), added.data(), width);
    double rest = norm;
    for (size_t i = 0; i < chosen_.size(); ++i) {
      points_.Row(chosen_[i], other.data());
      double value = Dot(added.data(), other.data(), width);
      for (size_t j = 0; j < i; ++j) value -= factor_[i][j] * row[j];
      row.push_back(value / factor_[i][i]);
      rest -= row[i] * row[i];
    }
    // A combination of those that are chosen already.
    if (!(rest > kNegligible * kNegligible * norm)) return;
    row.push_back(std::sqrt(rest));
    double value = Dot(target_.data(), added.data(), width);
    for (size_t i = 0; i < chosen_.size(); ++i) value -= row[i] * forward_[i];
    forward_.push_back(value / row.back());
    chosen_.push_back(point);
    factor_.push_back(std::move(row));
    weights_ = forward_;
    for (size_t i = chosen_.size(); i-- > 0;) {
      for (size_t j = i + 1; j < chosen_.size(); ++j) weights_[i] -= factor_[j][i] * weights_[j];
      weights_[i] /= factor_[i][i];
    }
    std::copy(target_.begin(), target_.end(), rest_);
    for (size_t i = 0; i < chosen_.size(); ++i) {
      points_.Row(chosen_[i], other.data());
      AddTo(rest_, other.data(), -weights_[i], width);
    }
    left_ = Dot(rest_, rest_, width);
  }

  Terms terms() const {
    Terms terms;
    for (size_t i = 0; i < chosen_.size(); ++i) terms.push_back({chosen_[i], weights_[i]});
    return terms;
  }

 private:
  const Points& points_;
  const absl::Span<const double> target_;
  double* const rest_;          // what is left of the target
  double norm_ = 0, left_ = 0;  // squared
  std::vector<int64_t> chosen_;
  std::vector<std::vector<double>> factor_;  // lower triangle, by rows
  std::vector<double> forward_;              // factor^-1 (products with the target)
  std::vector<double> weights_;
};

absl::StatusOr<std::vector<Terms>> Pursue(Algebra& algebra, const Points& points, int threads,
                                          int64_t k, absl::Span<const double> targets) {
  const int64_t width = points.width(), count = static_cast<int64_t>(targets.size()) / width;
  std::vector<double> rests(targets.size());
  std::vector<Pursuit> pursuits;
  for (int64_t i = 0; i < count; ++i) {
    pursuits.emplace_back(points, targets.subspan(i * width, width), rests.data() + i * width);
  }
  std::vector<std::vector<int64_t>> taken(count);
  for (int64_t step = 0; step < k; ++step) {
    if (std::all_of(pursuits.begin(), pursuits.end(), [](const auto& p) { return p.done(); })) {
      break;
    }
    ASSIGN_OR_RETURN(const std::vector<int64_t> best,
                     Greatest(algebra, points, threads, rests, taken));
    RETURN_IF_ERROR(ForEach(threads, count, [&](int64_t i) {
      if (best[i] < 0 || pursuits[i].done()) return absl::OkStatus();
      taken[i].push_back(best[i]);
      pursuits[i].Add(best[i]);
      return absl::OkStatus();
    }));
  }
  std::vector<Terms> terms;
  for (const Pursuit& pursuit : pursuits) terms.push_back(pursuit.terms());
  return terms;
}

// --- rotary positions ----------------------------------------------------------------------------

// Angles by position of the halves of a head.
std::vector<double> Frequencies(const RotaryHeads& rotary, int64_t width) {
  const int64_t size = width / rotary.heads;
  std::vector<double> frequencies(size / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] =
        std::pow(rotary.base, -2.0 * static_cast<double>(i) / static_cast<double>(size));
  }
  return frequencies;
}

void Turn(absl::Span<const double> frequencies, double position, int64_t width, double* row) {
  const auto half = static_cast<int64_t>(frequencies.size());
  for (int64_t i = 0; i < half; ++i) {
    const double sine = std::sin(position * frequencies[i]);
    const double cosine = std::cos(position * frequencies[i]);
    for (int64_t head = 0; head < width; head += 2 * half) {
      double &a = row[head + i], &b = row[head + half + i];
      const double turned = a * cosine - b * sine;
      b = b * cosine + a * sine;
      a = turned;
    }
  }
}

// The position that turns `row` towards `target` (`sign` of it): the angles of the halves,
// projected on the frequencies.
double PositionTowards(absl::Span<const double> frequencies, const double* row,
                       const double* target, double sign, int64_t width) {
  const auto half = static_cast<int64_t>(frequencies.size());
  double sum = 0, norm = 0;
  for (int64_t head = 0; head < width; head += 2 * half) {
    for (int64_t i = 0; i < half; ++i) {
      const double a = row[head + i], b = row[head + half + i];
      const double c = sign * target[head + i], d = sign * target[head + half + i];
      sum += std::atan2(a * d - b * c, a * c + b * d) * frequencies[i];
      norm += frequencies[i] * frequencies[i];
    }
  }
  return sum / norm;
}

// --- the approximators ---------------------------------------------------------------------------

class Approximator final : public RowApproximator {
 public:
  explicit Approximator(RowProblem problem)
      : p_(std::move(problem)),
        width_(Width(*p_.own)),
        donor_width_(Width(*p_.donor)),
        row_bytes_(width_ * ByteWidth(p_.own->dtype())),
        batch_(std::clamp(kEquations / (p_.how.k * p_.how.k), kLeastRows, kMostRows)),
        made_bytes_(static_cast<int64_t>(p_.wanted.size()) * row_bytes_) {
    batches_ = (static_cast<int64_t>(p_.wanted.size()) + batch_ - 1) / batch_;
    done_.assign(batches_, false);
  }

  absl::Status Check() const {
    const auto refuse = [&](const auto&... parts) {
      return absl::FailedPreconditionError(absl::StrCat(p_.how.at.ToString(), ": ", parts...));
    };
    const auto tokens = static_cast<int64_t>(p_.shared.size());
    if (UsesPoints() && tokens < p_.how.k) {
      return refuse("`k` is ", p_.how.k, " and ", p_.own->name(), " and ", p_.donor->name(),
                    " share ", tokens, " tokens only");
    }
    const int64_t components = std::min(width_, donor_width_);
    if (p_.how.method == Method::kLandmarkPca && tokens < components) {
      return refuse("landmark_pca needs as many shared tokens as rows are wide, ", components,
                    ", and ", p_.own->name(), " and ", p_.donor->name(), " share ", tokens);
    }
    if (LargestMatrix() > kernels::kMaxExtent) {
      return refuse("rows of ", LargestMatrix(), " elements are too wide for this method");
    }
    if (p_.how.method != Method::kMatchingPursuitRope) return absl::OkStatus();
    for (const auto& [heads, source] :
         {std::pair{p_.own_heads, p_.own}, std::pair{p_.donor_heads, p_.donor}}) {
      if (heads.heads < 1 || Width(*source) % (2 * heads.heads) != 0) {
        return refuse("mp_rope needs heads of an even size, and ", source->name(), " has rows of ",
                      Width(*source), " elements and ", heads.heads,
                      " heads (config.json's num_attention_heads)");
      }
      if (!(heads.base > 0) || !std::isfinite(heads.base)) {
        return refuse("mp_rope needs a rope_theta above 0 in the config.json of ", source->name());
      }
    }
    return absl::OkStatus();
  }

  absl::Status Row(int64_t index, absl::Span<std::byte> out,
                   ReadObserver* observer) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    RETURN_IF_ERROR(MakeBatch(index / batch_, observer));
    std::memcpy(out.data(), made_.data() + index * row_bytes_, row_bytes_);
    return absl::OkStatus();
  }

  int64_t resident_bytes() const override {
    constexpr int64_t kDouble = sizeof(double);
    const auto tokens = static_cast<int64_t>(p_.shared.size());
    int64_t bytes = made_bytes_ + tokens * static_cast<int64_t>(sizeof(p_.shared[0])) +
                    static_cast<int64_t>(p_.wanted.size()) * (sizeof(int32_t) + 1);
    for (const auto& pieces : p_.pieces) bytes += static_cast<int64_t>(pieces.size()) * 4 + 24;
    const int64_t widest = std::max(width_, donor_width_);
    if (UsesPoints()) {
      const int64_t points =
          tokens * (p_.how.method == Method::kSparseTokenBasis
                        ? BasisSource().shape()[1] * ByteWidth(BasisSource().dtype())
                        : donor_width_ * ByteWidth(p_.donor->dtype()));
      const int64_t systems = batch_ * p_.how.k * p_.how.k * 2;
      // Targets, what is left of them and their products, here and at the backend; a thread's own
      // chosen rows.
      bytes += points + kDouble * (systems + batch_ * (4 * donor_width_ + 2 * kBlockRows) +
                                   p_.threads * p_.how.k * donor_width_);
    }
    // Squares for covariances, bases and maps, LAPACK's workspace among them, and blocks of rows.
    const int64_t square = LargestMatrix() * LargestMatrix();
    if (square > 0) bytes += kDouble * (10 * square + 4 * kBlockRows * widest);
    bytes += kDouble * (2 * batch_ * (width_ + donor_width_) + kBlockRows * widest);
    return bytes + p_.donor->resident_bytes();
  }

 private:
  bool UsesPoints() const {
    return p_.how.method == Method::kOmp || p_.how.method == Method::kCommonInterpolation ||
           p_.how.method == Method::kMatchingPursuitRope ||
           p_.how.method == Method::kSparseTokenBasis;
  }

  // Side of the largest matrix that is factored; 0: none is.
  int64_t LargestMatrix() const {
    switch (p_.how.method) {
      case Method::kJohnHewitt:
        return width_;
      case Method::kLandmarkPca:
      case Method::kSparseTokenBasis:
        return std::max(width_, donor_width_);
      default:
        return 0;
    }
  }

  // Of the narrower model: its principal components are what a basis stands for.
  const TensorSource& BasisSource() const { return donor_width_ < width_ ? *p_.donor : *p_.own; }

  static std::vector<int32_t> AllRows(const TensorSource& source) {
    std::vector<int32_t> rows(source.shape()[0]);
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
  }
  std::vector<int32_t> SharedRows(bool of_donor) const {
    std::vector<int32_t> rows;
    for (const auto& [donor, own] : p_.shared) rows.push_back(of_donor ? donor : own);
    return rows;
  }

  PhiloxKey Key(absl::string_view what) const {
    return MakePhiloxKey(p_.seed, absl::StrCat(p_.name, "#", what));
  }

  absl::Status MakeBatch(int64_t batch, ReadObserver* observer) const {
    if (done_[batch]) return absl::OkStatus();
    if (made_.empty()) {
      RETURN_IF_ERROR(Prepare(observer));
      made_.resize(made_bytes_);
    }
    const int64_t first = batch * batch_;
    const int64_t count = std::min(batch_, static_cast<int64_t>(p_.wanted.size()) - first);
    std::vector<double> rows(count * width_, 0.0);
    RETURN_IF_ERROR(Fill(first, count, rows.data(), observer));
    for (int64_t i = 0; i < count; ++i) {
      double* const row = rows.data() + i * width_;
      if (p_.how.noise > 0) {
        std::vector<double> noise(width_);
        Draw(Key("noise"), p_.wanted[first + i], width_, noise.data());
        AddTo(row, noise.data(), p_.how.noise, width_);
      }
      for (int64_t j = 0; j < width_; ++j) row[j] *= p_.how.scale;
    }
    kernels::Convert({rows.data(), DType::kF64, count * width_},
                     {made_.data() + first * row_bytes_, p_.own->dtype(), count * width_});
    done_[batch] = true;
    if (++made_batches_ == batches_) {
      points_.reset();
      map_ = {};
      algebra_.reset();
    }
    return absl::OkStatus();
  }

  // What all batches need.
  absl::Status Prepare(ReadObserver* observer) const {
    ASSIGN_OR_RETURN(algebra_, Algebra::Open(p_.device, p_.threads));
    switch (p_.how.method) {
      case Method::kOmp:
      case Method::kCommonInterpolation:
      case Method::kMatchingPursuitRope: {
        ASSIGN_OR_RETURN(points_, Points::Load(*algebra_, *p_.donor, SharedRows(true), observer));
        if (p_.how.method != Method::kCommonInterpolation) break;
        norms_.resize(points_->rows());
        std::vector<double> row(donor_width_);
        for (int64_t i = 0; i < points_->rows(); ++i) {
          points_->Row(i, row.data());
          norms_[i] = Dot(row.data(), row.data(), donor_width_);
        }
        break;
      }
      case Method::kMean: {
        ASSIGN_OR_RETURN(own_mean_, MeanRow(*p_.own, AllRows(*p_.own), nullptr));
        break;
      }
      case Method::kJohnHewitt:
        return PrepareDraws();
      case Method::kLandmarkPca:
        return PreparePrincipalComponents(observer);
      case Method::kSparseTokenBasis:
        return PrepareBases(observer);
      case Method::kSubword:
      case Method::kZero:
      case Method::kRandn:
        break;
    }
    return absl::OkStatus();
  }

  // Rows that are zeros on entry.
  absl::Status Fill(int64_t first, int64_t count, double* rows, ReadObserver* observer) const {
    switch (p_.how.method) {
      case Method::kZero:
        return absl::OkStatus();
      case Method::kMean:
        for (int64_t i = 0; i < count; ++i) {
          std::copy(own_mean_.begin(), own_mean_.end(), rows + i * width_);
        }
        return absl::OkStatus();
      case Method::kRandn:
        for (int64_t i = 0; i < count; ++i) {
          Draw(Key("transplant"), p_.wanted[first + i], width_, rows + i * width_);
        }
        return absl::OkStatus();
      case Method::kSubword:
        return FromPieces(first, count, rows);
      case Method::kJohnHewitt: {
        std::vector<double> draws(count * width_);
        for (int64_t i = 0; i < count; ++i) {
          Draw(Key("transplant"), p_.wanted[first + i], width_, draws.data() + i * width_);
        }
        return Apply(draws, count, rows);
      }
      default:
        break;
    }
    std::vector<double> targets(count * donor_width_);
    RETURN_IF_ERROR(ReadRows(*p_.donor, absl::MakeConstSpan(p_.wanted).subspan(first, count),
                             targets.data(), observer));
    if (p_.how.method == Method::kMatchingPursuitRope) return PursueTurned(targets, count, rows);
    if (p_.how.method == Method::kLandmarkPca || p_.how.method == Method::kSparseTokenBasis) {
      for (int64_t i = 0; i < count; ++i) {
        AddTo(targets.data() + i * donor_width_, donor_mean_.data(), -1, donor_width_);
      }
      return Apply(targets, count, rows);
    }
    std::vector<Terms> terms;
    if (p_.how.method == Method::kOmp) {
      ASSIGN_OR_RETURN(terms, Pursue(*algebra_, *points_, p_.threads, p_.how.k, targets));
    } else {
      ASSIGN_OR_RETURN(terms, Interpolate(targets, count));
    }
    return ForEach(p_.threads, count, [&](int64_t i) -> absl::Status {
      std::vector<double> own(width_);
      for (const Term& term : terms[i]) {
        RETURN_IF_ERROR(ReadRows(*p_.own, {&p_.shared[term.point].second, 1}, own.data(), nullptr));
        AddTo(rows + i * width_, own.data(), term.weight, width_);
      }
      return absl::OkStatus();
    });
  }

  // rows = inputs map_ + own_mean_
  absl::Status Apply(absl::Span<const double> inputs, int64_t count, double* rows) const {
    ASSIGN_OR_RETURN(const Held placed, algebra_->Put(inputs.data(), count, map_.matrix.rows));
    ASSIGN_OR_RETURN(const Held mapped,
                     algebra_->Product(Transpose::kNo, placed.matrix, Transpose::kNo, map_.matrix));
    RETURN_IF_ERROR(algebra_->Get(mapped.matrix, rows));
    for (int64_t i = 0; i < count; ++i) AddTo(rows + i * width_, own_mean_.data(), 1, width_);
    return absl::OkStatus();
  }

  absl::Status FromPieces(int64_t first, int64_t count, double* rows) const {
    return ForEach(p_.threads, count, [&](int64_t i) -> absl::Status {
      const std::vector<int32_t>& pieces = p_.pieces[first + i];
      const auto n = static_cast<int64_t>(pieces.size());
      std::vector<double> own(width_);
      for (int64_t piece = 0; piece < n; ++piece) {
        double weight = 1;
        switch (p_.how.subwords) {
          case Subwords::kMean:
            weight = 1.0 / static_cast<double>(n);
            break;
          case Subwords::kSum:
            break;
          case Subwords::kWeightedMean: {
            const int64_t rank = p_.head ? piece + 1 : n - piece;
            weight = 2.0 * static_cast<double>(rank) / static_cast<double>(n * (n + 1));
            break;
          }
          case Subwords::kFirstLast:
            weight = piece == (p_.head ? 0 : n - 1) ? 1 : 0;
            break;
        }
        if (weight == 0) continue;
        RETURN_IF_ERROR(ReadRows(*p_.own, {&pieces[piece], 1}, own.data(), nullptr));
        AddTo(rows + i * width_, own.data(), weight, width_);
      }
      return absl::OkStatus();
    });
  }

  // --- common interpolation ----------------------------------------------------------------------

  // Exact, unlike the one that follows from products.
  double Distance(const double* target, const double* point) const {
    if (p_.how.cosine) {
      const double norms =
          std::sqrt(Dot(target, target, donor_width_)) * std::sqrt(Dot(point, point, donor_width_));
      return 1 - Dot(target, point, donor_width_) / std::max(norms, kLeastDistance);
    }
    std::vector<double> difference(point, point + donor_width_);
    AddTo(difference.data(), target, -1, donor_width_);
    return std::sqrt(Dot(difference.data(), difference.data(), donor_width_));
  }

  // The k nearest points of each target, nearest first.
  absl::StatusOr<std::vector<std::vector<int64_t>>> Nearest(absl::Span<const double> targets,
                                                            int64_t count) const {
    using Candidate = std::pair<double, int64_t>;
    std::vector<std::vector<Candidate>> nearest(count);  // heaps, the farthest first
    RETURN_IF_ERROR(ForProducts(
        *algebra_, *points_, targets, [&](int64_t first, int64_t n, const double* products) {
          return ForEach(p_.threads, count, [&](int64_t target) {
            std::vector<Candidate>& heap = nearest[target];
            const double* const own = targets.data() + target * donor_width_;
            const double norm = Dot(own, own, donor_width_);
            for (int64_t i = 0; i < n; ++i) {
              const double product = products[target * n + i];
              const double other = norms_[first + i];
              const double distance =
                  p_.how.cosine ? -product / std::max(std::sqrt(norm * other), kLeastDistance)
                                : norm - 2 * product + other;
              const Candidate candidate(distance, first + i);
              if (static_cast<int64_t>(heap.size()) == p_.how.k) {
                if (!(candidate < heap.front())) continue;
                std::pop_heap(heap.begin(), heap.end());
                heap.pop_back();
              }
              heap.push_back(candidate);
              std::push_heap(heap.begin(), heap.end());
            }
            return absl::OkStatus();
          });
        }));
    std::vector<std::vector<int64_t>> indices(count);
    for (int64_t target = 0; target < count; ++target) {
      std::sort_heap(nearest[target].begin(), nearest[target].end());
      for (const Candidate& candidate : nearest[target]) {
        indices[target].push_back(candidate.second);
      }
    }
    return indices;
  }

  absl::StatusOr<std::vector<Terms>> Interpolate(absl::Span<const double> targets,
                                                 int64_t count) const {
    ASSIGN_OR_RETURN(const auto nearest, Nearest(targets, count));
    const int64_t k = p_.how.k;
    const bool barycentric = p_.how.weights == Weights::kBarycentric;
    const bool fit = p_.how.weights != Weights::kDistance;
    const int64_t n = k + (barycentric ? 1 : 0);  // equations; the last: weights sum to 1
    std::vector<double> systems(fit ? count * n * n : 0, 0.0), weights(count * n, 0.0);
    RETURN_IF_ERROR(ForEach(p_.threads, count, [&](int64_t target) {
      const double* const own = targets.data() + target * donor_width_;
      std::vector<double> points(k * donor_width_);
      for (int64_t i = 0; i < k; ++i) {
        points_->Row(nearest[target][i], points.data() + i * donor_width_);
      }
      double* const weight = weights.data() + target * n;
      if (!fit) {
        double sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          const double distance = Distance(own, points.data() + i * donor_width_);
          weight[i] = p_.how.cosine ? 1 - distance : 1 / std::max(distance, kLeastDistance);
          sum += weight[i];
        }
        for (int64_t i = 0; i < k; ++i) weight[i] /= std::max(sum, kLeastDistance);
        return absl::OkStatus();
      }
      double* const system = systems.data() + target * n * n;
      NormalEquations(points, own, n, system, weight);
      if (barycentric) {
        for (int64_t i = 0; i < k; ++i) system[i * n + k] = system[k * n + i] = 1;
        weight[k] = 1;
      }
      return absl::OkStatus();
    }));
    if (fit) {
      const double epsilon = kFloatEpsilon * static_cast<double>(std::max(k, donor_width_));
      RETURN_IF_ERROR(SolveSymmetric(
          *algebra_, n, barycentric ? kFloatEpsilon * static_cast<double>(n) : epsilon * epsilon,
          systems, absl::MakeSpan(weights)));
    }
    std::vector<Terms> terms(count);
    for (int64_t target = 0; target < count; ++target) {
      for (int64_t i = 0; i < k; ++i) {
        terms[target].push_back({nearest[target][i], weights[target * n + i]});
      }
    }
    return terms;
  }

  // Products of the points with each other and with the target; a row of `system` has `stride`
  // elements.
  void NormalEquations(absl::Span<const double> points, const double* target, int64_t stride,
                       double* system, double* side) const {
    const int64_t count = static_cast<int64_t>(points.size()) / donor_width_;
    for (int64_t i = 0; i < count; ++i) {
      const double* const point = points.data() + i * donor_width_;
      side[i] = Dot(point, target, donor_width_);
      for (int64_t j = 0; j <= i; ++j) {
        system[i * stride + j] = system[j * stride + i] =
            Dot(point, points.data() + j * donor_width_, donor_width_);
      }
    }
  }

  // --- matching pursuit with rotary positions ----------------------------------------------------

  absl::Status PursueTurned(absl::Span<const double> targets, int64_t count, double* rows) const {
    const int64_t k = p_.how.k;
    const std::vector<double> of_donor = Frequencies(p_.donor_heads, donor_width_);
    const std::vector<double> of_own = Frequencies(p_.own_heads, width_);
    std::vector<double> rests(targets.begin(), targets.end());
    std::vector<std::vector<int64_t>> chosen(count);
    std::vector<std::vector<double>> positions(count);
    for (int64_t step = 0; step < k; ++step) {
      ASSIGN_OR_RETURN(const std::vector<int64_t> best,
                       Greatest(*algebra_, *points_, p_.threads, rests, chosen));
      RETURN_IF_ERROR(ForEach(p_.threads, count, [&](int64_t i) {
        double* const rest = rests.data() + i * donor_width_;
        std::vector<double> point(donor_width_);
        points_->Row(best[i], point.data());
        const double towards = PositionTowards(of_donor, point.data(), rest, 1, donor_width_);
        const double away = PositionTowards(of_donor, point.data(), rest, -1, donor_width_);
        const double position = std::abs(towards) < std::abs(away) ? towards : away;
        Turn(of_donor, position, donor_width_, point.data());
        const double norm = Dot(point.data(), point.data(), donor_width_);
        const double weight = Dot(rest, point.data(), donor_width_) / std::max(norm, kLeastNorm);
        AddTo(rest, point.data(), -weight, donor_width_);
        chosen[i].push_back(best[i]);
        positions[i].push_back(position);
        return absl::OkStatus();
      }));
    }
    std::vector<double> systems(count * k * k), weights(count * k);
    RETURN_IF_ERROR(ForEach(p_.threads, count, [&](int64_t i) {
      std::vector<double> points(k * donor_width_);
      for (int64_t j = 0; j < k; ++j) {
        double* const point = points.data() + j * donor_width_;
        points_->Row(chosen[i][j], point);
        Turn(of_donor, positions[i][j], donor_width_, point);
      }
      NormalEquations(points, targets.data() + i * donor_width_, k, systems.data() + i * k * k,
                      weights.data() + i * k);
      return absl::OkStatus();
    }));
    const double epsilon = kFloatEpsilon * static_cast<double>(std::max(k, donor_width_));
    RETURN_IF_ERROR(
        SolveSymmetric(*algebra_, k, epsilon * epsilon, systems, absl::MakeSpan(weights)));
    return ForEach(p_.threads, count, [&](int64_t i) -> absl::Status {
      std::vector<double> own(width_);
      for (int64_t j = 0; j < k; ++j) {
        RETURN_IF_ERROR(
            ReadRows(*p_.own, {&p_.shared[chosen[i][j]].second, 1}, own.data(), nullptr));
        Turn(of_own, positions[i][j], width_, own.data());
        AddTo(rows + i * width_, own.data(), weights[i * k + j], width_);
      }
      return absl::OkStatus();
    });
  }

  // --- affine maps -------------------------------------------------------------------------------

  // Sum of (row - mean)^T (row - mean) over the rows.
  absl::StatusOr<Held> Scatter(const TensorSource& source, absl::Span<const int32_t> rows,
                               const std::vector<double>& mean, ReadObserver* observer) const {
    const int64_t width = Width(source);
    const std::vector<double> zeros(width * width, 0.0);
    ASSIGN_OR_RETURN(Held scatter, algebra_->Put(zeros.data(), width, width));
    RETURN_IF_ERROR(
        ForBlocks(source, rows, observer,
                  [&](absl::Span<const int32_t> block, double* values) -> absl::Status {
                    for (size_t i = 0; i < block.size(); ++i) {
                      AddTo(values + i * width, mean.data(), -1, width);
                    }
                    ASSIGN_OR_RETURN(const Held placed, algebra_->Put(values, block.size(), width));
                    return (*algebra_)->Gram(Transpose::kYes, placed.matrix, 1, scatter.matrix);
                  }));
    return scatter;
  }

  // The first rows of a matrix.
  static Matrix First(const Matrix& matrix, int64_t rows) {
    return {matrix.data, rows, matrix.columns, matrix.stride};
  }

  // Rows of a map that turns standard normal draws into draws with the rows' covariance.
  absl::Status PrepareDraws() const {
    const std::vector<int32_t> rows = AllRows(*p_.own);
    ASSIGN_OR_RETURN(own_mean_, MeanRow(*p_.own, rows, nullptr));
    ASSIGN_OR_RETURN(const Held scatter, Scatter(*p_.own, rows, own_mean_, nullptr));
    ASSIGN_OR_RETURN(const std::vector<double> values, algebra_->Eigen(scatter.matrix));
    ASSIGN_OR_RETURN(std::vector<double> map, algebra_->Get(scatter.matrix));
    for (int64_t i = 0; i < width_; ++i) {
      const double deviation = std::sqrt(std::max(values[i], 0.0) /
                                         static_cast<double>(std::max<size_t>(rows.size(), 1)));
      for (int64_t j = 0; j < width_; ++j) map[i * width_ + j] *= deviation;
    }
    ASSIGN_OR_RETURN(map_, algebra_->Put(map.data(), width_, width_));
    return absl::OkStatus();
  }

  // Between the principal components of the shared rows lies the rotation that takes the donor's
  // nearest to the own ones (Procrustes).
  absl::Status PreparePrincipalComponents(ReadObserver* observer) const {
    const std::vector<int32_t> of_donor = SharedRows(true), of_own = SharedRows(false);
    const int64_t count = std::min(width_, donor_width_);
    ASSIGN_OR_RETURN(donor_mean_, MeanRow(*p_.donor, of_donor, observer));
    ASSIGN_OR_RETURN(own_mean_, MeanRow(*p_.own, of_own, nullptr));
    const std::vector<double> zeros(donor_width_ * width_, 0.0);
    ASSIGN_OR_RETURN(const Held between, algebra_->Put(zeros.data(), donor_width_, width_));
    std::vector<double> own(std::min<int64_t>(kBlockRows, of_own.size()) * width_);
    size_t done = 0;
    RETURN_IF_ERROR(ForBlocks(
        *p_.donor, of_donor, nullptr,
        [&](absl::Span<const int32_t> block, double* donor) -> absl::Status {
          RETURN_IF_ERROR(ReadRows(*p_.own, absl::MakeConstSpan(of_own).subspan(done, block.size()),
                                   own.data(), nullptr));
          done += block.size();
          for (size_t i = 0; i < block.size(); ++i) {
            AddTo(donor + i * donor_width_, donor_mean_.data(), -1, donor_width_);
            AddTo(own.data() + i * width_, own_mean_.data(), -1, width_);
          }
          ASSIGN_OR_RETURN(const Held a, algebra_->Put(donor, block.size(), donor_width_));
          ASSIGN_OR_RETURN(const Held b, algebra_->Put(own.data(), block.size(), width_));
          return (*algebra_)->Gemm(Transpose::kYes, a.matrix, Transpose::kNo, b.matrix, 1, 1,
                                   between.matrix);
        }));
    ASSIGN_OR_RETURN(const Held a, Scatter(*p_.donor, of_donor, donor_mean_, nullptr));
    ASSIGN_OR_RETURN(const Held b, Scatter(*p_.own, of_own, own_mean_, nullptr));
    RETURN_IF_ERROR(algebra_->Eigen(a.matrix).status());
    RETURN_IF_ERROR(algebra_->Eigen(b.matrix).status());
    const Matrix donor_axes = First(a.matrix, count), own_axes = First(b.matrix, count);
    ASSIGN_OR_RETURN(const Held half,
                     algebra_->Product(Transpose::kNo, donor_axes, Transpose::kNo, between.matrix));
    ASSIGN_OR_RETURN(const Held projected,
                     algebra_->Product(Transpose::kNo, half.matrix, Transpose::kYes, own_axes));
    ASSIGN_OR_RETURN(const Held u, algebra_->New(count, count));
    ASSIGN_OR_RETURN(const Held vt, algebra_->New(count, count));
    std::vector<double> values;
    const kernels::LinearAlgebra::SvdProblem problem[] = {
        {.a = projected.matrix, .u = u.matrix, .vt = vt.matrix, .values = &values}};
    RETURN_IF_ERROR((*algebra_)->Svd(problem));
    ASSIGN_OR_RETURN(const Held rotation,
                     algebra_->Product(Transpose::kNo, u.matrix, Transpose::kNo, vt.matrix));
    ASSIGN_OR_RETURN(const Held turned, algebra_->Product(Transpose::kYes, donor_axes,
                                                          Transpose::kNo, rotation.matrix));
    ASSIGN_OR_RETURN(map_,
                     algebra_->Product(Transpose::kNo, turned.matrix, Transpose::kNo, own_axes));
    return absl::OkStatus();
  }

  // Sums of shared rows that come near the principal components of the narrower model are its basis
  // and, as the same sums of the other's rows, the other's.
  absl::Status PrepareBases(ReadObserver* observer) const {
    const bool of_donor = &BasisSource() == p_.donor.get();
    const std::vector<int32_t> shared = SharedRows(of_donor);
    const int64_t count = std::min(width_, donor_width_);
    ASSIGN_OR_RETURN(donor_mean_, MeanRow(*p_.donor, AllRows(*p_.donor), observer));
    ASSIGN_OR_RETURN(own_mean_, MeanRow(*p_.own, AllRows(*p_.own), nullptr));
    ASSIGN_OR_RETURN(std::vector<double> center, MeanRow(BasisSource(), shared, nullptr));
    ASSIGN_OR_RETURN(const Held scatter, Scatter(BasisSource(), shared, center, nullptr));
    RETURN_IF_ERROR(algebra_->Eigen(scatter.matrix).status());
    ASSIGN_OR_RETURN(const std::vector<double> axes, algebra_->Get(First(scatter.matrix, count)));
    ASSIGN_OR_RETURN(points_, Points::Load(*algebra_, BasisSource(), shared, nullptr));
    points_->SetCenter(std::move(center));
    std::vector<double> donor_basis(count * donor_width_, 0.0), own_basis(count * width_, 0.0);
    for (int64_t first = 0; first < count; first += batch_) {
      const int64_t some = std::min(batch_, count - first);
      ASSIGN_OR_RETURN(const std::vector<Terms> terms,
                       Pursue(*algebra_, *points_, p_.threads, p_.how.k,
                              absl::MakeConstSpan(axes).subspan(first * count, some * count)));
      RETURN_IF_ERROR(ForEach(p_.threads, some, [&](int64_t i) -> absl::Status {
        std::vector<double> row(std::max(width_, donor_width_));
        for (const Term& term : terms[i]) {
          const auto& [donor, own] = p_.shared[term.point];
          RETURN_IF_ERROR(ReadRows(*p_.donor, {&donor, 1}, row.data(), nullptr));
          AddTo(donor_basis.data() + (first + i) * donor_width_, row.data(), term.weight,
                donor_width_);
          RETURN_IF_ERROR(ReadRows(*p_.own, {&own, 1}, row.data(), nullptr));
          AddTo(own_basis.data() + (first + i) * width_, row.data(), term.weight, width_);
        }
        return absl::OkStatus();
      }));
    }
    points_.reset();
    // The least squares fit in the donor's basis: map = donor^T (donor donor^T)^-1 own.
    ASSIGN_OR_RETURN(const Held donor, algebra_->Put(donor_basis.data(), count, donor_width_));
    ASSIGN_OR_RETURN(const Held own, algebra_->Put(own_basis.data(), count, width_));
    ASSIGN_OR_RETURN(const Held gram, algebra_->New(count, count));
    RETURN_IF_ERROR((*algebra_)->Gram(Transpose::kNo, donor.matrix, 0, gram.matrix));
    ASSIGN_OR_RETURN(const std::vector<double> values, algebra_->Eigen(gram.matrix));
    ASSIGN_OR_RETURN(std::vector<double> vectors, algebra_->Get(gram.matrix));
    const double epsilon = kFloatEpsilon * static_cast<double>(donor_width_);
    for (int64_t i = 0; i < count; ++i) {
      const bool known = values[i] > epsilon * epsilon * values[0];
      for (int64_t j = 0; j < count; ++j) {
        vectors[i * count + j] *= known ? 1 / std::sqrt(values[i]) : 0;
      }
    }
    ASSIGN_OR_RETURN(const Held root, algebra_->Put(vectors.data(), count, count));
    ASSIGN_OR_RETURN(const Held left,
                     algebra_->Product(Transpose::kNo, root.matrix, Transpose::kNo, donor.matrix));
    ASSIGN_OR_RETURN(const Held right,
                     algebra_->Product(Transpose::kNo, root.matrix, Transpose::kNo, own.matrix));
    ASSIGN_OR_RETURN(map_,
                     algebra_->Product(Transpose::kYes, left.matrix, Transpose::kNo, right.matrix));
    return absl::OkStatus();
  }

  const RowProblem p_;
  const int64_t width_, donor_width_, row_bytes_;
  const int64_t batch_;  // rows
  const int64_t made_bytes_;
  int64_t batches_ = 0;
  mutable std::mutex mutex_;  // guards what follows
  mutable std::unique_ptr<Algebra> algebra_;
  mutable std::unique_ptr<Points> points_;
  mutable std::vector<double> norms_;  // squared, of the points
  mutable std::vector<double> donor_mean_, own_mean_;
  mutable Held map_;
  mutable std::vector<std::byte> made_;  // [wanted, width] of the own dtype
  mutable std::vector<bool> done_;       // by batch
  mutable int64_t made_batches_ = 0;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const RowApproximator>> RowApproximator::Make(RowProblem problem) {
  auto approximator = std::make_shared<Approximator>(std::move(problem));
  RETURN_IF_ERROR(approximator->Check());
  return approximator;
}

}  // namespace pewter
