// What every backend checks before it runs a kernel, and how an op is handed to one: by its place
// in its list and its address.
#pragma once

#include <variant>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/backend.h"

namespace pewter::kernels {

// Internal, naming what does not fit.
absl::Status CheckMap(const MapOp& op, absl::Span<const ConstView> in, View out, int64_t first);
absl::Status CheckReduce(const ReduceOp& op, absl::Span<const ConstView> in, int64_t first,
                         int64_t block);
absl::Status CheckReduceColumns(const ReduceOp& op, absl::Span<const ConstView> in, int64_t first,
                                int64_t columns);
absl::Status CheckHistogram(const MagnitudeOp& op, absl::Span<const ConstView> in, int64_t first,
                            RadixLevel level, absl::Span<const uint64_t> bins);
absl::Status CheckSift(const MagnitudeOp& op, absl::Span<const ConstView> in, int64_t first,
                       absl::Span<const SiftCandidate> candidates);

template <class Variant>
const void* OpAddress(const Variant& op) {
  return std::visit([](const auto& held) -> const void* { return &held; }, op);
}

// Blocks of `block` elements that elements [first, first + size) touch.
inline int64_t BlocksTouched(int64_t first, int64_t size, int64_t block) {
  return size == 0 ? 0 : (first + size - 1) / block - first / block + 1;
}

}  // namespace pewter::kernels
