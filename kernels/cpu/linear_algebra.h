// Dense linear algebra on the CPU: OpenBLAS, one thread a call, on the backend's threads.
#pragma once

#include <memory>

#include "kernels/thread_pool.h"
#include "kernels/linear_algebra.h"

namespace pewter::kernels::cpu {

// The factorisations that may not converge, in LAPACK's terms: they give its `info`, 0 for success.
// Tests have their own.
class Factorisations {
 public:
  enum class Routine {
    kFast,  // divide and conquer
    kSafe,  // QR iteration
  };
  virtual ~Factorisations() = default;
  // As LinearAlgebra::SymmetricEigen, but with values and rows in ascending order and any sign.
  virtual int Eigen(Routine routine, const Matrix& a, double* values) const;
  // As LinearAlgebra::Svd, but with any sign.
  virtual int Svd(Routine routine, const Matrix& a, const Matrix& u, const Matrix& vt,
                  double* values) const;
};

// `pool` must outlive it.
std::unique_ptr<LinearAlgebra> MakeLinearAlgebra(
    ThreadPool& pool,
    std::unique_ptr<const Factorisations> factorisations = std::make_unique<Factorisations>());

}  // namespace pewter::kernels::cpu
