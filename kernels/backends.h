// The backends that exist here. Asks, never guesses: "cuda" without a usable GPU is an error, not a
// silent CPU run.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"

namespace pewter::kernels {

// A device as the user names it, resolved: "cpu", "cuda:1".
struct Device {
  bool cuda = false;
  int ordinal = 0;
  std::string ToString() const;
};

// "auto" takes the first GPU when the CUDA backend loads and finds one, else the CPU.
// FailedPrecondition, with the reason, for "cuda[:N]" without it; InvalidArgument for other words.
absl::StatusOr<Device> ResolveDevice(absl::string_view text);

// `threads` bounds the CPU backend's own parallelism inside one call.
// Ignored by CUDA.
absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const Device& device, int threads);
// One of several backends of the CPU whose threads share each other's loops: that of a lane.
absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const Device& device,
                                                     std::shared_ptr<ThreadPool> pool);

}  // namespace pewter::kernels
