// The inner loops of kernels/assignment.cc for one instruction set. assignment_loops.cc is compiled
// once for each and, like kernels.cc, includes nothing with inline functions. All give the same
// bits. `sign` is 1 or -1, costs are multiplied by it.
#pragma once

#include <cstdint>

namespace pewter::kernels::cpu {

inline constexpr int64_t kAssignmentBlock = 256;

struct LeastTwo {
  double first, second;                 // second >= first
  int32_t first_column, second_column;  // -1 where there is only one column
};

template <class T>
struct AssignmentLoopsOf {
  // least[j] = min(least[j], costs[j]), and row[j] = `i` where that is less than it was.
  void (*column_minima)(const T* costs, int64_t size, double sign, int32_t i, double* least,
                        int32_t* row);
  // Of costs[j] - prices[j]; of equal ones the first.
  LeastTwo (*least_two)(const T* costs, int64_t size, double sign, const double* prices);
  // distance[j] = min(distance[j], costs[j] - prices[j] - offset), and from[j] = `i` where that is
  // less than it was. least[b] is then the least distance in the b-th kAssignmentBlock columns.
  // Returns the least of all.
  double (*relax)(const T* costs, int64_t size, double sign, const double* prices, double offset,
                  int32_t i, double* distance, int32_t* from, double* least);
  // The first j in [begin, end) with distance[j] <= bound, or `end`.
  int64_t (*find_at_most)(const double* distance, int64_t begin, int64_t end, double bound);
};

struct AssignmentLoops {
  AssignmentLoopsOf<float> f32;
  AssignmentLoopsOf<double> f64;
};

namespace baseline {
extern const AssignmentLoops kAssignmentLoops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const AssignmentLoops kAssignmentLoops;
}
namespace avx512 {
extern const AssignmentLoops kAssignmentLoops;
}
#endif

}  // namespace pewter::kernels::cpu
