#include "kernels/assignment.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/assignment_loops.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/thread_pool.h"

namespace pewter::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Sums of a few costs and prices stay finite below this.
constexpr double kLargest = std::numeric_limits<double>::max() / 16;

const cpu::AssignmentLoops& Loops() {
#if defined(__x86_64__)
  static const cpu::AssignmentLoops* const loops = [] {
    const cpu::KernelTable* best = cpu::Tables()[0];
    if (best == &cpu::kAvx512Kernels) return &cpu::avx512::kAssignmentLoops;
    if (best == &cpu::kAvx2Kernels) return &cpu::avx2::kAssignmentLoops;
    return &cpu::baseline::kAssignmentLoops;
  }();
  return *loops;
#else
  return cpu::baseline::kAssignmentLoops;
#endif
}

// One problem. Minimises sign * costs; a column's price is its dual value, a row's is implied: the
// least of cost - price over the columns. Every assigned row has its column at that least.
template <class T>
class Solver {
 public:
  Solver(const cpu::AssignmentLoopsOf<T>& loops, const AssignmentProblem& problem)
      : loops_(loops),
        costs_(static_cast<const T*>(problem.costs.data)),
        stride_(problem.costs.stride),
        size_(problem.costs.rows),
        sign_(problem.maximize ? -1 : 1),
        column_of_(size_, -1),
        row_of_(size_, -1) {}

  Assignment Solve(absl::Span<const double> prices) {
    std::vector<int32_t> free = prices.empty() ? ReduceColumns() : StartFrom(prices);
    ReduceRows(free);
    Augment(free);
    Assignment result{.columns = std::move(column_of_), .prices = std::move(prices_)};
    for (int64_t i = 0; i < size_; ++i) result.total += Row(i)[result.columns[i]];
    return result;
  }

 private:
  const T* Row(int64_t i) const { return costs_ + i * stride_; }
  cpu::LeastTwo TwoLeast(int64_t i) const {
    return loops_.least_two(Row(i), size_, sign_, prices_.data());
  }

  // Every column is priced at its least cost and given to that row, if the row has no other.
  // Returns the rows without one.
  std::vector<int32_t> ReduceColumns() {
    prices_.assign(size_, kInfinity);
    std::vector<int32_t> row(size_, 0), columns(size_, 0);
    for (int64_t i = 0; i < size_; ++i) {
      loops_.column_minima(Row(i), size_, sign_, static_cast<int32_t>(i), prices_.data(),
                           row.data());
    }
    for (int64_t j = size_ - 1; j >= 0; --j) {
      if (++columns[row[j]] == 1) Assign(row[j], static_cast<int32_t>(j));
    }
    std::vector<int32_t> free;
    for (int64_t i = 0; i < size_; ++i) {
      if (columns[i] == 0) free.push_back(static_cast<int32_t>(i));
      // The price of a row's only column falls as long as no other column is better for the row.
      if (columns[i] == 1) LowerPrice(i);
    }
    return free;
  }

  void LowerPrice(int64_t i) {
    double& price = prices_[column_of_[i]];
    const double before = price;
    price = -kInfinity;  // keeps the column from being the least
    const cpu::LeastTwo others = TwoLeast(i);
    price = std::isfinite(others.first) ? before - others.first : before;
  }

  // Rows take their best column, the first come first.
  std::vector<int32_t> StartFrom(absl::Span<const double> prices) {
    prices_.assign(prices.begin(), prices.end());
    for (double& price : prices_) price *= sign_;
    std::vector<int32_t> free;
    for (int64_t i = 0; i < size_; ++i) {
      const cpu::LeastTwo least = TwoLeast(i);
      if (row_of_[least.first_column] < 0) {
        Assign(static_cast<int32_t>(i), least.first_column);
      } else {
        free.push_back(static_cast<int32_t>(i));
      }
    }
    return free;
  }

  void Assign(int32_t row, int32_t column) {
    column_of_[row] = column;
    row_of_[column] = row;
  }

  // Each free row takes its best column and lowers its price to where the second best is as good;
  // the row that had it looks for another at once. Rows may chase each other by ever smaller steps,
  // and paths then get on faster: there are no more such steps than rows, and one pass, where
  // Jonker and Volgenant make two.
  void ReduceRows(std::vector<int32_t>& free) {
    int64_t steps = size_;
    size_t next = 0, left = 0;
    const size_t count = free.size();
    while (next < count) {
      const int32_t i = free[next++];
      const cpu::LeastTwo least = TwoLeast(i);
      int32_t j = least.first_column;
      int32_t owner = row_of_[j];
      const double price =
          least.second_column < 0 ? prices_[j] : prices_[j] - (least.second - least.first);
      const bool lower = price < prices_[j];
      if (lower) {
        prices_[j] = price;
      } else if (owner >= 0 && least.second_column >= 0) {
        j = least.second_column;
        owner = row_of_[j];
      }
      Assign(i, j);
      if (owner < 0) continue;
      column_of_[owner] = -1;
      if (lower && --steps > 0) {
        free[--next] = owner;
      } else {
        free[left++] = owner;
      }
    }
    free.resize(left);
  }

  // Assigns each free row along a path that costs least (Dijkstra over reduced costs).
  void Augment(const std::vector<int32_t>& free) {
    std::vector<double> distance(size_), reached(size_), prices;
    std::vector<double> of_block((size_ + cpu::kAssignmentBlock - 1) / cpu::kAssignmentBlock);
    std::vector<int32_t> from(size_), scanned, ready;
    const auto relax = [&](int32_t i, double offset) {
      return loops_.relax(Row(i), size_, sign_, prices.data(), offset, i, distance.data(),
                          from.data(), of_block.data());
    };
    // Columns at most `least` away, up to the first that nobody has. Returns that one or -1.
    const auto find_ready = [&](double least) -> int32_t {
      ready.clear();
      for (size_t block = 0; block < of_block.size(); ++block) {
        if (of_block[block] > least) continue;
        const int64_t begin = static_cast<int64_t>(block) * cpu::kAssignmentBlock;
        const int64_t end = std::min(begin + cpu::kAssignmentBlock, size_);
        for (int64_t j = begin; (j = loops_.find_at_most(distance.data(), j, end, least)) < end;
             ++j) {
          ready.push_back(static_cast<int32_t>(j));
          if (row_of_[j] < 0) return ready.back();
        }
      }
      return -1;
    };
    for (const int32_t start : free) {
      // Of columns that are scanned the distance is infinite and the price minus infinity, so that
      // they are never reached again; `reached` has their distance.
      prices = prices_;
      std::fill(distance.begin(), distance.end(), kInfinity);
      scanned.clear();
      double least = relax(start, 0);
      int32_t end;
      while ((end = find_ready(least)) < 0) {
        for (const int32_t j : ready) {
          distance[j] = kInfinity;
          prices[j] = -kInfinity;
          reached[j] = least;
          scanned.push_back(j);
        }
        double nearest = kInfinity;
        for (const int32_t j : ready) {
          const int32_t i = row_of_[j];
          nearest = relax(i, sign_ * Row(i)[j] - prices_[j] - least);
        }
        least = std::max(least, nearest);  // rounding may have put `nearest` before it
      }
      for (const int32_t j : scanned) prices_[j] += reached[j] - least;
      for (int32_t j = end;;) {
        const int32_t i = from[j];
        row_of_[j] = i;
        std::swap(column_of_[i], j);
        if (i == start) break;
      }
    }
  }

  const cpu::AssignmentLoopsOf<T>& loops_;
  const T* const costs_;
  const int64_t stride_;
  const int64_t size_;
  const double sign_;
  std::vector<int32_t> column_of_, row_of_;  // -1: none
  std::vector<double> prices_;
};

absl::Status Check(const AssignmentProblem& problem) {
  const ConstMatrix& costs = problem.costs;
  if (costs.rows < 0 || costs.rows != costs.columns || costs.minus != nullptr ||
      costs.stride < costs.columns || costs.rows > std::numeric_limits<int32_t>::max() ||
      (costs.dtype != DType::kF32 && costs.dtype != DType::kF64)) {
    return absl::InternalError(absl::StrCat("assignment: costs are [", costs.rows, ", ",
                                            costs.columns, "] with stride ", costs.stride,
                                            "; a square matrix of F32 or F64 is needed"));
  }
  if (!problem.prices.empty() && static_cast<int64_t>(problem.prices.size()) != costs.rows) {
    return absl::InternalError(absl::StrCat("assignment: ", problem.prices.size(), " prices for ",
                                            costs.rows, " columns"));
  }
  for (const double price : problem.prices) {
    if (!(std::abs(price) <= kLargest)) {
      return absl::FailedPreconditionError("assignment: a price is not finite");
    }
  }
  const int64_t width = ByteWidth(costs.dtype);
  for (int64_t i = 0; i < costs.rows; ++i) {
    const std::byte* row = static_cast<const std::byte*>(costs.data) + i * costs.stride * width;
    int64_t at = 0;
    if (FindNonFinite({.data = row, .dtype = costs.dtype, .size = costs.columns}, &at)) {
      return absl::FailedPreconditionError(absl::StrCat(
          "assignment: the cost of row ", i, " and column ", at, " is not a finite number"));
    }
    if (costs.dtype != DType::kF64) continue;
    const double* values = reinterpret_cast<const double*>(row);
    for (int64_t j = 0; j < costs.columns; ++j) {
      if (std::abs(values[j]) > kLargest) {
        return absl::FailedPreconditionError(
            absl::StrCat("assignment: the cost of row ", i, " and column ", j, " is too large"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Assignment> SolveAssignment(const AssignmentProblem& problem) {
  RETURN_IF_ERROR(Check(problem));
  Assignment result = problem.costs.dtype == DType::kF32
                          ? Solver<float>(Loops().f32, problem).Solve(problem.prices)
                          : Solver<double>(Loops().f64, problem).Solve(problem.prices);
  if (problem.maximize) {
    for (double& price : result.prices) price = -price;
  }
  return result;
}

absl::StatusOr<std::vector<Assignment>> SolveAssignments(
    absl::Span<const AssignmentProblem> problems, int threads) {
  std::vector<absl::StatusOr<Assignment>> solved(problems.size());
  ThreadPool pool(std::clamp<int>(threads, 1, std::max<size_t>(problems.size(), 1)));
  pool.ForEach(static_cast<int64_t>(problems.size()), [&](int64_t item, int /*thread*/) {
    solved[item] = SolveAssignment(problems[item]);
  });
  std::vector<Assignment> results;
  results.reserve(solved.size());
  for (absl::StatusOr<Assignment>& one : solved) {
    if (!one.ok()) return one.status();
    results.push_back(*std::move(one));
  }
  return results;
}

}  // namespace pewter::kernels
