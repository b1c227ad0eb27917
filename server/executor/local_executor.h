// Executor of child processes on this machine, so that a CUDA fault or the kernel's OOM killer ends
// a worker and not the server. Workers die with the server: the kernel kills them when the thread
// that called Submit is gone.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/executor/executor.h"

namespace pewter::server {

struct LocalExecutorOptions {
  std::string binary = "/proc/self/exe";
  std::string server_address;  // given to workers as --server
};

absl::StatusOr<std::unique_ptr<Executor>> MakeLocalExecutor(const LocalExecutorOptions& options);

// The environment variable that holds the token. Never argv, which every user of the machine can
// read.
inline constexpr char kTokenVariable[] = "PEWTER_JOB_TOKEN";
// Holds the database's URL where the command line does not; workers do not inherit it.
inline constexpr char kDatabaseVariable[] = "PEWTER_DATABASE";

}  // namespace pewter::server
