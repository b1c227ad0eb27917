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
//                          below; i counts the op's draws, DrawKey(i) (see task_vector.h) is `key`
//
// V has V::Scalar, V::Broadcast(s), + - * / with V and V::Scalar, > >= == with V::Scalar giving a
// mask M; M has & and |. Abs(V), Select(M, V, V) and MaskTrue/False complete it.
//
// Every operation rounds once to nearest even and none is contracted, so all backends agree bit
// for bit.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace pewter::kernels {

// Inputs that one op takes, the base included.
inline constexpr int kMaxInputs = 64;

}  // namespace pewter::kernels
