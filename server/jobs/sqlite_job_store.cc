// Changes share one connection and, when they come at the same time, one fsync. Reads have another
// connection behind a mutex: they take microseconds and see what is durable.
#include "server/jobs/sqlite_job_store.h"

#include <algorithm>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "server/jobs/job_rules.h"
#include "server/jobs/job_state.h"
#include "server/jobs/migrations.h"
#include "server/jobs/ruled_job_store.h"
#include "server/jobs/sqlite.h"
#include "server/proto_time.h"

namespace pewter::server {
namespace {

// A job that can be started at ?1.
constexpr absl::string_view kStartable = "state = 1 AND not_before_ms <= ?1 AND deadline_ms > ?1";

class SqliteJobStore final : public RuledJobStore<SqliteJobStore> {
 public:
  SqliteJobStore(Database writer, Database reader, ProjectPolicy projects)
      : projects_(std::move(projects)), database_(std::move(writer)), reader_(std::move(reader)) {}

  static absl::StatusOr<std::unique_ptr<JobStore>> Open(const std::string& path,
                                                        ProjectPolicy projects) {
    ASSIGN_OR_RETURN(Database writer, Database::Open(path));
    ASSIGN_OR_RETURN(Database reader, Database::Open(path));
    auto store =
        std::make_unique<SqliteJobStore>(std::move(writer), std::move(reader), std::move(projects));
    RETURN_IF_ERROR(Annotate(Migrate(store->database_), path));
    return store;
  }

  absl::StatusOr<Created> Create(const NewJob& request, int64_t queue_limit) override {
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
          return RequestIdReused(asked.request_id(), id);
        }
        ASSIGN_OR_RETURN(JobRow row, Read(id));
        return Created{.job = std::move(row.job), .is_new = false};
      }
    }
    ASSIGN_OR_RETURN(Statement queued,
                     database_.Prepare("SELECT count(*), count(*) FILTER (WHERE project = ?) FROM "
                                       "jobs WHERE state = 1"));
    RETURN_IF_ERROR(queued.Bind(asked.project()).Step().status());
    RETURN_IF_ERROR(
        CheckQueue(asked.project(), queued.Int(0), queue_limit, queued.Int(1), projects_));
    ASSIGN_OR_RETURN(Statement busy, database_.Prepare("SELECT id FROM jobs WHERE state < 5 AND "
                                                       "destination_key = ?"));
    ASSIGN_OR_RETURN(const bool is_busy, busy.Bind(request.destination_key).Step());
    if (is_busy) return DestinationBusy(busy.Bytes(0), asked.destination_uri());

    JobRow row{.job = asked, .now = absl::Now()};
    Enqueue(row);
    ASSIGN_OR_RETURN(
        Statement insert,
        database_.Prepare("INSERT INTO jobs (id, request_id, request_digest, destination_key, "
                          "priority, project, queue_rank, created_ms, state, spec, status) VALUES "
                          "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, x'')"));
    insert.Bind(asked.id());
    asked.request_id().empty() ? insert.BindNull() : insert.Bind(asked.request_id());
    insert.Bind(request.request_digest)
        .Bind(request.destination_key)
        .Bind(asked.priority())
        .Bind(asked.project())
        .Bind(QueueRank(row.job))
        .Bind(absl::ToUnixMillis(row.now))
        .Bind(row.job.state())
        .BindBlob(SpecBytes(row.job));
    RETURN_IF_ERROR(insert.Run());
    row.number = database_.last_row();
    for (const auto& [key, value] : asked.labels()) {
      ASSIGN_OR_RETURN(Statement label,
                       database_.Prepare("INSERT INTO labels (job, key, value) VALUES (?, ?, ?)"));
      RETURN_IF_ERROR(label.Bind(row.number).Bind(key).Bind(value).Run());
    }
    RETURN_IF_ERROR(Write(row));
    RETURN_IF_ERROR(transaction.Commit());
    return Created{.job = std::move(row.job), .is_new = true};
  }

  absl::StatusOr<v1::Job> Get(absl::string_view id) override {
    absl::MutexLock lock(&read_mutex_);
    ASSIGN_OR_RETURN(JobRow row, Read(reader_, id));
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
    if (!filter.project().empty()) absl::StrAppend(&sql, " AND project = ?");
    // One more than asked for tells whether there is a next page.
    absl::StrAppend(&sql, " ORDER BY number DESC LIMIT ?");
    absl::MutexLock lock(&read_mutex_);
    ASSIGN_OR_RETURN(Statement select, reader_.Prepare(sql));
    select.Bind(before).Bind(before);
    for (const auto& [key, value] : filter.labels()) select.Bind(key).Bind(value);
    if (!filter.project().empty()) select.Bind(filter.project());
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
      ASSIGN_OR_RETURN(v1::Job job, ParseJob(select.Bytes(1), select.Bytes(2)));
      Shorten(job);
      page.jobs.push_back(std::move(job));
    }
  }

  absl::Status Delete(absl::string_view id) override {
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database_));
    ASSIGN_OR_RETURN(const JobRow row, Read(id));
    RETURN_IF_ERROR(CheckDelete(row));
    ASSIGN_OR_RETURN(Statement remove, database_.Prepare("DELETE FROM jobs WHERE number = ?"));
    RETURN_IF_ERROR(remove.Bind(row.number).Run());
    return transaction.Commit();
  }

  absl::StatusOr<Claimed> Claim(absl::string_view server, absl::Duration lease) override {
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database_));
    const absl::Time now = absl::Now();
    ASSIGN_OR_RETURN(const std::vector<ProjectQueue> queues, Queues(now));
    std::string id;
    for (const std::string& project : projects_.InOrder(queues, now)) {
      ASSIGN_OR_RETURN(Statement next, database_.Prepare(absl::StrCat(
                                           "SELECT id FROM jobs WHERE ", kStartable,
                                           " AND project = ?2 ORDER BY queue_rank DESC, number "
                                           "LIMIT 1")));
      ASSIGN_OR_RETURN(const bool found, next.Bind(absl::ToUnixMillis(now)).Bind(project).Step());
      if (found) id = next.Bytes(0);
      break;
    }
    if (id.empty()) {
      ASSIGN_OR_RETURN(
          Statement waiting,
          database_.Prepare("SELECT coalesce(min(not_before_ms), 0) FROM jobs WHERE state = 1 AND "
                            "not_before_ms > ?"));
      RETURN_IF_ERROR(waiting.Bind(absl::ToUnixMillis(now)).Step().status());
      if (waiting.Int(0) == 0) return Claimed{};
      return Claimed{.next = absl::FromUnixMillis(waiting.Int(0)) - now};
    }
    ASSIGN_OR_RETURN(JobRow row, Read(id));
    RETURN_IF_ERROR(server::Claim(row, server, lease));
    RETURN_IF_ERROR(Write(row));
    RETURN_IF_ERROR(transaction.Commit());
    return Claimed{.job = std::move(row.job)};
  }

  absl::StatusOr<std::vector<v1::JobEvent>> Events(absl::string_view id, int64_t after,
                                                   int limit) override {
    absl::MutexLock lock(&read_mutex_);
    ASSIGN_OR_RETURN(Statement find, reader_.Prepare("SELECT number FROM jobs WHERE id = ?"));
    ASSIGN_OR_RETURN(const bool found, find.Bind(id).Step());
    if (!found) return JobNotFound(id);
    ASSIGN_OR_RETURN(Statement select,
                     reader_.Prepare("SELECT event FROM events WHERE job = ? AND sequence > ? "
                                     "ORDER BY sequence LIMIT ?"));
    select.Bind(find.Int(0)).Bind(after).Bind(limit);
    std::vector<v1::JobEvent> events;
    while (true) {
      ASSIGN_OR_RETURN(const bool more, select.Step());
      if (!more) return events;
      ASSIGN_OR_RETURN(v1::JobEvent event, ParseEvent(select.Bytes(0)));
      events.push_back(std::move(event));
    }
  }

  absl::StatusOr<std::vector<v1::Job>> Held(absl::string_view server) override {
    absl::MutexLock lock(&read_mutex_);
    ASSIGN_OR_RETURN(Statement select,
                     reader_.Prepare("SELECT spec, status FROM jobs WHERE state IN (2, 3, 4) "
                                     "AND server = ? ORDER BY number"));
    return Jobs(select.Bind(server));
  }

  absl::StatusOr<std::vector<v1::Job>> Expired(int limit) override {
    absl::MutexLock lock(&read_mutex_);
    ASSIGN_OR_RETURN(Statement select,
                     reader_.Prepare("SELECT spec, status FROM jobs WHERE state IN (2, 3, 4) "
                                     "AND lease_expiry_ms < ? ORDER BY lease_expiry_ms LIMIT ?"));
    return Jobs(select.Bind(absl::ToUnixMillis(absl::Now())).Bind(limit));
  }

  absl::StatusOr<std::vector<v1::Job>> Overdue(int limit) override {
    absl::MutexLock lock(&read_mutex_);
    ASSIGN_OR_RETURN(Statement select,
                     reader_.Prepare("SELECT spec, status FROM jobs WHERE state = 1 AND "
                                     "deadline_ms <= ? ORDER BY deadline_ms LIMIT ?"));
    return Jobs(select.Bind(absl::ToUnixMillis(absl::Now())).Bind(limit));
  }

  absl::Status Check() override { return Transaction::Begin(database_).status(); }

  void Listen(std::function<void(const JobNotice&)> listener) override {}

 private:
  friend class RuledJobStore<SqliteJobStore>;

  static absl::Status Migrate(Writer& database) {
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database));
    int64_t version = 0;
    {
      ASSIGN_OR_RETURN(Statement select, database.Prepare("PRAGMA user_version"));
      RETURN_IF_ERROR(select.Step().status());
      version = select.Int(0);
    }
    if (version > static_cast<int64_t>(kSqliteMigrations.size())) {
      return DatabaseTooNew(version, kSqliteMigrations.size());
    }
    for (size_t next = version; next < kSqliteMigrations.size(); ++next) {
      RETURN_IF_ERROR(database.Execute(kSqliteMigrations[next]));
    }
    RETURN_IF_ERROR(
        database.Execute(absl::StrCat("PRAGMA user_version = ", kSqliteMigrations.size())));
    return transaction.Commit();
  }

  static absl::StatusOr<std::vector<v1::Job>> Jobs(Statement& select) {
    std::vector<v1::Job> jobs;
    while (true) {
      ASSIGN_OR_RETURN(const bool found, select.Step());
      if (!found) return jobs;
      ASSIGN_OR_RETURN(v1::Job job, ParseJob(select.Bytes(0), select.Bytes(1)));
      jobs.push_back(std::move(job));
    }
  }

  absl::StatusOr<std::vector<ProjectQueue>> Queues(absl::Time now) {
    ASSIGN_OR_RETURN(Statement select, database_.Prepare(ProjectQueuesSql("jobs", kStartable)));
    select.Bind(absl::ToUnixMillis(now));
    std::vector<ProjectQueue> queues;
    while (true) {
      ASSIGN_OR_RETURN(const bool found, select.Step());
      if (!found) return queues;
      queues.push_back({.project = select.Bytes(0),
                        .priority = select.Int(1),
                        .created = absl::FromUnixMillis(select.Int(2)),
                        .running = select.Int(3),
                        .last_claim = absl::FromUnixMillis(select.Int(4))});
    }
  }

  static absl::StatusOr<JobRow> Read(Database& database, absl::string_view id) {
    ASSIGN_OR_RETURN(
        Statement select,
        database.Prepare("SELECT number, spec, status, lease_expiry_ms FROM jobs WHERE id = ?"));
    ASSIGN_OR_RETURN(const bool found, select.Bind(id).Step());
    if (!found) return JobNotFound(id);
    JobRow row{.number = select.Int(0), .now = absl::Now()};
    ASSIGN_OR_RETURN(row.job, ParseJob(select.Bytes(1), select.Bytes(2)));
    row.lease_expired = absl::FromUnixMillis(select.Int(3)) < row.now;
    return row;
  }

  // The rest is for who has a transaction.
  absl::StatusOr<JobRow> Read(absl::string_view id) { return Read(database_, id); }

  absl::Status Write(const JobRow& row) {
    ASSIGN_OR_RETURN(Statement update,
                     database_.Prepare("UPDATE jobs SET state = ?, status = ?, server = ?, "
                                       "lease_expiry_ms = coalesce(?, lease_expiry_ms), "
                                       "not_before_ms = coalesce(?, not_before_ms), "
                                       "claimed_ms = ?, deadline_ms = ? WHERE number = ?"));
    update.Bind(row.job.state()).BindBlob(StatusBytes(row.job)).Bind(row.job.server());
    for (const std::optional<absl::Duration>& after : {row.lease, row.waits}) {
      after ? update.Bind(absl::ToUnixMillis(row.now + *after)) : update.BindNull();
    }
    update.Bind(absl::ToUnixMillis(ToTime(row.job.attempt_time())))
        .Bind(absl::ToUnixMillis(DeadlineOf(row.job).time));
    RETURN_IF_ERROR(update.Bind(row.number).Run());
    for (const v1::JobEvent& event : row.events) {
      ASSIGN_OR_RETURN(
          Statement insert,
          database_.Prepare("INSERT INTO events (job, sequence, event) VALUES (?, ?, ?)"));
      RETURN_IF_ERROR(
          insert.Bind(row.number).Bind(event.sequence()).BindBlob(event.SerializeAsString()).Run());
    }
    return absl::OkStatus();
  }

  // One read-change-write in a transaction of its own.
  template <typename Rule>
  absl::StatusOr<v1::Job> Update(absl::string_view id, const Rule& rule) {
    ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(database_));
    ASSIGN_OR_RETURN(JobRow row, Read(id));
    RETURN_IF_ERROR(rule(row));
    RETURN_IF_ERROR(Write(row));
    RETURN_IF_ERROR(transaction.Commit());
    return std::move(row.job);
  }

  const ProjectPolicy projects_;
  Writer database_;
  absl::Mutex read_mutex_;
  Database reader_ ABSL_GUARDED_BY(read_mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<JobStore>> OpenSqliteJobStore(const std::string& path,
                                                             ProjectPolicy projects) {
  return SqliteJobStore::Open(path, std::move(projects));
}

}  // namespace pewter::server
