// Singular value decompositions of task vectors in double, for methods that give small singular
// values as much weight as large ones: by the SVD itself, not by Gram matrices, which square what
// is small (joint_space.h). Sizes are elements; errors are the backend's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/linear_algebra.h"
#include "merge/methods/common/joint_space.h"
#include "merge/methods/common/low_rank.h"

namespace pewter::methods {

// The sum of task vectors, which lie without gaps between rows, as doubles.
absl::StatusOr<OwnMatrix> SumOf(kernels::Backend& backend, Deltas deltas);

// a = u diag(values) vt.
struct ThinSvd {
  OwnMatrix u, vt;
  std::vector<double> values;
};
// Destroys `a`.
absl::StatusOr<ThinSvd> SvdOf(kernels::Backend& backend, OwnMatrix a);
// Bytes that it holds with `a`, at most.
int64_t SvdBytes(MatrixShape shape);
// Of a task vector; of a product by its factors, and then of as many values as its rank.
absl::StatusOr<ThinSvd> SvdOf(kernels::Backend& backend, const TaskVector& delta);

// The rows of `to` become the left singular vectors of `delta` that belong to the right ones in
// the rows of `vt`: vt delta^T with row j divided by values[j].
absl::Status LeftVectors(kernels::Backend& backend, const TaskVector& delta,
                         const kernels::Matrix& vt, absl::Span<const double> values,
                         kernels::Matrix to);

// Row j is multiplied by factors[j]. The matrix has no gaps between rows.
absl::Status ScaleRows(kernels::Backend& backend, std::vector<double> factors,
                       const kernels::Matrix& m);

// The orthogonal polar factor of a matrix with at most as many rows as columns takes its place:
// the nearest matrix with orthonormal rows. FailedPrecondition where the rows depend on each other,
// as then there is no one such matrix.
absl::Status MakeRowsOrthonormal(kernels::Backend& backend, OwnMatrix& m);

}  // namespace pewter::methods
