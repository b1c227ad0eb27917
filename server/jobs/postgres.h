// The little of libpq that the job store needs, with owned handles and Status.
//
// A PostgresConnection is used by one thread at a time. Errors of the server and of the network are
// Unavailable (DATABASE_UNAVAILABLE), with PostgreSQL's message, which holds no password; a
// constraint that a statement breaks is AlreadyExists. Nothing waits for longer than a few seconds:
// a server that does not answer is one that is not there.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

struct pg_conn;
struct pg_result;

namespace pewter::server {

// The values of $1, $2, ...
class Parameters {
 public:
  Parameters& Int(int64_t value);
  Parameters& Text(absl::string_view text);  // valid in UTF-8, without NUL
  Parameters& Bytes(absl::string_view bytes);
  Parameters& Null();

 private:
  friend class PostgresConnection;
  struct Value {
    unsigned type = 0;
    bool null = false;
    std::string bytes;
  };
  std::vector<Value> values_;
};

// What a statement returned. Columns are BIGINT, TEXT or BYTEA.
class Rows {
 public:
  int size() const;
  int64_t Int(int row, int column) const;
  std::string Bytes(int row, int column) const;  // text or bytes

 private:
  friend class PostgresConnection;
  struct Clearer {
    void operator()(pg_result* result) const;
  };
  explicit Rows(pg_result* result) : result_(result) {}

  std::unique_ptr<pg_result, Clearer> result_;
};

class PostgresConnection {
 public:
  // InvalidArgument when `url` cannot be read; it is not repeated in the message.
  static absl::StatusOr<std::unique_ptr<PostgresConnection>> Open(const std::string& url);

  absl::StatusOr<Rows> Query(const std::string& sql, const Parameters& parameters = {});
  // Any number of statements, no rows.
  absl::Status Execute(const std::string& sql);
  // False once the server has closed it or was silent for too long: good for nothing more.
  bool alive() const;

  // Calls back with the payload of every notification that has come; waits for the first until
  // `wake_fd` is readable or `timeout`. Not OK when the connection is lost.
  absl::Status ReadNotices(int wake_fd, absl::Duration timeout,
                           const std::function<void(absl::string_view)>& on_notice);

 private:
  struct Closer {
    void operator()(pg_conn* connection) const;
  };
  explicit PostgresConnection(pg_conn* connection) : connection_(connection) {}
  // Of the statement that was sent: the last result, or the first error.
  absl::StatusOr<Rows> Await();

  std::unique_ptr<pg_conn, Closer> connection_;
  bool silent_ = false;
};

// False for a URL that cannot be read.
bool PostgresUrlHoldsPassword(const std::string& url);

// A few connections to one database, made when they are needed. Thread-safe. After a connection
// could not be made, further ones fail at once for a while, so that callers do not queue up behind
// a server that is not there.
class PostgresPool {
 public:
  explicit PostgresPool(std::string url) : url_(std::move(url)) {}

  // A connection for one use; back to the pool when it goes, unless it is dead.
  class Lease {
   public:
    Lease(PostgresPool* pool, std::unique_ptr<PostgresConnection> connection)
        : pool_(pool), connection_(std::move(connection)) {}
    Lease(Lease&&) noexcept = default;
    Lease& operator=(Lease&&) = delete;
    ~Lease();
    PostgresConnection* operator->() const { return connection_.get(); }

   private:
    PostgresPool* pool_;
    std::unique_ptr<PostgresConnection> connection_;
  };

  // One on which `first`, which may be done twice, was just done: a connection that was lost while
  // nobody used it (a restart of the server) is replaced.
  absl::StatusOr<Lease> Get(const std::function<absl::Status(PostgresConnection&)>& first);

  const std::string& url() const { return url_; }

 private:
  void Return(std::unique_ptr<PostgresConnection> connection);

  const std::string url_;
  absl::Mutex mutex_;
  int used_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<std::unique_ptr<PostgresConnection>> idle_ ABSL_GUARDED_BY(mutex_);
  absl::Status refused_ ABSL_GUARDED_BY(mutex_);  // of the last connection that could not be made
  absl::Time refused_until_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

// Rolls back unless committed.
class PostgresTransaction {
 public:
  static absl::StatusOr<PostgresTransaction> Begin(PostgresPool& pool);
  PostgresTransaction(PostgresTransaction&& other) noexcept
      : lease_(std::move(other.lease_)), open_(std::exchange(other.open_, false)) {}
  PostgresTransaction& operator=(PostgresTransaction&&) = delete;
  ~PostgresTransaction();

  absl::StatusOr<Rows> Query(const std::string& sql, const Parameters& parameters = {}) {
    return lease_->Query(sql, parameters);
  }
  absl::Status Run(const std::string& sql, const Parameters& parameters = {}) {
    return lease_->Query(sql, parameters).status();
  }
  absl::Status Execute(const std::string& sql) { return lease_->Execute(sql); }
  // Unavailable when the answer was lost: the changes are made or not.
  absl::Status Commit();

 private:
  explicit PostgresTransaction(PostgresPool::Lease lease) : lease_(std::move(lease)) {}
  PostgresPool::Lease lease_;
  bool open_ = true;
};

}  // namespace pewter::server
