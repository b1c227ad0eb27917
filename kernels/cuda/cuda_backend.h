// The CUDA backend, from libpewter_cuda.so (plugin.h).
//
// The library is looked for once: where PEWTER_CUDA_LIBRARY says, else beside the program, in
// ../lib from there, and then on the loader's path. Errors say what was tried.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace pewter::kernels::cuda {

// FailedPrecondition when the library or a driver is not there.
absl::StatusOr<int> DeviceCount();

// A Backend with a stream of its own on GPU `ordinal`.
absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(int ordinal);

}  // namespace pewter::kernels::cuda
