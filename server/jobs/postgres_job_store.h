// JobStore on PostgreSQL 15 or later, shared by several servers.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/jobs/job_store.h"

namespace pewter::server {

// `url`: as libpq reads it; what it does not say is in PGPASSWORD, PGPASSFILE and the like.
absl::StatusOr<std::unique_ptr<JobStore>> OpenPostgresJobStore(const std::string& url,
                                                               ProjectPolicy projects);

}  // namespace pewter::server
