// What every backend's Network checks before it computes: Internal, naming what does not fit.
#pragma once

#include "absl/status/status.h"
#include "kernels/network.h"

namespace pewter::kernels {

absl::Status CheckLinear(const Network::LinearCall& call);
absl::Status CheckGate(const ConstFloats& up, const Floats& gate);
absl::Status CheckNorm(const Network::NormCall& call);
absl::Status CheckRotate(const Network::RotateCall& call);
absl::Status CheckAttention(const Network::AttentionCall& call);
absl::Status CheckGather(const ConstFloats& x, const Floats& y);
absl::Status CheckPredict(const ConstFloats& logits, int64_t first);
absl::Status CheckSubtract(const ConstFloats& x, const Floats& y);
absl::Status CheckMoments(const ConstFloats& x);
absl::Status CheckAddGram(const ConstFloats& a, const ConstFloats& b);
// True of features with themselves, whose Gram matrix is symmetric.
bool SameFeatures(const ConstFloats& a, const ConstFloats& b);

}  // namespace pewter::kernels
