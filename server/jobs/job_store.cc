#include "server/jobs/job_store.h"

#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/jobs/postgres.h"
#include "server/jobs/postgres_job_store.h"
#include "server/jobs/sqlite_job_store.h"

namespace pewter::server {
namespace {

bool IsPostgres(absl::string_view database) {
  return absl::StartsWith(database, "postgresql://") || absl::StartsWith(database, "postgres://");
}

}  // namespace

absl::StatusOr<std::unique_ptr<JobStore>> OpenJobStore(absl::string_view database,
                                                       ProjectPolicy projects) {
  if (IsPostgres(database)) {
    return OpenPostgresJobStore(std::string(database), std::move(projects));
  }
  if (absl::ConsumePrefix(&database, "sqlite:") && !database.empty()) {
    return OpenSqliteJobStore(std::string(database), std::move(projects));
  }
  // Not repeated: it may hold a password.
  return absl::InvalidArgumentError(
      "the database is not one that pewterd knows; write sqlite:PATH or "
      "postgresql://USER@HOST:PORT/DATABASE");
}

bool HoldsPassword(absl::string_view database) {
  return IsPostgres(database) && PostgresUrlHoldsPassword(std::string(database));
}

}  // namespace pewter::server
