// Reads of tensors whose elements do not lie in row-major order: transposed, or a part of a larger
// tensor. Memory is bounded by kStridedWindow whatever the tensor.
#pragma once

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "merge/checkpoint/safetensors.h"

namespace pewter {

inline constexpr int64_t kStridedWindow = int64_t{1} << 20;
// What is read are whole blocks of the file (but for the tensor's first and last), so that ranges
// of bytes that were read are the same ones whenever they are read.
inline constexpr int64_t kStridedBlock = 4096;

// Elements [first, first + count) in row-major order into `out`. `info.strides` are positive for
// extents above 1 and address no element twice. `read` fills a span with the file's bytes from an
// offset on.
absl::Status ReadStrided(
    const TensorInfo& info, int64_t first, int64_t count, absl::Span<std::byte> out,
    absl::FunctionRef<absl::Status(int64_t offset, absl::Span<std::byte> bytes)> read);

// About how often `read` is called to read all of the tensor in runs of 128 Ki elements.
int64_t StridedReads(const TensorInfo& info);

}  // namespace pewter
