// The CPU backend: vectorised kernels for the best instruction set that the machine has, on a few
// threads. Memory is host memory, so Upload and Download are copies.
#pragma once

#include <memory>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/thread_pool.h"

namespace pewter::kernels::cpu {

// The tables that this machine can run, best first.
absl::Span<const KernelTable* const> Tables();

// `threads` >= 1 work inside one call.
std::unique_ptr<Backend> MakeBackend(const KernelTable& table, int threads);
// Its loops are those of `pool`.
std::unique_ptr<Backend> MakeBackend(const KernelTable& table, std::shared_ptr<ThreadPool> pool);

}  // namespace pewter::kernels::cpu
