// Checked size arithmetic and byte counts as people write them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pewter {

// InvalidArgument on overflow. Arguments must not be negative.
absl::StatusOr<int64_t> CheckedMul(int64_t a, int64_t b);
absl::StatusOr<int64_t> CheckedAdd(int64_t a, int64_t b);

// "4GiB", "512MiB", "5GB", "1.5G", "4096": K/M/G/T are powers of 1000, Ki/Mi/Gi/Ti of 1024, a
// trailing B is optional.
absl::StatusOr<int64_t> ParseBytes(absl::string_view text);
// "1.5 GiB", "730 KiB", "12 B".
std::string FormatBytes(int64_t bytes);

}  // namespace pewter
