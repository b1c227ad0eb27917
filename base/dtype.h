// Element types. Free of abseil: .cu files include it. Names are in base/dtype_names.h.
#pragma once

#include <cstdint>

namespace pewter {

enum class DType : uint8_t {
  kF64,
  kF32,
  kF16,
  kBF16,
  kF8E4M3,
  kF8E5M2,  // kF8E4M3 is the "fn" variant: no infinities
  kI64,
  kI32,
  kI16,
  kI8,
  kU64,
  kU32,
  kU16,
  kU8,
  kBool,
  kF8E8M0,
  kC64,  // copied, never computed with
};

constexpr int64_t ByteWidth(DType dtype) {
  constexpr int8_t kWidths[] = {8, 4, 2, 2, 1, 1, 8, 4, 2, 1, 8, 4, 2, 1, 1, 1, 8};
  return kWidths[static_cast<int>(dtype)];
}

// True for the real floating types that methods compute with (F64 ... F8E5M2).
constexpr bool IsFloat(DType dtype) { return dtype <= DType::kF8E5M2; }

// The type that holds both without loss, as torch.promote_types gives it for floating types.
constexpr DType Promote(DType a, DType b) {
  if (a == b) return a;
  if (a == DType::kF64 || b == DType::kF64) return DType::kF64;
  if (a == DType::kF32 || b == DType::kF32) return DType::kF32;
  const bool a_is_8_bit = ByteWidth(a) == 1;
  const bool b_is_8_bit = ByteWidth(b) == 1;
  if (a_is_8_bit && !b_is_8_bit) return b;
  if (b_is_8_bit && !a_is_8_bit) return a;
  return DType::kF32;
}

}  // namespace pewter
