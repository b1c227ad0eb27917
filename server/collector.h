// Collector: removes what interrupted workers have left at the destinations of jobs.
//
// A worker that is killed leaves the file that it was writing, or the parts of an upload; its
// successor removes them when it writes the same object, but not every job has a successor. Some
// time after a job's end the collector has its destination's store remove unfinished objects
// (RemoveUnfinished), unless an unfinished job writes there. Objects are never
// touched, so nothing that a manifest names is.
//
// One thread of its own. Several servers may do the same at the same time.
#pragma once

#include <algorithm>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/job_manager.h"

namespace pewter::server {

// How often to look for what is older than `retention`.
inline absl::Duration SweepInterval(absl::Duration retention) {
  return std::clamp(retention / 4, absl::Milliseconds(100), absl::Hours(1));
}

class Collector {
 public:
  // `jobs` must outlive it.
  Collector(JobManager* jobs, absl::Duration retention);
  ~Collector();

  // What the thread does, as of `now`.
  absl::Status Collect(absl::Time now);

 private:
  JobManager& jobs_;
  const absl::Duration retention_;
  absl::flat_hash_set<std::string> collected_;  // ids of jobs; by one thread at a time
  absl::Mutex mutex_;
  absl::CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace pewter::server
