// Which tensors methods that decompose matrices take for linear weights, and what becomes of the
// others.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "merge/methods/method.h"

namespace pewter::methods {

// linear_include and linear_exclude.
std::vector<Param> LinearWeightParams();

// A weight with two axes whose name linear_include matches and linear_exclude does not; that is
// unset: no embeddings and output heads.
bool IsLinearWeight(const TensorFacts& tensor);

// Whether the pattern of that parameter matches a beginning of the tensor's name.
bool PatternMatches(const TensorFacts& tensor, const char* param, bool unset);

// ResourceExhausted where a factorisation of a matrix of that order is beyond the libraries.
absl::Status CheckOrder(int64_t order, absl::string_view hint);

// out = base + factor * the mean of the task vectors.
absl::Status RunMeanOfTaskVectors(MethodContext& context, double factor);

}  // namespace pewter::methods
