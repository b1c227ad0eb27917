// Tasks that merge adapters in the joint space of their products
// (merge/methods/common/joint_space.h) and give factors of the merge.
#pragma once

#include <memory>
#include <vector>

#include "merge/methods/adapter_method.h"
#include "merge/methods/tensor_task.h"

namespace pewter::adapters {

// weight, density, direction, disjoint_mean, rank_cut, and those of the rank.
std::vector<Param> JointParams();

std::shared_ptr<const TensorTask> MakeDrmTask(const AdapterMethod& method,
                                              const AdapterModule& module);

}  // namespace pewter::adapters
