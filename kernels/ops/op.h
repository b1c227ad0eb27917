// What elementwise ops are written in. The formula of an op exists once, as a template over
// accessors:
//
//   struct Op {
//     PEWTER_HD int inputs() const;
//     template <class X> PEWTER_HD typename X::Value operator()(const X& x) const;
//   };
//
// The accessor X stands for a short run of elements: x[i] are those of input i, widened to the
// compute type, and a backend chooses how many they are (32 in SIMD registers on the CPU, 8 a
// thread on CUDA). It has
//
//   X::Value               V, lanes of float or double (below)
//   V x[i]                 loads input i
//   M x.IndexBelow(end)    which lanes have an element index in the whole tensor < end
//   M x.RandomBelow(i, key, below)
//                          which lanes have a Philox word (base/random.h) of their element index <
//                          below; i is the model of TaskVectorSum whose draws they are
//   M x.Outranks(i, draw)  which lanes stay by that draw (ranked_draw.h), likewise
//   V x.Of(axis, i)        value i of the row or column that each lane is in
//
// V has V::Scalar, V::Broadcast(s), + - * / with V and V::Scalar, > < >= == with V::Scalar giving a
// mask M; M has & and |. Abs(V), Select(M, V, V), and for exponential functions PowerOfTwo(V) and
// SplitExponent(V, V*) complete it.
//
// Every operation rounds once to nearest even and none is contracted, so all backends agree bit
// for bit.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace pewter::kernels {

// Inputs that one op takes, the base included.
inline constexpr int kMaxInputs = 64;

// Values for each row of a tensor (a run along the last axis) or each column, in the memory of the
// backend.
struct AxisValues {
  int64_t row = 0;  // elements of a row
  int count = 0;    // values of a row or column
  bool columns = false;
  // Value i of row r is values[(r - first) * count + i], that of column c values[i * row + c].
  const double* values = nullptr;
  int64_t first = 0;
};

}  // namespace pewter::kernels
