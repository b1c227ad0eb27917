// Compares two models tensor by tensor, streaming: memory is a few tiles for each thread, whatever
// the models' size.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "base/shape.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter::client {

struct TensorDiff {
  enum class Kind {
    kEqual,   // every bit
    kValues,  // dtypes and shapes agree, some elements do not
    kDType,   // shapes agree; values were compared after widening
    kShape,   // nothing else was compared
    kOnlyInA,
    kOnlyInB,
  };
  Kind kind = Kind::kEqual;
  std::string name;
  std::optional<TensorInfo> a, b;
  int64_t elements = 0;        // compared
  int64_t equal_elements = 0;  // the same bits, after widening when dtypes differ
  // Of elements that are not NaN in either. Absent for tensors that are not floating.
  std::optional<double> max_abs;      // largest |a - b|
  std::optional<double> relative_l2;  // |a - b| / |a|; infinite when a is all zero and b is not
};

// "values", "only in A", ...
const char* KindName(TensorDiff::Kind kind);

// All tensors of both, sorted by name. `threads` 0: one for each core. Fails when a read does.
absl::StatusOr<std::vector<TensorDiff>> DiffModels(const Checkpoint& a, const Checkpoint& b,
                                                   int threads);

}  // namespace pewter::client
