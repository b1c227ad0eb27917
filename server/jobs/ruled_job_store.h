// The changes of a JobStore by the rules that all databases share (job_rules.h). A store derives
// from RuledJobStore<itself> and has Update(id, rule): one read, change and write of a job's row.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/jobs/job_rules.h"
#include "server/jobs/job_store.h"

namespace pewter::server {

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

 private:
  Store& Self() { return static_cast<Store&>(*this); }
};

}  // namespace pewter::server
