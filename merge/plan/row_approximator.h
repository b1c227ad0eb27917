// Rows of a vocabulary tensor for tokens that a model does not have, made with the help of another
// model, the donor, that has them (mergekit-tokensurgeon).
//
//   omp                   orthogonal matching pursuit: the donor's row as a sum of k of its rows of
//                         shared tokens, chosen one after the other by their product with what is
//                         left; the own row is the same sum of own rows
//   mp_rope               as omp, but each chosen row may also be turned as by a rotary position
//   common_interpolation  the k nearest shared rows, weighted by distance, or by a fit
//   landmark_pca          an affine map between the principal components of the shared rows
//   stb                   an affine map between two bases, each vector the same sum of k shared
//   rows subword               from the own rows of the tokens that the token's text consists of
//   mean                  the mean of all own rows
//   john_hewitt           draws from the normal distribution with the own rows' mean and covariance
//   zero, randn           zeros; standard normal draws
//
// Rows are made in batches of a fixed composition, with the backend's linear algebra in double,
// when the first row of a batch is asked for, and kept in the own tensor's dtype. So bytes depend
// neither on order nor on threads. Of the donor, its shared rows are held in their stored dtype
// until all is made; own rows are read as needed. Row may be called from any thread; batches take
// turns.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/checkpoint/tensor_source.h"
#include "merge/recipe/recipe.h"

namespace pewter {

// How a model's rotary positions turn a row: halves of each head by position * base^(-2i / size).
struct RotaryHeads {
  int64_t heads = 0;
  double base = 10000;
};

// What rows are made from. `own` and `donor` are matrices with tokens as rows, perhaps of different
// width.
struct RowProblem {
  TokenApproximation how;
  std::shared_ptr<const TensorSource> own;
  std::shared_ptr<const TensorSource> donor;
  // Rows of tokens that both have, the donor's and the own one, in the donor's order.
  std::vector<std::pair<int32_t, int32_t>> shared;
  std::vector<int32_t> wanted;  // the donor's rows of tokens that have no own one
  // Of kSubword, for each of `wanted`: own rows of its text's tokens.
  std::vector<std::vector<int32_t>> pieces;
  bool head = false;                   // the tensor is an output head
  RotaryHeads own_heads, donor_heads;  // of kMatchingPursuitRope
  std::string device = "cpu";          // resolved: kernels/backends.h
  int threads = 1;
  uint64_t seed = 0;
  std::string name;  // with `seed`: which draws are taken
};

class RowApproximator {
 public:
  // FailedPrecondition when the problem cannot be solved: fewer shared tokens than k, heads that do
  // not divide a row.
  static absl::StatusOr<std::shared_ptr<const RowApproximator>> Make(RowProblem problem);
  virtual ~RowApproximator() = default;

  // The row for wanted[index], in own's dtype and width. `observer` hears of what is read of the
  // donor, the first time.
  virtual absl::Status Row(int64_t index, absl::Span<std::byte> out,
                           ReadObserver* observer) const = 0;
  // The most that is held at a time, on the host.
  virtual int64_t resident_bytes() const = 0;
};

}  // namespace pewter
