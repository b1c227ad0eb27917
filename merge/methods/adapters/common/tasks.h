// Tasks that make the factors of a module from those of several adapters.
#pragma once

#include <memory>
#include <vector>

#include "merge/methods/adapter_method.h"
#include "merge/methods/tensor_task.h"

namespace pewter::adapters {

// A = [w_0 s_0 A_0; w_1 s_1 A_1; ...], B = [B_0, B_1, ...].
std::shared_ptr<const TensorTask> MakeStackTask(const AdapterMethod& method,
                                                const AdapterModule& module);

// The method's operation on all A, with weights sign(w s) sqrt|w s|, and on all B, with sqrt|w s|.
std::shared_ptr<const TensorTask> MakeFactorwiseTask(const AdapterMethod& method,
                                                     const AdapterModule& module);

// The best approximation of the module's rank to the method's operation on all s B A, with weights
// w: U S V^T with B = U S and A = V^T. The largest entry of a column of B is positive. `svd_clamp`
// q clamps both factors to the q-quantile of all their entries, of either sign.
//
// A plain sum of products never exists as a matrix: QR factorisations of [w_0 s_0 B_0, ...] and of
// [A_0; A_1; ...]^T leave a matrix of the sum of the ranks to decompose.
std::shared_ptr<const TensorTask> MakeSvdTask(const AdapterMethod& method,
                                              const AdapterModule& module);

// The parameters of a method that decomposes: `params` and those of MakeSvdTask.
std::vector<Param> WithSvdParams(std::vector<Param> params);
// Those of them that say what the rank is.
std::vector<Param> WithRankParams(std::vector<Param> params);

}  // namespace pewter::adapters
