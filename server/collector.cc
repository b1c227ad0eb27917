#include "server/collector.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "server/jobs/job_state.h"
#include "server/log.h"
#include "store/housekeeping.h"
#include "store/object_store.h"

namespace pewter::server {
namespace {

constexpr int kPage = 1000;

absl::Time EndOf(const v1::Job& job) {
  return absl::FromUnixSeconds(job.end_time().seconds()) +
         absl::Nanoseconds(job.end_time().nanos());
}

// As a folder: one is in another when its name begins with the other's.
std::string FolderOf(absl::string_view destination) {
  return absl::StrCat(absl::StripSuffix(destination, "/"), "/");
}

}  // namespace

Collector::Collector(JobManager* jobs, absl::Duration retention)
    : jobs_(*jobs), retention_(retention), thread_([this] {
        while (true) {
          const absl::Status collected = Collect(absl::Now());
          if (!collected.ok()) {
            Log(LogLevel::kWarning, "cannot look for what interrupted jobs have left",
                {{"error", std::string(collected.message())}});
          }
          absl::MutexLock lock(&mutex_);
          if (!stopping_) stop_.WaitWithTimeout(&mutex_, SweepInterval(retention_));
          if (stopping_) return;
        }
      }) {}

Collector::~Collector() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    stop_.SignalAll();
  }
  thread_.join();
}

absl::Status Collector::Collect(absl::Time now) {
  std::vector<std::string> in_use;
  std::vector<std::pair<std::string, std::string>> ended;  // id and destination
  absl::flat_hash_set<std::string> there;
  v1::ListJobsRequest request;
  request.set_page_size(kPage);
  do {
    ASSIGN_OR_RETURN(v1::ListJobsResponse page, jobs_.List(request));
    for (v1::Job& job : *page.mutable_jobs()) {
      there.insert(job.id());
      if (!IsFinal(job.state())) {
        in_use.push_back(FolderOf(job.destination_uri()));
      } else if (now - EndOf(job) >= retention_ && !collected_.contains(job.id())) {
        ended.emplace_back(job.id(), job.destination_uri());
      }
    }
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  // Those of jobs that were deleted are of no use.
  absl::erase_if(collected_, [&](const std::string& id) { return !there.contains(id); });

  for (const auto& [id, destination] : ended) {
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_) return absl::OkStatus();
    }
    const std::string folder = FolderOf(destination);
    const bool busy = std::any_of(in_use.begin(), in_use.end(), [&](const std::string& used) {
      return absl::StartsWith(used, folder) || absl::StartsWith(folder, used);
    });
    if (busy) continue;
    const absl::StatusOr<std::shared_ptr<ObjectStore>> store = OpenStore(destination);
    const absl::StatusOr<int64_t> removed =
        store.ok() ? RemoveUnfinished(**store, now - retention_) : store.status();
    if (!removed.ok()) {
      // Of a store that is not there: next time.
      Log(LogLevel::kWarning, "cannot remove what a job has left",
          {{"job", id}, {"error", std::string(removed.status().message())}});
      if (absl::IsUnavailable(removed.status())) continue;
    } else if (*removed > 0) {
      Log(LogLevel::kInfo, "what a job has left is removed",
          {{"job", id}, {"files", absl::StrCat(*removed)}});
    }
    collected_.insert(id);
  }
  return absl::OkStatus();
}

}  // namespace pewter::server
