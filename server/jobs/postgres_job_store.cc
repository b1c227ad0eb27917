// Rows are locked with FOR UPDATE while a rule looks at them, so what is true for SQLite's one
// writer is true here row by row. Creating jobs takes a lock of its own: the queue's bound, request
// ids and destinations are about more than one row. Times are the database's.
#include "server/jobs/postgres_job_store.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "base/status.h"
#include "server/jobs/job_rules.h"
#include "server/jobs/job_state.h"
#include "server/jobs/migrations.h"
#include "server/jobs/postgres.h"
#include "server/jobs/ruled_job_store.h"
#include "server/log.h"
#include "server/proto_time.h"

namespace pewter::server {
namespace {

// Advisory locks, held to the end of a transaction.
constexpr char kLockMigrations[] = "SELECT pg_advisory_xact_lock(7480001)";
constexpr char kLockCreation[] = "SELECT pg_advisory_xact_lock(7480002)";
constexpr char kLockClaims[] = "SELECT pg_advisory_xact_lock(7480003)";

constexpr char kListen[] = "LISTEN pewter_jobs";
constexpr absl::Duration kListenInterval = absl::Seconds(5);
constexpr absl::Duration kReconnectInterval = absl::Seconds(1);

// What ToRow reads.
constexpr absl::string_view kRow =
    "number, spec, status, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, "
    "(lease_expiry < clock_timestamp())::int::bigint FROM pewter_jobs";

// A job that can be started. now() is the transaction's beginning: what it passes over is waiting
// for all of a transaction's statements.
constexpr absl::string_view kStartable =
    "state = 1 AND not_before <= now() AND deadline_ms > (extract(epoch FROM now()) * "
    "1000)::bigint";

class PostgresJobStore final : public RuledJobStore<PostgresJobStore> {
 public:
  PostgresJobStore(std::string url, ProjectPolicy projects)
      : projects_(std::move(projects)), pool_(std::move(url)), wake_(eventfd(0, EFD_CLOEXEC)) {}
  ~PostgresJobStore() override {
    Listen(nullptr);
    close(wake_);
  }

  absl::Status Migrate() {
    ASSIGN_OR_RETURN(PostgresTransaction transaction, PostgresTransaction::Begin(pool_));
    // Servers that start together do it one after the other.
    RETURN_IF_ERROR(transaction.Run(kLockMigrations));
    RETURN_IF_ERROR(
        transaction.Execute("CREATE TABLE IF NOT EXISTS pewter_version (version BIGINT NOT NULL)"));
    ASSIGN_OR_RETURN(const Rows found, transaction.Query("SELECT version FROM pewter_version"));
    const int64_t version = found.size() == 0 ? 0 : found.Int(0, 0);
    const int64_t known = static_cast<int64_t>(kPostgresMigrations.size());
    if (version > known) return DatabaseTooNew(version, known);
    if (version == known) return absl::OkStatus();
    for (int64_t next = version; next < known; ++next) {
      RETURN_IF_ERROR(transaction.Execute(kPostgresMigrations[next]));
    }
    RETURN_IF_ERROR(transaction.Execute(absl::StrCat(
        "DELETE FROM pewter_version; INSERT INTO pewter_version VALUES (", known, ")")));
    return transaction.Commit();
  }

  absl::StatusOr<Created> Create(const NewJob& request, int64_t queue_limit) override {
    const v1::Job& asked = request.job;
    ASSIGN_OR_RETURN(PostgresTransaction transaction, PostgresTransaction::Begin(pool_));
    RETURN_IF_ERROR(transaction.Run(kLockCreation));
    if (!asked.request_id().empty()) {
      ASSIGN_OR_RETURN(
          const Rows same,
          transaction.Query(
              "SELECT id, request_digest, spec, status FROM pewter_jobs WHERE request_id = $1",
              Parameters().Text(asked.request_id())));
      if (same.size() != 0) {
        if (same.Bytes(0, 1) != request.request_digest) {
          return RequestIdReused(asked.request_id(), same.Bytes(0, 0));
        }
        ASSIGN_OR_RETURN(v1::Job job, ParseJob(same.Bytes(0, 2), same.Bytes(0, 3)));
        return Created{.job = std::move(job), .is_new = false};
      }
    }
    const std::string destination = Sha256::Of(request.destination_key);
    ASSIGN_OR_RETURN(const Rows seen,
                     transaction.Query("SELECT count(*), count(*) FILTER (WHERE project = $1), "
                                       "(extract(epoch FROM clock_timestamp()) * "
                                       "1000000)::bigint FROM pewter_jobs WHERE state = 1",
                                       Parameters().Text(asked.project())));
    RETURN_IF_ERROR(
        CheckQueue(asked.project(), seen.Int(0, 0), queue_limit, seen.Int(0, 1), projects_));
    ASSIGN_OR_RETURN(const Rows busy, transaction.Query("SELECT id FROM pewter_jobs WHERE state < "
                                                        "5 AND destination_key = $1",
                                                        Parameters().Text(destination)));
    if (busy.size() != 0) return DestinationBusy(busy.Bytes(0, 0), asked.destination_uri());

    JobRow row{.job = asked, .now = absl::FromUnixMicros(seen.Int(0, 2))};
    Enqueue(row);
    Parameters values;
    values.Text(asked.id());
    asked.request_id().empty() ? values.Null() : values.Text(asked.request_id());
    values.Text(request.request_digest)
        .Text(destination)
        .Int(asked.priority())
        .Text(asked.project())
        .Int(QueueRank(row.job))
        .Int(absl::ToUnixMillis(row.now))
        .Int(row.job.state())
        .Bytes(SpecBytes(row.job));
    ASSIGN_OR_RETURN(
        const Rows inserted,
        transaction.Query("INSERT INTO pewter_jobs (id, request_id, request_digest, "
                          "destination_key, priority, project, queue_rank, created_ms, state, "
                          "spec, status) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, '') "
                          "RETURNING number",
                          values));
    row.number = inserted.Int(0, 0);
    for (const auto& [key, value] : asked.labels()) {
      RETURN_IF_ERROR(
          transaction.Run("INSERT INTO pewter_labels (job, key, value) VALUES ($1, $2, $3)",
                          Parameters().Int(row.number).Bytes(key).Bytes(value)));
    }
    RETURN_IF_ERROR(Write(transaction, row));
    RETURN_IF_ERROR(transaction.Commit());
    return Created{.job = std::move(row.job), .is_new = true};
  }

  absl::StatusOr<v1::Job> Get(absl::string_view id) override {
    RETURN_IF_ERROR(CheckId(id));
    ASSIGN_OR_RETURN(const Rows rows, Query("SELECT spec, status FROM pewter_jobs WHERE id = $1",
                                            Parameters().Text(id)));
    if (rows.size() == 0) return JobNotFound(id);
    return ParseJob(rows.Bytes(0, 0), rows.Bytes(0, 1));
  }

  absl::StatusOr<JobPage> List(const v1::JobFilter& filter, int limit, int64_t before) override {
    std::string sql = "SELECT number, spec, status FROM pewter_jobs WHERE ($1 = 0 OR number < $1)";
    Parameters values;
    values.Int(before);
    int last = 1;
    if (!filter.states().empty()) {
      absl::StrAppend(&sql, " AND state IN (", absl::StrJoin(filter.states(), ", "), ")");
    }
    for (const auto& [key, value] : filter.labels()) {
      absl::StrAppend(&sql,
                      " AND EXISTS (SELECT 1 FROM pewter_labels WHERE job = number AND key = $",
                      last + 1, " AND value = $", last + 2, ")");
      values.Bytes(key).Bytes(value);
      last += 2;
    }
    if (!filter.project().empty()) {
      absl::StrAppend(&sql, " AND project = $", ++last);
      values.Text(filter.project());
    }
    // One more than asked for tells whether there is a next page.
    absl::StrAppend(&sql, " ORDER BY number DESC LIMIT $", last + 1);
    values.Int(int64_t{limit} + 1);
    ASSIGN_OR_RETURN(const Rows rows, Query(sql, values));
    JobPage page;
    for (int i = 0; i < std::min(rows.size(), limit); ++i) {
      ASSIGN_OR_RETURN(v1::Job job, ParseJob(rows.Bytes(i, 1), rows.Bytes(i, 2)));
      Shorten(job);
      page.jobs.push_back(std::move(job));
    }
    if (rows.size() > limit) page.next = rows.Int(limit - 1, 0);
    return page;
  }

  absl::Status Delete(absl::string_view id) override {
    ASSIGN_OR_RETURN(PostgresTransaction transaction, PostgresTransaction::Begin(pool_));
    ASSIGN_OR_RETURN(const JobRow row, Lock(transaction, id));
    RETURN_IF_ERROR(CheckDelete(row));
    RETURN_IF_ERROR(
        transaction.Run("DELETE FROM pewter_jobs WHERE number = $1", Parameters().Int(row.number)));
    RETURN_IF_ERROR(Notify(
        transaction,
        {.kind = JobNotice::Kind::kGone, .job_id = row.job.id(), .sequence = row.job.sequence()}));
    return transaction.Commit();
  }

  absl::StatusOr<Claimed> Claim(absl::string_view server, absl::Duration lease) override {
    ASSIGN_OR_RETURN(PostgresTransaction transaction, PostgresTransaction::Begin(pool_));
    // Where projects may run only so many, one claim after the other counts them. Else servers that
    // claim at the same time pass over each other's rows.
    if (projects_.LimitsRunning()) RETURN_IF_ERROR(transaction.Run(kLockClaims));
    ASSIGN_OR_RETURN(const std::vector<std::string> projects, ProjectsToStart(transaction));
    std::optional<Rows> rows;
    for (const std::string& project : projects) {
      ASSIGN_OR_RETURN(rows,
                       transaction.Query(absl::StrCat("SELECT ", kRow, " WHERE ", kStartable,
                                                      " AND project = $1 ORDER BY queue_rank DESC, "
                                                      "number LIMIT 1 FOR UPDATE SKIP LOCKED"),
                                         Parameters().Text(project)));
      if (rows->size() != 0) break;
    }
    if (!rows || rows->size() == 0) {
      ASSIGN_OR_RETURN(
          const Rows waiting,
          transaction.Query("SELECT count(*), coalesce((extract(epoch FROM min(not_before) - "
                            "clock_timestamp()) * 1000000)::bigint, 0) FROM pewter_jobs WHERE "
                            "state = 1 AND not_before > now()"));
      if (waiting.Int(0, 0) == 0) return Claimed{};
      return Claimed{.next = std::max(absl::Microseconds(waiting.Int(0, 1)), absl::ZeroDuration())};
    }
    ASSIGN_OR_RETURN(JobRow row, ToRow(*rows));
    RETURN_IF_ERROR(server::Claim(row, server, lease));
    RETURN_IF_ERROR(Write(transaction, row));
    RETURN_IF_ERROR(transaction.Commit());
    return Claimed{.job = std::move(row.job)};
  }

  absl::StatusOr<std::vector<v1::JobEvent>> Events(absl::string_view id, int64_t after,
                                                   int limit) override {
    RETURN_IF_ERROR(CheckId(id));
    // A job without such events is one row without an event.
    ASSIGN_OR_RETURN(const Rows rows,
                     Query("SELECT coalesce(sequence, 0), coalesce(event, '') FROM pewter_jobs "
                           "LEFT JOIN pewter_events ON job = number AND sequence > $2 WHERE id = "
                           "$1 ORDER BY sequence LIMIT $3",
                           Parameters().Text(id).Int(after).Int(limit)));
    if (rows.size() == 0) return JobNotFound(id);
    std::vector<v1::JobEvent> events;
    for (int i = 0; i < rows.size() && rows.Int(i, 0) != 0; ++i) {
      ASSIGN_OR_RETURN(v1::JobEvent event, ParseEvent(rows.Bytes(i, 1)));
      events.push_back(std::move(event));
    }
    return events;
  }

  absl::StatusOr<std::vector<v1::Job>> Held(absl::string_view server) override {
    return Jobs(
        "SELECT spec, status FROM pewter_jobs WHERE state IN (2, 3, 4) AND server = $1 "
        "ORDER BY number",
        Parameters().Text(server));
  }

  absl::StatusOr<std::vector<v1::Job>> Expired(int limit) override {
    return Jobs(
        "SELECT spec, status FROM pewter_jobs WHERE state IN (2, 3, 4) AND lease_expiry < "
        "clock_timestamp() ORDER BY lease_expiry LIMIT $1",
        Parameters().Int(limit));
  }

  absl::StatusOr<std::vector<v1::Job>> Overdue(int limit) override {
    return Jobs(
        "SELECT spec, status FROM pewter_jobs WHERE state = 1 AND deadline_ms <= (extract(epoch "
        "FROM now()) * 1000)::bigint ORDER BY deadline_ms LIMIT $1",
        Parameters().Int(limit));
  }

  absl::Status Check() override {
    ASSIGN_OR_RETURN(PostgresTransaction transaction, PostgresTransaction::Begin(pool_));
    // Writes, as a lock of a row is one, and waits for nobody.
    return transaction.Run("SELECT version FROM pewter_version FOR UPDATE SKIP LOCKED");
  }

  void Listen(std::function<void(const JobNotice&)> listener) override {
    if (listener_.joinable()) {
      const uint64_t one = 1;
      [[maybe_unused]] const ssize_t written = write(wake_, &one, sizeof one);
      listener_.join();
      uint64_t ignored;
      [[maybe_unused]] const ssize_t drained = read(wake_, &ignored, sizeof ignored);
    }
    if (listener == nullptr) return;
    listener_ = std::thread([this, told = std::move(listener)] { RunListener(told); });
  }

 private:
  friend class RuledJobStore<PostgresJobStore>;

  // One statement that only reads, and may be sent twice.
  absl::StatusOr<Rows> Query(const std::string& sql, const Parameters& parameters) {
    std::optional<Rows> rows;
    RETURN_IF_ERROR(pool_
                        .Get([&](PostgresConnection& connection) -> absl::Status {
                          ASSIGN_OR_RETURN(rows, connection.Query(sql, parameters));
                          return absl::OkStatus();
                        })
                        .status());
    return *std::move(rows);
  }

  absl::StatusOr<std::vector<v1::Job>> Jobs(const std::string& sql, const Parameters& parameters) {
    ASSIGN_OR_RETURN(const Rows rows, Query(sql, parameters));
    std::vector<v1::Job> jobs;
    for (int i = 0; i < rows.size(); ++i) {
      ASSIGN_OR_RETURN(v1::Job job, ParseJob(rows.Bytes(i, 0), rows.Bytes(i, 1)));
      jobs.push_back(std::move(job));
    }
    return jobs;
  }

  absl::StatusOr<std::vector<std::string>> ProjectsToStart(PostgresTransaction& transaction) {
    ASSIGN_OR_RETURN(const Rows now,
                     transaction.Query("SELECT (extract(epoch FROM now()) * 1000)::bigint"));
    ASSIGN_OR_RETURN(const Rows found,
                     transaction.Query(ProjectQueuesSql("pewter_jobs", kStartable)));
    std::vector<ProjectQueue> queues;
    for (int i = 0; i < found.size(); ++i) {
      queues.push_back({.project = found.Bytes(i, 0),
                        .priority = found.Int(i, 1),
                        .created = absl::FromUnixMillis(found.Int(i, 2)),
                        .running = found.Int(i, 3),
                        .last_claim = absl::FromUnixMillis(found.Int(i, 4))});
    }
    return projects_.InOrder(std::move(queues), absl::FromUnixMillis(now.Int(0, 0)));
  }

  // The database's texts hold no NUL, and ids of jobs neither.
  static absl::Status CheckId(absl::string_view id) {
    return id.find('\0') == absl::string_view::npos ? absl::OkStatus() : JobNotFound(id);
  }

  // The first row of kRow.
  static absl::StatusOr<JobRow> ToRow(const Rows& rows) {
    JobRow row{.number = rows.Int(0, 0), .now = absl::FromUnixMicros(rows.Int(0, 3))};
    row.lease_expired = rows.Int(0, 4) != 0;
    ASSIGN_OR_RETURN(row.job, ParseJob(rows.Bytes(0, 1), rows.Bytes(0, 2)));
    return row;
  }

  // The row is ours until the end of the transaction.
  static absl::StatusOr<JobRow> Lock(PostgresTransaction& transaction, absl::string_view id) {
    RETURN_IF_ERROR(CheckId(id));
    ASSIGN_OR_RETURN(const Rows rows,
                     transaction.Query(absl::StrCat("SELECT ", kRow, " WHERE id = $1 FOR UPDATE"),
                                       Parameters().Text(id)));
    if (rows.size() == 0) return JobNotFound(id);
    return ToRow(rows);
  }

  static absl::Status Write(PostgresTransaction& transaction, const JobRow& row) {
    Parameters values;
    values.Int(row.job.state()).Bytes(StatusBytes(row.job)).Text(row.job.server());
    for (const std::optional<absl::Duration>& after : {row.lease, row.waits}) {
      after ? values.Int(absl::ToInt64Microseconds(*after)) : values.Null();
    }
    RETURN_IF_ERROR(transaction.Run(
        "UPDATE pewter_jobs SET state = $1, status = $2, server = $3, lease_expiry = "
        "coalesce(clock_timestamp() + $4::bigint * interval '1 microsecond', lease_expiry), "
        "not_before = coalesce(clock_timestamp() + $5::bigint * interval '1 microsecond', "
        "not_before), claimed_ms = $6, deadline_ms = $7 WHERE number = $8",
        values.Int(absl::ToUnixMillis(ToTime(row.job.attempt_time())))
            .Int(absl::ToUnixMillis(DeadlineOf(row.job).time))
            .Int(row.number)));
    for (const v1::JobEvent& event : row.events) {
      RETURN_IF_ERROR(transaction.Run(
          "INSERT INTO pewter_events (job, sequence, event) VALUES ($1, $2, $3)",
          Parameters().Int(row.number).Int(event.sequence()).Bytes(event.SerializeAsString())));
    }
    return Notify(transaction, NoticeOf(row));
  }

  // Sent when the transaction is committed.
  static absl::Status Notify(PostgresTransaction& transaction, const JobNotice& notice) {
    return transaction.Run("SELECT pg_notify('pewter_jobs', $1)",
                           Parameters().Text(FormatNotice(notice)));
  }

  // One read-change-write in a transaction of its own.
  template <typename Rule>
  absl::StatusOr<v1::Job> Update(absl::string_view id, const Rule& rule) {
    ASSIGN_OR_RETURN(PostgresTransaction transaction, PostgresTransaction::Begin(pool_));
    ASSIGN_OR_RETURN(JobRow row, Lock(transaction, id));
    RETURN_IF_ERROR(rule(row));
    RETURN_IF_ERROR(Write(transaction, row));
    RETURN_IF_ERROR(transaction.Commit());
    return std::move(row.job);
  }

  void RunListener(const std::function<void(const JobNotice&)>& listener) {
    absl::Duration pause = absl::ZeroDuration();
    while (!Stopped(pause)) {
      const absl::Status lost = ListenUntilLost(listener);
      if (lost.ok()) return;
      Log(LogLevel::kWarning, "no news from the job database",
          {{"error", std::string(lost.message())}});
      pause = kReconnectInterval;
    }
  }

  // OK when it was stopped.
  absl::Status ListenUntilLost(const std::function<void(const JobNotice&)>& listener) {
    ASSIGN_OR_RETURN(const std::unique_ptr<PostgresConnection> connection,
                     PostgresConnection::Open(pool_.url()));
    RETURN_IF_ERROR(connection->Execute(kListen));
    // Whatever happened while nobody listened.
    listener({.kind = JobNotice::Kind::kMissed});
    while (!Stopped(absl::ZeroDuration())) {
      RETURN_IF_ERROR(connection->ReadNotices(
          wake_, kListenInterval, [&](absl::string_view text) { listener(ParseNotice(text)); }));
    }
    return absl::OkStatus();
  }

  bool Stopped(absl::Duration wait) const {
    pollfd fd = {.fd = wake_, .events = POLLIN, .revents = 0};
    return poll(&fd, 1, static_cast<int>(absl::ToInt64Milliseconds(wait))) > 0;
  }

  const ProjectPolicy projects_;
  PostgresPool pool_;
  const int wake_;  // readable: the listener shall end
  std::thread listener_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<JobStore>> OpenPostgresJobStore(const std::string& url,
                                                               ProjectPolicy projects) {
  auto store = std::make_unique<PostgresJobStore>(url, std::move(projects));
  RETURN_IF_ERROR(store->Migrate());
  return store;
}

}  // namespace pewter::server
