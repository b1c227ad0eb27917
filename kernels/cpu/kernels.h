// The CPU's kernels for one instruction set, behind plain function pointers. kernels.cc is compiled
// once for each; it includes nothing with inline functions that another file might share, because
// the linker could then keep a copy that this machine cannot run.
//
// All instruction sets give the same bits. Kernels are single-threaded and check nothing:
// CpuBackend does both.
#pragma once

#include <cstdint>
#include <variant>

#include "base/dtype.h"
#include "kernels/ops/op_list.h"

namespace pewter::kernels::cpu {

struct MapArgs {
  const void* in[kMaxInputs];
  DType in_dtype;
  void* out;
  DType out_dtype;
  int64_t first;  // index of the first element in the whole tensor
  int64_t size;   // elements
  bool stream;    // write past the caches
};

struct ReduceArgs {
  const void* in[kMaxInputs];
  DType in_dtype;
  int64_t first;
  int64_t size;
  double* sums;  // the op's terms, overwritten
};

struct ReduceColumnsArgs {
  const void* in[kMaxInputs];
  DType in_dtype;
  int64_t first;
  int64_t rows;
  int64_t columns;
  // Of these columns only.
  int64_t begin, end;
  double* sums;  // sums[t * columns + c], overwritten
};

struct HistogramArgs {
  const void* in[kMaxInputs];
  DType in_dtype;
  int64_t first;
  int64_t size;
  int level;
  uint64_t prefix;
  uint64_t* bins;  // added to
};

struct SiftArgs {
  const void* in[kMaxInputs];
  DType in_dtype;
  int64_t first;
  int64_t size;
  uint32_t in_views;  // where the first element is, for candidates
  SiftWindow window;
  SiftCandidate* candidates;  // room for `size`; overwritten
};

struct KernelTable {
  const char* isa;
  // By the op's place in its list.
  void (*map[std::variant_size_v<MapOp>])(const void* op, const MapArgs& args);
  void (*reduce[std::variant_size_v<ReduceOp>])(const void* op, const ReduceArgs& args);
  void (*reduce_columns[std::variant_size_v<ReduceOp>])(const void* op,
                                                        const ReduceColumnsArgs& args);
  void (*histogram[std::variant_size_v<MagnitudeOp>])(const void* op, const HistogramArgs& args);
  SiftCounts (*sift[std::variant_size_v<MagnitudeOp>])(const void* op, const SiftArgs& args);
  void (*convert)(const void* in, DType in_dtype, void* out, DType out_dtype, int64_t size);
  // Index of the first NaN or infinity, -1 when there is none.
  int64_t (*find_non_finite)(const void* data, DType dtype, int64_t size);
};

extern const KernelTable kBaselineKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;    // x86-64-v3
extern const KernelTable kAvx512Kernels;  // x86-64-v4
#endif

}  // namespace pewter::kernels::cpu
