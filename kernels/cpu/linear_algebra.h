// Dense linear algebra on the CPU: OpenBLAS, one thread a call, on the backend's threads.
#pragma once

#include <memory>

#include "kernels/cpu/thread_pool.h"
#include "kernels/linear_algebra.h"

namespace pewter::kernels::cpu {

// `pool` must outlive it.
std::unique_ptr<LinearAlgebra> MakeLinearAlgebra(ThreadPool& pool);

}  // namespace pewter::kernels::cpu
