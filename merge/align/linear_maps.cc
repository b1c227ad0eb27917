#include "merge/align/linear_maps.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

using kernels::Transpose;

struct Svd {
  DenseMatrix u, vt;
  std::vector<double> values;
};
absl::StatusOr<Svd> SvdOf(kernels::LinearAlgebra& algebra, DenseMatrix a) {
  const int64_t k = std::min(a.rows, a.columns);
  Svd svd{.u = DenseMatrix(a.rows, k), .vt = DenseMatrix(k, a.columns)};
  RETURN_IF_ERROR(algebra.Svd({{a.view(), svd.u.view(), svd.vt.view(), &svd.values}}));
  return svd;
}

DenseMatrix DiagonalBlock(const DenseMatrix& from, int64_t b, int64_t dim) {
  DenseMatrix block(dim, dim);
  for (int64_t r = 0; r < dim; ++r) {
    std::copy_n(from.row(b * dim + r) + b * dim, dim, block.row(r));
  }
  return block;
}

absl::Status CheckBlocks(const DenseMatrix& similarity, int64_t dim) {
  if (dim > 0 && similarity.rows == similarity.columns && similarity.rows % dim == 0) {
    return absl::OkStatus();
  }
  return absl::InternalError("blocks of features do not fit their similarities");
}

// S^1/2 and S^-1/2 of a symmetric positive definite matrix.
struct Roots {
  DenseMatrix root, inverse;
};
absl::StatusOr<Roots> RootsOf(kernels::LinearAlgebra& algebra, DenseMatrix s, double g) {
  // Below this share of the largest an eigenvalue is rounding.
  constexpr double kLeastVariance = 1e-12;
  const int64_t n = s.rows;
  for (int64_t i = 0; i < n; ++i) s(i, i) += g;
  std::vector<double> values;
  RETURN_IF_ERROR(algebra.SymmetricEigen({{s.view(), &values}}));
  if (!(values.back() > kLeastVariance * values.front())) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the features have directions without variance (the smallest is ", values.back(),
        ", the largest ", values.front(), "); CCA needs `gamma` above 0 then"));
  }
  const auto power = [&](double exponent) {
    DenseMatrix scaled = s;
    for (int64_t i = 0; i < n; ++i) {
      const double factor = std::pow(values[i], exponent);
      for (int64_t j = 0; j < n; ++j) scaled(i, j) *= factor;
    }
    return Product(algebra, Transpose::kYes, s, Transpose::kNo, scaled);
  };
  Roots roots;
  ASSIGN_OR_RETURN(roots.root, power(0.5));
  ASSIGN_OR_RETURN(roots.inverse, power(-0.5));
  return roots;
}

}  // namespace

absl::StatusOr<OrthogonalMaps> OrthogonalMapsOf(kernels::LinearAlgebra& algebra,
                                                const DenseMatrix& similarity, int64_t dim) {
  RETURN_IF_ERROR(CheckBlocks(similarity, dim));
  OrthogonalMaps maps;
  maps.transform.blocks = similarity.rows / dim;
  maps.transform.dim = dim;
  for (int64_t b = 0; b < maps.transform.blocks; ++b) {
    ASSIGN_OR_RETURN(const Svd svd, SvdOf(algebra, DiagonalBlock(similarity, b, dim)));
    for (double value : svd.values) maps.affinity += value;
    ASSIGN_OR_RETURN(const DenseMatrix map,
                     Product(algebra, Transpose::kNo, svd.u, Transpose::kNo, svd.vt));
    ASSIGN_OR_RETURN(const DenseMatrix inverse,
                     Product(algebra, Transpose::kYes, svd.vt, Transpose::kYes, svd.u));
    maps.transform.forward.insert(maps.transform.forward.end(), map.values.begin(),
                                  map.values.end());
    maps.transform.inverse.insert(maps.transform.inverse.end(), inverse.values.begin(),
                                  inverse.values.end());
  }
  return maps;
}

absl::StatusOr<CanonicalMap> CanonicalMapOf(kernels::LinearAlgebra& algebra, DenseMatrix xx,
                                            DenseMatrix yy, const DenseMatrix& xy, double g) {
  ASSIGN_OR_RETURN(const Roots x, RootsOf(algebra, std::move(xx), g));
  ASSIGN_OR_RETURN(const Roots y, RootsOf(algebra, std::move(yy), g));
  ASSIGN_OR_RETURN(const DenseMatrix left,
                   Product(algebra, Transpose::kNo, x.inverse, Transpose::kNo, xy));
  ASSIGN_OR_RETURN(DenseMatrix whitened,
                   Product(algebra, Transpose::kNo, left, Transpose::kNo, y.inverse));
  ASSIGN_OR_RETURN(Svd svd, SvdOf(algebra, std::move(whitened)));
  ASSIGN_OR_RETURN(const DenseMatrix rotation,
                   Product(algebra, Transpose::kNo, svd.u, Transpose::kNo, svd.vt));
  CanonicalMap map;
  map.correlations = std::move(svd.values);
  ASSIGN_OR_RETURN(const DenseMatrix to,
                   Product(algebra, Transpose::kNo, x.root, Transpose::kNo, rotation));
  ASSIGN_OR_RETURN(map.forward, Product(algebra, Transpose::kNo, to, Transpose::kNo, y.inverse));
  ASSIGN_OR_RETURN(const DenseMatrix back,
                   Product(algebra, Transpose::kNo, y.root, Transpose::kYes, rotation));
  ASSIGN_OR_RETURN(map.inverse, Product(algebra, Transpose::kNo, back, Transpose::kNo, x.inverse));
  return map;
}

absl::StatusOr<std::vector<CanonicalMap>> CanonicalMapsOf(kernels::LinearAlgebra& algebra,
                                                          absl::Span<const DenseMatrix> own,
                                                          absl::Span<const DenseMatrix> cross,
                                                          double g) {
  if (own.size() != cross.size() + 1) {
    return absl::InternalError("covariances of other models than their products");
  }
  std::vector<CanonicalMap> maps;
  for (size_t i = 0; i < cross.size(); ++i) {
    ASSIGN_OR_RETURN(CanonicalMap map, CanonicalMapOf(algebra, own[0], own[i + 1], cross[i], g));
    maps.push_back(std::move(map));
  }
  return maps;
}

}  // namespace pewter
