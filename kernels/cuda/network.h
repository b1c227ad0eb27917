// A forward pass's operations on CUDA: cuBLAS and kernels of our own, behind the plugin.
#pragma once

#include <memory>
#include <string>

#include "kernels/cuda/plugin.h"
#include "kernels/network.h"

namespace pewter::kernels::cuda {

// On a stream whose linear algebra is open; both must outlive it. `name` is for messages.
std::unique_ptr<Network> MakeNetwork(const Plugin& plugin, Stream* stream, std::string name);

}  // namespace pewter::kernels::cuda
