// Compiled once for each instruction set with PEWTER_CPU_ISA (a namespace) and
// PEWTER_CPU_ASSIGNMENT (the table that it defines). Plain loops over a fixed number of lanes,
// which compilers make vectors of.
#include "kernels/cpu/assignment_loops.h"

namespace pewter::kernels::cpu {
namespace PEWTER_CPU_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr int kLanes = 16;

template <class T>
void ColumnMinima(const T* __restrict costs, int64_t size, double sign, int32_t i,
                  double* __restrict least, int32_t* __restrict row) {
  for (int64_t j = 0; j < size; ++j) {
    const double cost = sign * costs[j];
    const bool less = cost < least[j];
    least[j] = less ? cost : least[j];
    row[j] = less ? i : row[j];
  }
}

template <class T>
LeastTwo FindLeastTwo(const T* __restrict costs, int64_t size, double sign,
                      const double* __restrict prices) {
  double first[kLanes], second[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) first[lane] = second[lane] = kInfinity;
  const auto take = [&](int64_t j, int lane) {
    const double value = sign * costs[j] - prices[j];
    const double lower = first[lane] < value ? first[lane] : value;
    const double higher = first[lane] < value ? value : first[lane];
    first[lane] = lower;
    second[lane] = second[lane] < higher ? second[lane] : higher;
  };
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) take(j + lane, lane);
  }
  for (; j < size; ++j) take(j, static_cast<int>(j % kLanes));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      const double a = first[lane], b = first[lane + width];
      const double higher = a < b ? b : a;
      double least = second[lane] < second[lane + width] ? second[lane] : second[lane + width];
      first[lane] = a < b ? a : b;
      second[lane] = higher < least ? higher : least;
    }
  }
  LeastTwo result = {first[0], second[0], -1, -1};
  const auto find = [&](int64_t at) {
    const double value = sign * costs[at] - prices[at];
    if (result.first_column < 0 && value == result.first) {
      result.first_column = static_cast<int32_t>(at);
    } else if (result.second_column < 0 && value == result.second) {
      result.second_column = static_cast<int32_t>(at);
    }
    return result.first_column >= 0 && result.second_column >= 0;
  };
  for (j = 0; j + kLanes <= size; j += kLanes) {
    int64_t hits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      hits += sign * costs[j + lane] - prices[j + lane] <= result.second ? 1 : 0;
    }
    if (hits == 0) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (find(j + lane)) return result;
    }
  }
  for (; j < size; ++j) {
    if (find(j)) return result;
  }
  return result;
}

template <class T>
double Relax(const T* __restrict costs, int64_t size, double sign, const double* __restrict prices,
             double offset, int32_t i, double* __restrict distance, int32_t* __restrict from,
             double* __restrict least) {
  static_assert(kAssignmentBlock % kLanes == 0);
  double result = kInfinity;
  for (int64_t begin = 0; begin < size; begin += kAssignmentBlock) {
    const int64_t end = begin + kAssignmentBlock < size ? begin + kAssignmentBlock : size;
    double of_lane[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) of_lane[lane] = kInfinity;
    const auto take = [&](int64_t j, int lane) {
      const double value = sign * costs[j] - prices[j] - offset;
      const bool less = value < distance[j];
      const double nearest = less ? value : distance[j];
      distance[j] = nearest;
      from[j] = less ? i : from[j];
      of_lane[lane] = of_lane[lane] < nearest ? of_lane[lane] : nearest;
    };
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) take(j + lane, lane);
    }
    for (; j < end; ++j) take(j, 0);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        of_lane[lane] =
            of_lane[lane] < of_lane[lane + width] ? of_lane[lane] : of_lane[lane + width];
      }
    }
    least[begin / kAssignmentBlock] = of_lane[0];
    result = of_lane[0] < result ? of_lane[0] : result;
  }
  return result;
}

int64_t FindAtMost(const double* __restrict distance, int64_t begin, int64_t end, double bound) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) {
    int64_t hits = 0;
    for (int lane = 0; lane < kLanes; ++lane) hits += distance[j + lane] <= bound ? 1 : 0;
    if (hits != 0) break;
  }
  while (j < end && distance[j] > bound) ++j;
  return j;
}

template <class T>
constexpr AssignmentLoopsOf<T> kLoops = {ColumnMinima<T>, FindLeastTwo<T>, Relax<T>, FindAtMost};

}  // namespace

const AssignmentLoops kAssignmentLoops = {kLoops<float>, kLoops<double>};

}  // namespace PEWTER_CPU_ISA
}  // namespace pewter::kernels::cpu
