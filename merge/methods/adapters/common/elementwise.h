// Elementwise operations on several tensors of one shape, as PEFT defines them (peft/utils/
// merge_utils.py), on tiles of any size.
//
//   prune       keep the int(density * n) largest magnitudes, of equal ones the first; or each
//               element with probability density, divided by it. A density of 1 or more keeps all.
//   elect_sign  m = sign(sum_i x_i), or with "frequency" sign(sum_i sign(x_i)), sign(0) = +, of the
//               pruned tensors without their weights;
//               out = sum_{sign x_i = m} weight_i x_i / max(1, number of them)
//   else        out = sum_i weight_i x_i
//
// Sums are double, pruned terms float32.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "base/random.h"
#include "kernels/threshold_select.h"
#include "merge/methods/adapter_method.h"

namespace pewter::adapters {

// Elements [first, first + count) of a tensor into `out`.
using ReadElements = absl::FunctionRef<void(int64_t first, int64_t count, float* out)>;

class Combination {
 public:
  struct Term {
    double weight = 1;
    double density = 1;
    PhiloxKey key;  // of random draws
  };

  Combination(const Elementwise& operation, bool by_frequency, std::vector<Term> terms);

  // Operands are pruned by rank: Rank must be called for each before Combine.
  bool ranks() const { return operation_.prune == Elementwise::Prune::kMagnitude; }
  // Finds what term `i`, of `scratch.size()` elements, keeps. `read` is called with ascending
  // ranges.
  void Rank(size_t i, absl::Span<float> scratch, ReadElements read);

  // out[j] from element first + j of every term; values[i] holds those of term i, and is pruned.
  void Combine(int64_t first, int64_t count, absl::Span<float* const> values, float* out) const;

 private:
  enum class Keep { kAll, kNone, kLargest, kDrawn };

  void Prune(size_t i, int64_t first, int64_t count, float* values) const;

  const Elementwise operation_;
  const bool by_frequency_;
  const std::vector<Term> terms_;
  std::vector<Keep> keep_;
  std::vector<kernels::Threshold> thresholds_;  // of terms with kLargest
};

// A module's parameters as those of a combination of its factors, or whatever `scope` names.
std::vector<Combination::Term> TermsOf(const AdapterModule& module, absl::string_view scope);
bool ByFrequency(const AdapterModule& module);

// The parameters, as all methods have them.
Param WeightParam();
Param DensityParam(bool random);
Param MajoritySignParam();

}  // namespace pewter::adapters
