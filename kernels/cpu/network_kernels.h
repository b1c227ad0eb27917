// The CPU's kernels of a forward pass for one instruction set, as cpu/kernels.h has those of
// merges: network_kernels.cc is compiled once for each, all give the same bits, and CpuNetwork cuts
// the work and checks it.
#pragma once

#include <cstdint>

#include "kernels/ops/activation.h"

namespace pewter::kernels::cpu {

struct NetworkKernels {
  // y = f(y + bias) for `rows` rows; bias may be null.
  void (*finish)(float* y, int64_t rows, int64_t columns, int64_t stride, const float* bias,
                 Activation f);
  // gate = f(gate) up.
  void (*gate)(float* gate, const float* up, int64_t count, Activation f);
  // One row; y may be x, bias null.
  void (*normalize)(const float* x, int64_t columns, bool centre, float epsilon,
                    const float* weight, const float* bias, float* y);
  // One row of `heads` heads and one row of the tables.
  void (*rotate)(float* x, int64_t heads, int64_t head, int64_t pairs, const float* cos,
                 const float* sin);
  // Softmax of elements [begin, end) of a row of `count`; the others become 0.
  void (*softmax)(float* row, int64_t begin, int64_t end, int64_t count);
  // Folds logits into a prediction (network.h), `first` being the class of the first.
  void (*predict)(const float* logits, int64_t count, int64_t first, double* sum, float* largest,
                  int32_t* best);
  // y = x - row
  void (*subtract)(const float* x, const float* row, int64_t count, float* y);
  // sums[j] += sum of column j, squares[j] += sum of its squares, for few rows.
  void (*add_moments)(const float* x, int64_t rows, int64_t columns, int64_t stride, double* sums,
                      double* squares);
  // to += from
  void (*add)(const float* from, int64_t count, double* to);
};

// Named as the tables of cpu/kernels.h are.
namespace network {
extern const NetworkKernels kBaselineKernels;
#if defined(__x86_64__)
extern const NetworkKernels kAvx2Kernels;    // x86-64-v3
extern const NetworkKernels kAvx512Kernels;  // x86-64-v4
#endif
}  // namespace network

}  // namespace pewter::kernels::cpu
