#include "base/dtype_names.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace pewter {
namespace {

struct Names {
  DType dtype;
  absl::string_view safetensors;
  absl::string_view torch;
};

// In the order of the enum, which indexes it.
constexpr Names kNames[] = {
    {DType::kF64, "F64", "float64"},
    {DType::kF32, "F32", "float32"},
    {DType::kF16, "F16", "float16"},
    {DType::kBF16, "BF16", "bfloat16"},
    {DType::kF8E4M3, "F8_E4M3", "float8_e4m3fn"},
    {DType::kF8E5M2, "F8_E5M2", "float8_e5m2"},
    {DType::kI64, "I64", "int64"},
    {DType::kI32, "I32", "int32"},
    {DType::kI16, "I16", "int16"},
    {DType::kI8, "I8", "int8"},
    {DType::kU64, "U64", "uint64"},
    {DType::kU32, "U32", "uint32"},
    {DType::kU16, "U16", "uint16"},
    {DType::kU8, "U8", "uint8"},
    {DType::kBool, "BOOL", "bool"},
    {DType::kF8E8M0, "F8_E8M0", "float8_e8m0fnu"},
    {DType::kC64, "C64", "complex64"},
};

}  // namespace

absl::string_view SafetensorsName(DType dtype) {
  return kNames[static_cast<int>(dtype)].safetensors;
}
absl::string_view TorchName(DType dtype) { return kNames[static_cast<int>(dtype)].torch; }

absl::StatusOr<DType> DTypeFromSafetensors(absl::string_view name) {
  for (const Names& names : kNames) {
    if (names.safetensors == name) return names.dtype;
  }
  return absl::InvalidArgumentError(absl::StrCat("unsupported dtype \"", name, "\""));
}

absl::StatusOr<DType> DTypeFromTorch(absl::string_view name) {
  const absl::string_view bare = absl::StripPrefix(name, "torch.");
  for (const Names& names : kNames) {
    if (names.torch == bare) return names.dtype;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "unknown dtype \"", name, "\"; known: float32, float16, bfloat16, float64, int64"));
}

}  // namespace pewter
