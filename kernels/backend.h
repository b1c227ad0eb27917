// Backend: the numeric operations of a device, behind one interface.
//
// Work on one Backend object is ordered, as on one stream; a pipeline lane owns its own Backend. A
// Backend is used by one thread at a time. Views point to memory of that backend (for the CPU: host
// memory). Map may return before the device is done; Synchronize waits. Outputs of Reduce,
// Histogram and Sift are host values and are complete on return.
//
// Elementwise ops (kernels/ops/*.h) are trivially copyable functors, compiled by g++ and nvcc
// alike. They compute in float, and in double when their inputs are F64. Loads widen, the store
// rounds once to nearest even. No contraction, so CPU (any instruction set) and CUDA agree bit for
// bit; reductions have one fixed order everywhere, too.
//
// Errors: Internal for arguments that do not fit together (a bug of the caller); ResourceExhausted
// when memory ran out; Unavailable, with CUDA's own words, when the device failed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "kernels/ops/op_list.h"

namespace pewter::kernels {

// Flat runs of elements. Data may be misaligned by any number of whole elements.
struct ConstView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t size = 0;  // elements
};
struct View {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t size = 0;
};

// Terms that Reduce gives for each block.
int Terms(const ReduceOp& op);

// One level of a radix select over magnitudes. Magnitudes are compared as the unsigned integers
// that hold their bits (sign cleared), which orders non-negative floats. F32 keys have 2 levels of
// 16 bits, F64 keys 4.
struct RadixLevel {
  int level = 0;  // 0 is the most significant
  uint64_t prefix =
      0;  // the key's bits above this level; only elements that match are counted (level > 0)
};
inline constexpr int kRadixBins = 1 << 16;

// Memory of a backend (device memory; aligned host memory on the CPU). Freed on destruction.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() = 0;
  virtual int64_t bytes() const = 0;
};

class LinearAlgebra;  // kernels/linear_algebra.h
class Network;        // kernels/network.h

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;         // "cpu", "cuda:0"
  virtual std::string description() const = 0;  // "AMD EPYC ... (avx512), 2 threads", "NVIDIA H200"
  // True when views may point to any host memory, so the pipeline skips Upload and Download.
  virtual bool host_memory() const = 0;

  virtual absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t bytes) = 0;
  // Host memory from which copies to the device are fast (pinned), 64-byte aligned.
  virtual absl::StatusOr<std::unique_ptr<Buffer>> AllocateHost(int64_t bytes) = 0;
  // Asynchronous when the host side is from AllocateHost; the host side must stay untouched until
  // Synchronize.
  virtual absl::Status Upload(const void* host, void* device, int64_t bytes) = 0;
  virtual absl::Status Download(const void* device, void* host, int64_t bytes) = 0;
  // Within the backend's memory; the ranges do not overlap.
  virtual absl::Status Copy(const void* from, void* to, int64_t bytes) = 0;
  virtual absl::Status Synchronize() = 0;

  // out[j] = op(in[0][j], in[1][j], ...), where element j of the views has index first + j in the
  // whole tensor. Inputs have one dtype (a floating one), the output any floating one. `out` may be
  // one of the inputs when the dtypes agree. Random draws are fastest where first % 8 == 0.
  virtual absl::Status Map(const MapOp& op, absl::Span<const ConstView> in, View out,
                           int64_t first) = 0;
  // Sums of each of the op's terms, accumulated in double: Terms(op) values for each block of
  // kReduceBlock elements, counted from element 0 of the tensor, that the views touch. The order
  // within a block is fixed (kernels/ops/reduce_ops.h), so the values do not depend on threads or
  // device, nor on the tiling when views start at multiples of kReduceBlock.
  // With another `block`, a number of elements, likewise for blocks of that size.
  absl::StatusOr<std::vector<double>> Reduce(const ReduceOp& op, absl::Span<const ConstView> in,
                                             int64_t first) {
    return ReduceBlocks(op, in, first, kReduceBlock);
  }
  virtual absl::StatusOr<std::vector<double>> ReduceBlocks(const ReduceOp& op,
                                                           absl::Span<const ConstView> in,
                                                           int64_t first, int64_t block) = 0;
  // Sums along the columns of views that hold whole rows of `columns` elements: value t * columns +
  // c is term t of column c.
  virtual absl::StatusOr<std::vector<double>> ReduceColumns(const ReduceOp& op,
                                                            absl::Span<const ConstView> in,
                                                            int64_t first, int64_t columns) = 0;
  // Adds the counts of the level's digit of op(x) to `bins` (kRadixBins of them). Element 0 of the
  // views is element `first` of the tensor.
  virtual absl::Status Histogram(const MagnitudeOp& op, absl::Span<const ConstView> in,
                                 int64_t first, RadixLevel level, absl::Span<uint64_t> bins) = 0;
  // Where op(x) lies with respect to the window. `candidates` has room for every element of the
  // views; its first SiftCounts::candidates are set, in any order.
  virtual absl::StatusOr<SiftCounts> Sift(const MagnitudeOp& op, absl::Span<const ConstView> in,
                                          int64_t first, const SiftWindow& window,
                                          absl::Span<SiftCandidate> candidates) = 0;

  // Owned by the backend. FailedPrecondition when the libraries for it cannot be loaded.
  virtual absl::StatusOr<LinearAlgebra*> linear_algebra() = 0;
  // Likewise.
  virtual absl::StatusOr<Network*> network() = 0;
};

// True as soon as one element of a floating host view is NaN or infinite; `*at` is then its index.
bool FindNonFinite(ConstView view, int64_t* at);
// Converts host elements between floating types, rounding once to nearest even (see
// kernels/ops/float_formats.h). The sizes agree.
void Convert(ConstView in, View out);

}  // namespace pewter::kernels
