// Dense linear algebra on CUDA: cuBLAS and cuSOLVER, behind the plugin.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/cuda/plugin.h"
#include "kernels/linear_algebra.h"

namespace pewter::kernels::cuda {

// What a function of the plugin returned, in its own words.
absl::Status ToStatus(const Plugin& plugin, int error, absl::string_view doing);

// On a stream of device `ordinal` whose linear algebra is open; plugin and stream must outlive it.
// `name` is for messages.
std::unique_ptr<LinearAlgebra> MakeLinearAlgebra(const Plugin& plugin, int ordinal, Stream* stream,
                                                 std::string name);

}  // namespace pewter::kernels::cuda
