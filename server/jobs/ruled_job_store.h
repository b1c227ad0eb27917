// The changes of a JobStore by the rules that all databases share (job_rules.h). A store derives
// from RuledJobStore<itself> and has Update(id, rule): one read, change and write of a job's row.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/jobs/job_rules.h"
#include "server/jobs/job_store.h"

namespace pewter::server {

// The statement for ProjectPolicy's queues: project, priority, created_ms, running, last claim in
// ms. `startable`: the condition on a job of `table`. It walks indexes from project to project and
// takes the first of each, however many jobs there are.
inline std::string ProjectQueuesSql(absl::string_view table, absl::string_view startable) {
  const std::string of_project = " AND project = heads.project";
  return absl::StrCat(
      "WITH RECURSIVE queues(project) AS (SELECT min(project) FROM ", table,
      " WHERE state = 1 UNION ALL SELECT (SELECT min(project) FROM ", table,
      " WHERE state = 1 AND project > queues.project) FROM queues WHERE queues.project IS NOT "
      "NULL), heads AS MATERIALIZED (SELECT project, (SELECT number FROM ",
      table, " WHERE ", startable,
      " AND project = queues.project ORDER BY priority DESC, number LIMIT 1) AS number FROM queues)"
      " SELECT project, (SELECT priority FROM ",
      table, " WHERE number = heads.number), (SELECT created_ms FROM ", table,
      " WHERE number = heads.number), (SELECT count(*) FROM ", table, " WHERE state IN (2, 3, 4)",
      of_project, "), (SELECT coalesce(max(claimed_ms), 0) FROM ", table, " WHERE claimed_ms > 0",
      of_project, ") FROM heads WHERE number IS NOT NULL");
}

template <class Store>
class RuledJobStore : public JobStore {
 public:
  absl::StatusOr<v1::Job> RenewLease(absl::string_view id, int64_t lease_generation,
                                     absl::Duration lease, const v1::Progress& progress) override {
    return Self().Update(id, [&](JobRow& row) {
      return server::RenewLease(row, lease_generation, lease, progress);
    });
  }
  absl::StatusOr<v1::Job> Transition(absl::string_view id, v1::JobState from, v1::JobState to,
                                     const JobChange& change) override {
    return Self().Update(id,
                         [&](JobRow& row) { return server::Transition(row, from, to, change); });
  }
  absl::StatusOr<v1::Job> GiveUp(absl::string_view id, const LostAttempt& lost) override {
    return Self().Update(id, [&](JobRow& row) { return server::GiveUp(row, lost); });
  }
  absl::StatusOr<v1::Job> AddWarnings(absl::string_view id, int64_t lease_generation,
                                      const std::vector<std::string>& warnings) override {
    return Self().Update(
        id, [&](JobRow& row) { return server::AddWarnings(row, lease_generation, warnings); });
  }
  absl::StatusOr<v1::Job> RequestCancel(absl::string_view id) override {
    return Self().Update(id, [&](JobRow& row) { return server::RequestCancel(row); });
  }
  absl::StatusOr<v1::Job> FailOverdue(absl::string_view id) override {
    return Self().Update(id, [&](JobRow& row) { return server::FailOverdue(row); });
  }

 private:
  Store& Self() { return static_cast<Store&>(*this); }
};

}  // namespace pewter::server
