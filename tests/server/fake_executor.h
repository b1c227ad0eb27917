// An Executor without processes: tests see what was submitted and say when workers end.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/executor/executor.h"

namespace pewter::server {

class FakeExecutor final : public Executor {
 public:
  // What tests look at; outlives the executor.
  struct Log {
    absl::Mutex mutex;
    std::vector<WorkerLaunch> launches;
    std::map<std::string, int> running;  // by job
    std::vector<std::string> stops, kills;
    std::deque<WorkerExit> exits;
    absl::Status submit_status;
    bool kill_ends_worker = true;

    // The worker of `job_id` ends.
    void End(const WorkerExit& exit) {
      absl::MutexLock lock(&mutex);
      exits.push_back(exit);
    }
    // Waits for the n-th launch (from 1).
    WorkerLaunch WaitForLaunch(size_t n) {
      absl::MutexLock lock(&mutex);
      const auto there = [&] { return launches.size() >= n; };
      if (!mutex.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(30))) return {};
      return launches[n - 1];
    }
    template <typename Predicate>
    bool WaitFor(const Predicate& predicate) {
      absl::MutexLock lock(&mutex);
      return mutex.AwaitWithTimeout(absl::Condition(&predicate), absl::Seconds(30));
    }
  };

  explicit FakeExecutor(Log* log) : log_(*log) {}

  absl::Status Submit(const WorkerLaunch& launch) override {
    absl::MutexLock lock(&log_.mutex);
    if (!log_.submit_status.ok()) return log_.submit_status;
    if (log_.running[launch.job_id]++ != 0) {
      return absl::AlreadyExistsError(absl::StrCat("two workers of ", launch.job_id));
    }
    log_.launches.push_back(launch);
    return absl::OkStatus();
  }

  std::vector<WorkerExit> Poll(absl::Duration timeout) override {
    absl::MutexLock lock(&log_.mutex);
    const auto ended = [this] { return !log_.exits.empty(); };
    log_.mutex.AwaitWithTimeout(absl::Condition(&ended), timeout);
    std::vector<WorkerExit> exits(log_.exits.begin(), log_.exits.end());
    log_.exits.clear();
    for (const WorkerExit& exit : exits) log_.running.erase(exit.job_id);
    return exits;
  }

  void Cancel(absl::string_view job_id, CancelMode mode) override {
    absl::MutexLock lock(&log_.mutex);
    (mode == CancelMode::kKill ? log_.kills : log_.stops).emplace_back(job_id);
    if (mode == CancelMode::kKill && log_.kill_ends_worker &&
        log_.running.count(std::string(job_id)) != 0) {
      log_.exits.push_back({.job_id = std::string(job_id), .signal = 9});
    }
  }

 private:
  Log& log_;
};

}  // namespace pewter::server
