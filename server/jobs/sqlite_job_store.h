// JobStore on one SQLite file, for one server.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/jobs/job_store.h"

namespace pewter::server {

absl::StatusOr<std::unique_ptr<JobStore>> OpenSqliteJobStore(const std::string& path,
                                                             ProjectPolicy projects);

}  // namespace pewter::server
