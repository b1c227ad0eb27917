// JobStore on one SQLite file. One connection behind one mutex: statements take microseconds, a
// commit one fsync.
#include <algorithm>
#include <array>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "server/errors.h"
#include "server/jobs/job_state.h"
#include "server/jobs/job_store.h"
#include "server/jobs/schema.h"
#include "server/jobs/sqlite.h"

namespace pewter::server {
namespace {

// Entry i brings a database from version i to i + 1.
constexpr std::array<const char*, 1> kMigrations = {kSchema};

void SetTime(absl::Time time, google::protobuf::Timestamp* out) {
  const int64_t micros = absl::ToUnixMicros(time);
  out->set_seconds(micros / 1'000'000);
  out->set_nanos(static_cast<int32_t>(micros % 1'000'000) * 1000);
}

absl::Status JobNotFound(absl::string_view id) {
  return MakeError(absl::StatusCode::kNotFound, "JOB_NOT_FOUND",
                   absl::StrCat("there is no job ", id), {{"job_id", std::string(id)}});
}

absl::Status LeaseLost(const v1::Job& job, int64_t generation) {
  return MakeError(
      absl::StatusCode::kAborted, "LEASE_LOST",
      absl::StrCat("job ", job.id(), " is ", v1::JobState_Name(job.state()),
                   " with lease generation ", job.lease_generation(), ", not ", generation),
      {{"job_id", job.id()}});
}

absl::Status CheckLease(const v1::Job& job, int64_t generation) {
  return IsHeld(job.state()) && job.lease_generation() == generation ? absl::OkStatus()
                                                                     : LeaseLost(job, generation);
}

// A row of `jobs` and the job that it holds.
struct Row {
  int64_t number = 0;
  v1::Job job;
};

// The part of a job that its row's `status` holds.
std::string StatusBytes(v1::Job job) {
  job.clear_id();
  job.clear_request_id();
  job.clear_recipe();
  job.clear_destination_uri();
  job.clear_labels();
  job.clear_priority();
  job.clear_options();
  job.clear_create_time();
  return job.SerializeAsString();
}

class SqliteJobStore final : public JobStore {
 public:
  explicit SqliteJobStore(Database database) : database_(std::move(database)) {}

  static absl::StatusOr<std::unique_ptr<JobStore>> Open(const std::string& path) {
    ASSIGN_OR_RETURN(Database database, Database::Open(path));
    RETURN_IF_ERROR(Annotate(Migrate(database), path));
    return std::make_unique<SqliteJobStore>(std::move(database));
  }

  absl::StatusOr<Created> Create(const NewJob& request, int64_t queue_limit) override {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database_));
    const v1::Job& asked = request.job;
    if (!asked.request_id().empty()) {
      ASSIGN_OR_RETURN(
          Statement same,
          database_.Prepare("SELECT id, request_digest FROM jobs WHERE request_id = ?"));
      ASSIGN_OR_RETURN(const bool found, same.Bind(asked.request_id()).Step());
      if (found) {
        const std::string id = same.Bytes(0);
        if (same.Bytes(1) != request.request_digest) {
          return MakeError(absl::StatusCode::kInvalidArgument, "REQUEST_ID_REUSED",
                           absl::StrCat("request_id \"", asked.request_id(), "\" was used for job ",
                                        id, " with another request; choose a new one"),
                           {{"request_id", asked.request_id()}, {"existing_job", id}});
        }
        ASSIGN_OR_RETURN(Row row, Read(id));
        return Created{.job = std::move(row.job), .is_new = false};
      }
    }
    ASSIGN_OR_RETURN(Statement queued,
                     database_.Prepare("SELECT count(*) FROM jobs WHERE state = ?"));
    RETURN_IF_ERROR(queued.Bind(v1::JOB_STATE_QUEUED).Step().status());
    if (queued.Int(0) >= queue_limit) {
      return WithRetry(MakeError(absl::StatusCode::kResourceExhausted, "QUEUE_FULL",
                                 absl::StrCat(queued.Int(0),
                                              " jobs are queued, as many as this "
                                              "server takes; try again later"),
                                 {{"limit", absl::StrCat(queue_limit)}}),
                       absl::Seconds(30));
    }
    ASSIGN_OR_RETURN(Statement busy, database_.Prepare("SELECT id FROM jobs WHERE state < 5 AND "
                                                       "destination_key = ?"));
    ASSIGN_OR_RETURN(const bool is_busy, busy.Bind(request.destination_key).Step());
    if (is_busy) {
      return MakeError(absl::StatusCode::kAlreadyExists, "DESTINATION_BUSY",
                       absl::StrCat("job ", busy.Bytes(0), " writes ", asked.destination_uri(),
                                    "; wait for it or cancel it"),
                       {{"existing_job", busy.Bytes(0)}, {"uri", asked.destination_uri()}});
    }

    Row row{.job = asked};
    row.job.set_state(v1::JOB_STATE_QUEUED);
    SetTime(absl::Now(), row.job.mutable_create_time());
    v1::Job spec = asked;
    *spec.mutable_create_time() = row.job.create_time();
    ASSIGN_OR_RETURN(
        Statement insert,
        database_.Prepare("INSERT INTO jobs (id, request_id, request_digest, destination_key, "
                          "priority, state, spec, status) VALUES (?, ?, ?, ?, ?, ?, ?, x'')"));
    insert.Bind(asked.id());
    asked.request_id().empty() ? insert.BindNull() : insert.Bind(asked.request_id());
    insert.Bind(request.request_digest)
        .Bind(request.destination_key)
        .Bind(asked.priority())
        .Bind(v1::JOB_STATE_QUEUED)
        .BindBlob(spec.SerializeAsString());
    RETURN_IF_ERROR(insert.Run());
    row.number = database_.last_row();
    for (const auto& [key, value] : asked.labels()) {
      ASSIGN_OR_RETURN(Statement label,
                       database_.Prepare("INSERT INTO labels (job, key, value) VALUES (?, ?, ?)"));
      RETURN_IF_ERROR(label.Bind(row.number).Bind(key).Bind(value).Run());
    }
    RETURN_IF_ERROR(AppendStateChange(row));
    RETURN_IF_ERROR(Write(row));
    RETURN_IF_ERROR(transaction.Commit());
    return Created{.job = std::move(row.job), .is_new = true};
  }

  absl::StatusOr<v1::Job> Get(absl::string_view id) override {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Row row, Read(id));
    return std::move(row.job);
  }

  absl::StatusOr<JobPage> List(const v1::JobFilter& filter, int limit, int64_t before) override {
    std::string sql = "SELECT number, spec, status FROM jobs WHERE (? = 0 OR number < ?)";
    if (!filter.states().empty()) {
      absl::StrAppend(&sql, " AND state IN (", absl::StrJoin(filter.states(), ", "), ")");
    }
    for (int i = 0; i < filter.labels_size(); ++i) {
      absl::StrAppend(&sql,
                      " AND EXISTS (SELECT 1 FROM labels WHERE job = number AND key = ? AND "
                      "value = ?)");
    }
    // One more than asked for tells whether there is a next page.
    absl::StrAppend(&sql, " ORDER BY number DESC LIMIT ?");
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Statement select, database_.Prepare(sql));
    select.Bind(before).Bind(before);
    for (const auto& [key, value] : filter.labels()) select.Bind(key).Bind(value);
    select.Bind(int64_t{limit} + 1);
    JobPage page;
    int64_t last = 0;
    while (true) {
      ASSIGN_OR_RETURN(const bool found, select.Step());
      if (!found) return page;
      if (static_cast<int>(page.jobs.size()) == limit) {
        page.next = last;
        return page;
      }
      last = select.Int(0);
      ASSIGN_OR_RETURN(v1::Job job, Parse(select.Bytes(1), select.Bytes(2)));
      job.clear_recipe();
      if (job.has_output()) job.mutable_output()->clear_manifest_json();
      page.jobs.push_back(std::move(job));
    }
  }

  absl::Status Delete(absl::string_view id) override {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database_));
    ASSIGN_OR_RETURN(const Row row, Read(id));
    if (!IsFinal(row.job.state())) {
      return MakeError(
          absl::StatusCode::kFailedPrecondition, "JOB_NOT_FINAL",
          absl::StrCat("job ", id, " is ", v1::JobState_Name(row.job.state()), "; cancel it first"),
          {{"job_id", std::string(id)}});
    }
    ASSIGN_OR_RETURN(Statement remove, database_.Prepare("DELETE FROM jobs WHERE number = ?"));
    RETURN_IF_ERROR(remove.Bind(row.number).Run());
    return transaction.Commit();
  }

  absl::StatusOr<v1::Job> Transition(absl::string_view id, v1::JobState from, v1::JobState to,
                                     const JobChange& change) override {
    if (!IsAllowed(from, to)) {
      return absl::InternalError(absl::StrCat("no job goes from ", v1::JobState_Name(from), " to ",
                                              v1::JobState_Name(to)));
    }
    return Update(id, [&](Row& row) -> absl::Status {
      if (change.lease_generation) RETURN_IF_ERROR(CheckLease(row.job, *change.lease_generation));
      if (row.job.state() != from) {
        return MakeError(absl::StatusCode::kAborted, "STATE_CHANGED",
                         absl::StrCat("job ", id, " is ", v1::JobState_Name(row.job.state()),
                                      ", no longer ", v1::JobState_Name(from)),
                         {{"job_id", std::string(id)}});
      }
      row.job.set_state(to);
      row.job.clear_error();
      if (change.error) *row.job.mutable_error() = *change.error;
      if (change.output) *row.job.mutable_output() = *change.output;
      if (change.progress) *row.job.mutable_progress() = *change.progress;
      if (change.refund_attempt) row.job.set_attempt(row.job.attempt() - 1);
      if (IsFinal(to)) row.job.clear_cancel_requested();
      return AppendStateChange(row);
    });
  }

  absl::StatusOr<v1::Job> Claim(absl::string_view id, absl::Time lease_expiry) override {
    return Update(
        id,
        [&](Row& row) -> absl::Status {
          if (row.job.state() != v1::JOB_STATE_QUEUED) {
            return MakeError(absl::StatusCode::kFailedPrecondition, "STATE_CONFLICT",
                             absl::StrCat("job ", id, " is ", v1::JobState_Name(row.job.state()),
                                          ", not queued"),
                             {{"job_id", std::string(id)}});
          }
          row.job.set_state(v1::JOB_STATE_PLANNING);
          row.job.set_attempt(row.job.attempt() + 1);
          row.job.set_lease_generation(row.job.lease_generation() + 1);
          row.job.clear_error();
          row.job.clear_progress();
          return AppendStateChange(row);
        },
        lease_expiry);
  }

  absl::Status RenewLease(absl::string_view id, int64_t lease_generation, absl::Time lease_expiry,
                          const v1::Progress& progress) override {
    return Update(
               id,
               [&](Row& row) -> absl::Status {
                 RETURN_IF_ERROR(CheckLease(row.job, lease_generation));
                 *row.job.mutable_progress() = progress;
                 return absl::OkStatus();
               },
               lease_expiry)
        .status();
  }

  absl::StatusOr<v1::Job> AddWarnings(absl::string_view id, int64_t lease_generation,
                                      const std::vector<std::string>& warnings) override {
    return Update(id, [&](Row& row) -> absl::Status {
      RETURN_IF_ERROR(CheckLease(row.job, lease_generation));
      for (const std::string& warning : warnings) {
        if (row.job.warnings_size() >= kMaxWarnings) break;
        // A resumed attempt says what the first one said.
        const auto& known = row.job.warnings();
        if (std::find(known.begin(), known.end(), warning) != known.end()) continue;
        row.job.add_warnings(warning);
        v1::JobEvent event;
        event.set_warning(warning);
        RETURN_IF_ERROR(Append(row, std::move(event), absl::Now()));
      }
      return absl::OkStatus();
    });
  }

  absl::StatusOr<v1::Job> RequestCancel(absl::string_view id) override {
    return Update(id, [&](Row& row) -> absl::Status {
      if (!IsFinal(row.job.state())) row.job.set_cancel_requested(true);
      return absl::OkStatus();
    });
  }

  absl::StatusOr<std::vector<v1::JobEvent>> Events(absl::string_view id, int64_t after,
                                                   int limit) override {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Statement find, database_.Prepare("SELECT number FROM jobs WHERE id = ?"));
    ASSIGN_OR_RETURN(const bool found, find.Bind(id).Step());
    if (!found) return JobNotFound(id);
    ASSIGN_OR_RETURN(Statement select,
                     database_.Prepare("SELECT event FROM events WHERE job = ? AND sequence > ? "
                                       "ORDER BY sequence LIMIT ?"));
    select.Bind(find.Int(0)).Bind(after).Bind(limit);
    std::vector<v1::JobEvent> events;
    while (true) {
      ASSIGN_OR_RETURN(const bool more, select.Step());
      if (!more) return events;
      if (!events.emplace_back().ParseFromString(select.Bytes(0))) {
        return absl::DataLossError(absl::StrCat("job database: an event of job ", id, " is bad"));
      }
    }
  }

  absl::StatusOr<std::vector<std::string>> Queue(int limit) override {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Statement select, database_.Prepare("SELECT id FROM jobs WHERE state = 1 "
                                                         "ORDER BY priority DESC, number LIMIT ?"));
    return Ids(select.Bind(limit));
  }

  absl::StatusOr<std::vector<std::string>> Held() override {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Statement select, database_.Prepare("SELECT id FROM jobs WHERE state IN "
                                                         "(2, 3, 4) ORDER BY number"));
    return Ids(select);
  }

 private:
  static absl::Status Migrate(Database& database) {
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database));
    int64_t version = 0;
    {
      ASSIGN_OR_RETURN(Statement select, database.Prepare("PRAGMA user_version"));
      RETURN_IF_ERROR(select.Step().status());
      version = select.Int(0);
    }
    if (version > static_cast<int64_t>(kMigrations.size())) {
      return absl::FailedPreconditionError(
          absl::StrCat("the job database has version ", version, ", this pewterd knows ",
                       kMigrations.size(), "; start a newer pewterd or give another --database"));
    }
    for (size_t next = version; next < kMigrations.size(); ++next) {
      RETURN_IF_ERROR(database.Execute(kMigrations[next]));
    }
    RETURN_IF_ERROR(database.Execute(absl::StrCat("PRAGMA user_version = ", kMigrations.size())));
    return transaction.Commit();
  }

  static absl::StatusOr<v1::Job> Parse(const std::string& spec, const std::string& status) {
    v1::Job job;
    if (!job.ParseFromString(absl::StrCat(spec, status))) {
      return absl::DataLossError("job database: a job's row is bad");
    }
    return job;
  }

  static absl::StatusOr<std::vector<std::string>> Ids(Statement& select) {
    std::vector<std::string> ids;
    while (true) {
      ASSIGN_OR_RETURN(const bool found, select.Step());
      if (!found) return ids;
      ids.push_back(select.Bytes(0));
    }
  }

  absl::StatusOr<Row> Read(absl::string_view id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    ASSIGN_OR_RETURN(Statement select,
                     database_.Prepare("SELECT number, spec, status FROM jobs WHERE id = ?"));
    ASSIGN_OR_RETURN(const bool found, select.Bind(id).Step());
    if (!found) return JobNotFound(id);
    Row row{.number = select.Int(0)};
    ASSIGN_OR_RETURN(row.job, Parse(select.Bytes(1), select.Bytes(2)));
    return row;
  }

  absl::Status Write(const Row& row) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    ASSIGN_OR_RETURN(Statement update,
                     database_.Prepare("UPDATE jobs SET state = ?, status = ? WHERE number = ?"));
    return update.Bind(row.job.state()).BindBlob(StatusBytes(row.job)).Bind(row.number).Run();
  }

  // One read-change-write in a transaction of its own.
  template <typename Change>
  absl::StatusOr<v1::Job> Update(absl::string_view id, const Change& change,
                                 std::optional<absl::Time> lease_expiry = std::nullopt) {
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database_));
    ASSIGN_OR_RETURN(Row row, Read(id));
    RETURN_IF_ERROR(change(row));
    RETURN_IF_ERROR(Write(row));
    if (lease_expiry) {
      ASSIGN_OR_RETURN(Statement lease,
                       database_.Prepare("UPDATE jobs SET lease_expiry_ms = ? WHERE number = ?"));
      RETURN_IF_ERROR(lease.Bind(absl::ToUnixMillis(*lease_expiry)).Bind(row.number).Run());
    }
    RETURN_IF_ERROR(transaction.Commit());
    return std::move(row.job);
  }

  // Numbers the event and keeps it; row.job must be written afterwards.
  absl::Status Append(Row& row, v1::JobEvent event, absl::Time time)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    row.job.set_sequence(row.job.sequence() + 1);
    event.set_sequence(row.job.sequence());
    SetTime(time, event.mutable_time());
    ASSIGN_OR_RETURN(
        Statement insert,
        database_.Prepare("INSERT INTO events (job, sequence, event) VALUES (?, ?, ?)"));
    return insert.Bind(row.number).Bind(event.sequence()).BindBlob(event.SerializeAsString()).Run();
  }

  absl::Status AppendStateChange(Row& row) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const absl::Time now = absl::Now();
    const v1::JobState state = row.job.state();
    SetTime(now, row.job.mutable_update_time());
    if (state == v1::JOB_STATE_PLANNING && !row.job.has_start_time()) {
      SetTime(now, row.job.mutable_start_time());
    }
    if (IsFinal(state)) SetTime(now, row.job.mutable_end_time());
    v1::JobEvent event;
    v1::JobStateChange* change = event.mutable_state_change();
    change->set_state(state);
    change->set_attempt(row.job.attempt());
    if (row.job.has_error()) *change->mutable_error() = row.job.error();
    if (row.job.has_output()) *change->mutable_output() = row.job.output();
    return Append(row, std::move(event), now);
  }

  absl::Mutex mutex_;
  Database database_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<JobStore>> OpenJobStore(absl::string_view database) {
  if (!absl::ConsumePrefix(&database, "sqlite:") || database.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("database \"", database, "\": write sqlite:PATH"));
  }
  return SqliteJobStore::Open(std::string(database));
}

}  // namespace pewter::server
