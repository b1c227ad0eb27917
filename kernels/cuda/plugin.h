// The boundary between pewter and libpewter_cuda.so, which holds everything that needs CUDA and is
// loaded at run time: so pewter starts on machines without it and nothing is paid for it there.
//
// The library exports one function, pewter_cuda_plugin, which gives a table of functions. They
// return 0, a cudaError_t or a LinearError and throw nothing. Work of one Stream is ordered; a
// Stream is used by one thread at a time.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/op_list.h"

namespace pewter::kernels::cuda {

// Raise the number whenever a struct or the meaning of a function here, or an op's meaning,
// changes; a change of an op's layout changes the value by itself.
inline constexpr uint64_t kPluginAbi =
    (uint64_t{5} << 32) | (sizeof(MapOp) + sizeof(ReduceOp) * 3 + sizeof(MagnitudeOp) * 5);

struct Stream;

// `op` is the op's place in its list, `op_data` the op. Views are device memory.
struct MapCall {
  int op;
  const void* op_data;
  int inputs;
  const void* in[kMaxInputs];
  DType in_dtype;
  void* out;
  DType out_dtype;
  int64_t first;
  int64_t size;
};

struct ReduceCall {
  int op;
  const void* op_data;
  int inputs;
  const void* in[kMaxInputs];
  DType in_dtype;
  int64_t first;
  int64_t size;
  int64_t block;  // elements; by columns: of a row
  int64_t blocks;
  int terms;
  bool by_columns;
  double* sums;  // host, overwritten: terms of each block, or each term of all columns
};

struct HistogramCall {
  int op;
  const void* op_data;
  int inputs;
  const void* in[kMaxInputs];
  DType in_dtype;
  int64_t first;
  int64_t size;
  int level;
  uint64_t prefix;
  uint64_t* bins;  // host: added to
};

struct SiftCall {
  int op;
  const void* op_data;
  int inputs;
  const void* in[kMaxInputs];
  DType in_dtype;
  int64_t first;
  int64_t size;
  SiftWindow window;
  SiftCandidate* candidates;  // host: room for `size`
  SiftCounts counts;          // set
};

// Dense linear algebra, as kernels/linear_algebra.h says; matrices are device memory, row-major.
struct MatrixArg {
  void* data;         // only read where it is an input
  const void* minus;  // or null
  DType dtype;        // F64 for outputs
  int64_t rows, columns, stride;
};

// c = alpha op(a) op(b) + beta c.
struct MultiplyCall {
  bool transpose_a, transpose_b;
  MatrixArg a, b, c;
  double alpha, beta;
  bool mirror;  // c is symmetric: its lower triangle is copied to the upper one
};
struct EigenCall {
  MatrixArg a;
  double* values;  // host
};
struct SvdCall {
  MatrixArg a, u, vt;
  double* values;  // host
};
struct QrCall {
  MatrixArg a, r;
};
struct SolveCall {
  MatrixArg a, b;
};

// The operations of a forward pass, as kernels/network.h says; device memory, row-major.
struct FloatsArg {
  float* data;  // only read where it is an input
  int64_t rows, columns, stride;
};
struct LinearCall {
  FloatsArg x, w, y;
  bool transpose_w;
  const float* bias;
  Activation activation;
  bool add;
};
struct GateCall {
  FloatsArg up, gate;
  Activation activation;
};
struct NormCall {
  bool centre;
  float epsilon;
  FloatsArg x, y;
  const float* weight;
  const float* bias;
};
struct RotateCall {
  FloatsArg x;
  int64_t head, pairs;
  const int32_t* positions;
  const float* cos;
  const float* sin;
};
struct AttentionCall {
  FloatsArg q, k, v, out;
  int64_t heads, key_heads, head;
  float scale;
  bool causal;
  int64_t window;
  const int32_t* positions;
  const float* bias;
  int64_t distances;
  const int64_t* starts;  // host
  int64_t sequences;
};
struct GatherCall {
  FloatsArg x, y;
  const int32_t* rows;
};
struct PredictCall {
  FloatsArg logits;
  int64_t first;
  const int32_t* labels;
  void* predictions;  // Prediction
};
struct SubtractCall {
  FloatsArg x, y;
  const float* row;
};
struct MomentsCall {
  FloatsArg x;
  double* sums;
  double* squares;
};
struct GramCall {
  FloatsArg a, b;
  double* gram;
  bool lower_only;
};

// Beyond every cudaError_t.
enum LinearError : int {
  kLibrariesMissing = 100000,  // cuBLAS or cuSOLVER cannot be loaded
  kNotFinite,
  kNotConverged,
  kNotPositiveDefinite,
  kLibraryFailed,
};

struct Plugin {
  const char* (*describe)(int error);
  int (*device_count)(int* count);
  int (*device_name)(int ordinal, char* name, int64_t bytes);

  int (*open)(int ordinal, Stream** stream);
  void (*close)(Stream* stream);

  int (*allocate)(int ordinal, int64_t bytes, void** data);
  void (*release)(int ordinal, void* data);
  int (*allocate_host)(int ordinal, int64_t bytes, void** data);
  void (*release_host)(int ordinal, void* data);

  int (*upload)(Stream* stream, const void* host, void* device, int64_t bytes);
  int (*download)(Stream* stream, const void* device, void* host, int64_t bytes);
  int (*copy)(Stream* stream, const void* from, void* to, int64_t bytes);
  int (*synchronize)(Stream* stream);

  int (*map)(Stream* stream, const MapCall* call);
  int (*reduce)(Stream* stream, const ReduceCall* call);
  int (*histogram)(Stream* stream, const HistogramCall* call);
  int (*sift)(Stream* stream, SiftCall* call);

  // The libraries are loaded with the first open_linear_algebra; the others come after it.
  int (*open_linear_algebra)(Stream* stream);
  int (*multiply)(Stream* stream, const MultiplyCall* call);
  int (*eigen)(Stream* stream, const EigenCall* call);
  int (*svd)(Stream* stream, const SvdCall* call);
  int (*qr)(Stream* stream, const QrCall* call);
  int (*solve_pos_def)(Stream* stream, const SolveCall* call);

  // Likewise after open_linear_algebra.
  int (*linear)(Stream* stream, const LinearCall* call);
  int (*gate)(Stream* stream, const GateCall* call);
  int (*normalize)(Stream* stream, const NormCall* call);
  int (*rotate)(Stream* stream, const RotateCall* call);
  int (*attention)(Stream* stream, const AttentionCall* call);
  int (*gather)(Stream* stream, const GatherCall* call);
  int (*predict)(Stream* stream, const PredictCall* call);
  int (*subtract)(Stream* stream, const SubtractCall* call);
  int (*add_moments)(Stream* stream, const MomentsCall* call);
  int (*add_gram)(Stream* stream, const GramCall* call);
};

// Null when the library was built for another kPluginAbi.
using PluginEntry = const Plugin* (*)(uint64_t abi);
inline constexpr char kPluginEntryName[] = "pewter_cuda_plugin";

}  // namespace pewter::kernels::cuda
