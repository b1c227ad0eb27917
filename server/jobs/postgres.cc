#include "server/jobs/postgres.h"

#include <endian.h>
#include <libpq-fe.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "server/jobs/job_rules.h"

namespace pewter::server {
namespace {

// Of PostgreSQL's catalogue, where they never change.
constexpr Oid kInt8 = 20, kText = 25, kBytea = 17;
constexpr int kBinary = 1;

constexpr int kMaxConnections = 8;
constexpr absl::Duration kAnswerLimit = absl::Seconds(10);
constexpr absl::Duration kBusyLimit = absl::Seconds(5);
constexpr absl::Duration kRefusedFor = absl::Milliseconds(200);

// A server that pauses in the middle of a transaction must not keep its locks: the database ends it
// then. Statements end before kAnswerLimit, so that we hear why.
constexpr char kSettings[] =
    "SET idle_in_transaction_session_timeout = '5s'; SET statement_timeout = '8s';"
    "SET client_encoding = 'UTF8'; SET client_min_messages = 'warning'";

// What is not said in the URL.
constexpr const char* kDefaults[][2] = {
    {"connect_timeout", "5"},      {"keepalives_idle", "5"},
    {"keepalives_interval", "2"},  {"keepalives_count", "3"},
    {"tcp_user_timeout", "10000"}, {"fallback_application_name", "pewterd"},
};

absl::Status Unavailable(const char* message) {
  // Of several lines, the first.
  const absl::string_view text = absl::StripAsciiWhitespace(message);
  return DatabaseUnavailable(text.empty() ? "no answer" : text.substr(0, text.find('\n')));
}

absl::Status ToStatus(const PGresult* result) {
  const char* const state = PQresultErrorField(result, PG_DIAG_SQLSTATE);
  const char* const primary = PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY);
  const char* const message = primary != nullptr ? primary : PQresultErrorMessage(result);
  // Class 23: a constraint.
  if (state != nullptr && strncmp(state, "23", 2) == 0) {
    return absl::AlreadyExistsError(absl::StrCat("job database: ", message));
  }
  return Unavailable(message);
}

struct InfoFreer {
  void operator()(PQconninfoOption* options) const { PQconninfoFree(options); }
};

using ConnectionOptions = std::unique_ptr<PQconninfoOption, InfoFreer>;

// Null when it cannot be read. libpq's own message would repeat a part of it, perhaps the password.
ConnectionOptions ParseUrl(const std::string& url) {
  char* message = nullptr;
  ConnectionOptions options(PQconninfoParse(url.c_str(), &message));
  PQfreemem(message);
  return options;
}

int ToPollTimeout(absl::Duration left) {
  return static_cast<int>(std::clamp<int64_t>(absl::ToInt64Milliseconds(left) + 1, 0, 60'000));
}

}  // namespace

Parameters& Parameters::Int(int64_t value) {
  const uint64_t big = htobe64(static_cast<uint64_t>(value));
  values_.push_back(
      {.type = kInt8, .bytes = std::string(reinterpret_cast<const char*>(&big), sizeof big)});
  return *this;
}

Parameters& Parameters::Text(absl::string_view text) {
  values_.push_back({.type = kText, .bytes = std::string(text)});
  return *this;
}

Parameters& Parameters::Bytes(absl::string_view bytes) {
  values_.push_back({.type = kBytea, .bytes = std::string(bytes)});
  return *this;
}

Parameters& Parameters::Null() {
  values_.push_back({.null = true});
  return *this;
}

void Rows::Clearer::operator()(pg_result* result) const { PQclear(result); }

int Rows::size() const { return PQntuples(result_.get()); }

int64_t Rows::Int(int row, int column) const {
  uint64_t big = 0;
  if (PQgetlength(result_.get(), row, column) != sizeof big) return 0;
  memcpy(&big, PQgetvalue(result_.get(), row, column), sizeof big);
  return static_cast<int64_t>(be64toh(big));
}

std::string Rows::Bytes(int row, int column) const {
  return std::string(PQgetvalue(result_.get(), row, column),
                     PQgetlength(result_.get(), row, column));
}

void PostgresConnection::Closer::operator()(pg_conn* connection) const { PQfinish(connection); }

absl::StatusOr<std::unique_ptr<PostgresConnection>> PostgresConnection::Open(
    const std::string& url) {
  const ConnectionOptions given = ParseUrl(url);
  if (given == nullptr) {
    return absl::InvalidArgumentError(
        "the database's URL cannot be read; write postgresql://USER@HOST:PORT/DATABASE, with "
        "%HH for characters such as @ : / % in a part of it");
  }
  std::vector<const char*> keys, values;
  for (const auto& [key, value] : kDefaults) {
    keys.push_back(key);
    values.push_back(value);
  }
  for (const PQconninfoOption* option = given.get(); option->keyword != nullptr; ++option) {
    if (option->val == nullptr) continue;
    keys.push_back(option->keyword);
    values.push_back(option->val);
  }
  keys.push_back(nullptr);
  values.push_back(nullptr);
  // Of a key that comes twice the last value counts.
  std::unique_ptr<PostgresConnection> connection(
      new PostgresConnection(PQconnectdbParams(keys.data(), values.data(), /*expand_dbname=*/0)));
  if (!connection->alive()) return Unavailable(PQerrorMessage(connection->connection_.get()));
  // Warnings are not for stderr, whose lines are JSON.
  PQsetNoticeReceiver(
      connection->connection_.get(), [](void*, const PGresult*) {}, nullptr);
  PQsetnonblocking(connection->connection_.get(), 1);
  RETURN_IF_ERROR(connection->Execute(kSettings));
  return connection;
}

bool PostgresConnection::alive() const {
  return !silent_ && PQstatus(connection_.get()) == CONNECTION_OK;
}

absl::StatusOr<Rows> PostgresConnection::Query(const std::string& sql,
                                               const Parameters& parameters) {
  std::vector<Oid> types;
  std::vector<const char*> values;
  std::vector<int> sizes, formats;
  for (const Parameters::Value& value : parameters.values_) {
    types.push_back(value.type);
    values.push_back(value.null ? nullptr : value.bytes.data());
    sizes.push_back(static_cast<int>(value.bytes.size()));
    formats.push_back(kBinary);
  }
  if (PQsendQueryParams(connection_.get(), sql.c_str(), static_cast<int>(types.size()),
                        types.data(), values.data(), sizes.data(), formats.data(), kBinary) == 0) {
    return Unavailable(PQerrorMessage(connection_.get()));
  }
  return Await();
}

absl::Status PostgresConnection::Execute(const std::string& sql) {
  if (PQsendQuery(connection_.get(), sql.c_str()) == 0) {
    return Unavailable(PQerrorMessage(connection_.get()));
  }
  return Await().status();
}

absl::StatusOr<Rows> PostgresConnection::Await() {
  PGconn* const connection = connection_.get();
  const absl::Time deadline = absl::Now() + kAnswerLimit;
  Rows last(nullptr);
  absl::Status failure;
  while (true) {
    int unsent = 1;
    while ((unsent = PQflush(connection)) == 1 || PQisBusy(connection) == 1) {
      pollfd wait = {.fd = PQsocket(connection), .events = POLLIN, .revents = 0};
      if (unsent == 1) wait.events |= POLLOUT;
      const int ready = poll(&wait, 1, ToPollTimeout(deadline - absl::Now()));
      if ((ready == 0 || (ready < 0 && errno != EINTR)) && absl::Now() >= deadline) {
        silent_ = true;
        return Unavailable("the server does not answer");
      }
      if (ready > 0 && PQconsumeInput(connection) == 0) {
        silent_ = true;
        return Unavailable(PQerrorMessage(connection));
      }
    }
    if (unsent < 0) {
      silent_ = true;
      return Unavailable(PQerrorMessage(connection));
    }
    PGresult* const result = PQgetResult(connection);
    if (result == nullptr) break;
    last = Rows(result);
    const ExecStatusType status = PQresultStatus(result);
    if (status != PGRES_COMMAND_OK && status != PGRES_TUPLES_OK && failure.ok()) {
      failure = ToStatus(result);
    }
  }
  if (!failure.ok()) return failure;
  if (last.result_ == nullptr) return Unavailable(PQerrorMessage(connection));
  return last;
}

absl::Status PostgresConnection::ReadNotices(
    int wake_fd, absl::Duration timeout, const std::function<void(absl::string_view)>& on_notice) {
  PGconn* const connection = connection_.get();
  const auto tell = [&] {
    bool any = false;
    while (PGnotify* notice = PQnotifies(connection)) {
      any = true;
      on_notice(notice->extra);
      PQfreemem(notice);
    }
    return any;
  };
  if (tell()) return absl::OkStatus();
  pollfd fds[] = {{.fd = PQsocket(connection), .events = POLLIN, .revents = 0},
                  {.fd = wake_fd, .events = POLLIN, .revents = 0}};
  poll(fds, 2, ToPollTimeout(timeout));
  if (fds[0].revents != 0 && PQconsumeInput(connection) == 0) {
    return Unavailable(PQerrorMessage(connection));
  }
  tell();
  return alive() ? absl::OkStatus() : Unavailable(PQerrorMessage(connection));
}

bool PostgresUrlHoldsPassword(const std::string& url) {
  const ConnectionOptions given = ParseUrl(url);
  for (const PQconninfoOption* option = given.get();
       option != nullptr && option->keyword != nullptr; ++option) {
    if (option->val != nullptr && absl::EndsWith(option->keyword, "password")) return true;
  }
  return false;
}

PostgresPool::Lease::~Lease() {
  if (connection_ != nullptr) pool_->Return(std::move(connection_));
}

absl::StatusOr<PostgresPool::Lease> PostgresPool::Get(
    const std::function<absl::Status(PostgresConnection&)>& first) {
  while (true) {
    std::unique_ptr<PostgresConnection> connection;
    {
      absl::MutexLock lock(&mutex_);
      const auto free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return used_ < kMaxConnections;
      };
      if (!mutex_.AwaitWithTimeout(absl::Condition(&free), kBusyLimit)) {
        return Unavailable("all connections are in use");
      }
      if (idle_.empty() && absl::Now() < refused_until_) return refused_;
      ++used_;
      if (!idle_.empty()) {
        connection = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    const bool fresh = connection == nullptr;
    absl::Status status;
    if (fresh) {
      absl::StatusOr<std::unique_ptr<PostgresConnection>> opened = PostgresConnection::Open(url_);
      status = opened.status();
      if (opened.ok()) connection = *std::move(opened);
    }
    if (status.ok()) status = first(*connection);
    if (status.ok()) return Lease(this, std::move(connection));

    absl::MutexLock lock(&mutex_);
    --used_;
    if (connection != nullptr && connection->alive()) {
      idle_.push_back(std::move(connection));
      return status;
    }
    if (fresh) {
      refused_ = status;
      refused_until_ = absl::Now() + kRefusedFor;
      return status;
    }
    // The others were lost with it.
    idle_.clear();
  }
}

void PostgresPool::Return(std::unique_ptr<PostgresConnection> connection) {
  absl::MutexLock lock(&mutex_);
  --used_;
  if (connection->alive()) idle_.push_back(std::move(connection));
}

absl::StatusOr<PostgresTransaction> PostgresTransaction::Begin(PostgresPool& pool) {
  ASSIGN_OR_RETURN(PostgresPool::Lease lease, pool.Get([](PostgresConnection& connection) {
    return connection.Execute("BEGIN");
  }));
  return PostgresTransaction(std::move(lease));
}

PostgresTransaction::~PostgresTransaction() {
  if (open_ && lease_->alive()) lease_->Execute("ROLLBACK").IgnoreError();
}

absl::Status PostgresTransaction::Commit() {
  RETURN_IF_ERROR(Reach(Failpoint::kBeforeDatabaseCommit));
  open_ = false;
  RETURN_IF_ERROR(lease_->Execute("COMMIT"));
  return Reach(Failpoint::kAfterDatabaseCommit);
}

}  // namespace pewter::server
