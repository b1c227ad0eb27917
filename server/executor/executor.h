// Executor: starts `pewterd work` somewhere and tells when it ended.
//
// It knows processes, not jobs: claims, leases and progress go between the worker and the server
// over gRPC. At most one worker of a job is alive at a time: Submit for a job whose worker has not
// been reported by Poll is AlreadyExists. Submit is called from one thread that lives as long as
// the executor; Poll from one thread; Cancel from any. The destructor kills what is left and waits
// for it.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pewter::server {

struct WorkerLaunch {
  std::string job_id;
  std::string token;  // of WorkerService; secret
};

struct WorkerExit {
  std::string job_id;
  int exit_code = 0;
  int signal = 0;           // that killed it; 0: none did
  std::string stderr_tail;  // its last words, bounded
};

class Executor {
 public:
  virtual ~Executor() = default;

  // Unavailable when no worker could be started.
  virtual absl::Status Submit(const WorkerLaunch& launch) = 0;
  // Waits until a worker has ended, or `timeout`. After an exit was returned nothing of that worker
  // is alive.
  virtual std::vector<WorkerExit> Poll(absl::Duration timeout) = 0;
  enum class CancelMode {
    kStop,  // asks it to stop in order
    kKill,
  };
  // Nothing happens when the job has no worker.
  virtual void Cancel(absl::string_view job_id, CancelMode mode) = 0;
};

}  // namespace pewter::server
