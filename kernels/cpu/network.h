// A forward pass's operations on the CPU: OpenBLAS and the vectorised kernels, on the backend's
// threads.
#pragma once

#include <memory>

#include "kernels/cpu/network_kernels.h"
#include "kernels/thread_pool.h"
#include "kernels/network.h"

namespace pewter::kernels::cpu {

// Both must outlive it.
std::unique_ptr<Network> MakeNetwork(const NetworkKernels& kernels, ThreadPool& pool);

}  // namespace pewter::kernels::cpu
