// Names of element types, as safetensors and as PyTorch write them.
#pragma once

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/dtype.h"

namespace pewter {

// "BF16", "F8_E4M3", "I64", ...
absl::string_view SafetensorsName(DType dtype);
absl::StatusOr<DType> DTypeFromSafetensors(absl::string_view name);
// "bfloat16", "float32", ...: as config.json and recipes write it.
absl::string_view TorchName(DType dtype);
// Accepts "bfloat16" and "torch.bfloat16".
absl::StatusOr<DType> DTypeFromTorch(absl::string_view name);

}  // namespace pewter
