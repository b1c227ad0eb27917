// What every elementwise op shares: limits and the lane-wise helpers that exist for float, double
// and the CPU's SIMD vectors alike (kernels/cpu/simd.h adds the vector overloads).
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace pewter::kernels {

// Models that one op takes, the base included.
inline constexpr int kMaxInputs = 64;

// The scalar behind a compute type: float for float, and for a vector its element type.
template <class V>
struct ScalarOf {
  using type = V;
};

PEWTER_HD float Select(bool mask, float a, float b) { return mask ? a : b; }
PEWTER_HD double Select(bool mask, double a, double b) { return mask ? a : b; }
PEWTER_HD float Abs(float x) { return __builtin_fabsf(x); }
PEWTER_HD double Abs(double x) { return __builtin_fabs(x); }

}  // namespace pewter::kernels
