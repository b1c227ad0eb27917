// The little of SQLite's C interface that the job store needs, with owned handles and Status.
//
// A Database is one connection; the caller serialises access. Who changes it does so in a
// Transaction of the one Writer, which may be used from any thread. Errors of SQLite are
// Unavailable (DATABASE_UNAVAILABLE), with its message; a constraint that a statement breaks is
// AlreadyExists.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"

struct sqlite3;
struct sqlite3_stmt;

namespace pewter::server {

class Database;

// A prepared statement. Values are bound in order; Step gives true for each row.
class Statement {
 public:
  Statement& Bind(int64_t value);
  Statement& Bind(absl::string_view text);
  Statement& BindBlob(absl::string_view bytes);
  Statement& BindNull();

  absl::StatusOr<bool> Step();
  absl::Status Run();  // Step for statements without rows
  int64_t Int(int column) const;
  std::string Bytes(int column) const;  // text or blob

 private:
  friend class Database;
  struct Finalizer {
    void operator()(sqlite3_stmt* statement) const;
  };
  Statement(sqlite3* database, sqlite3_stmt* statement)
      : database_(database), statement_(statement) {}

  sqlite3* database_;
  std::unique_ptr<sqlite3_stmt, Finalizer> statement_;
  int bound_ = 0;
  int bind_error_ = 0;
};

class Database {
 public:
  // Makes the file when it is not there.
  static absl::StatusOr<Database> Open(const std::string& path);

  absl::StatusOr<Statement> Prepare(absl::string_view sql);
  absl::Status Execute(const std::string& sql);  // any number of statements, no rows
  int64_t last_row() const;
  int64_t changed_rows() const;
  bool in_transaction() const;

 private:
  struct Closer {
    void operator()(sqlite3* database) const;
  };
  explicit Database(sqlite3* database) : database_(database) {}

  std::unique_ptr<sqlite3, Closer> database_;
};

// The connection of all who change the database, for who has a Transaction. Changes that come at
// the same time are committed together, with one fsync for all of them; each is undone by itself
// when it fails, and other connections see none before all are durable. Thread-safe.
class Writer : public Database {
 public:
  explicit Writer(Database database) : Database(std::move(database)) {}

 private:
  friend class Transaction;
  struct Group {
    bool done = false;
    absl::Status status;
  };
  absl::Status Begin() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  // Ends one change; the last for whom nobody waits commits them all.
  void End() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::atomic<int> waiting_ = 0;  // for mutex_, to make a change
  absl::Mutex mutex_;
  absl::CondVar committed_;
  std::shared_ptr<Group> group_ ABSL_GUARDED_BY(mutex_);  // null: no transaction is open
};

// The changes of one thread, which has the connection until their end. Undone unless committed.
class Transaction {
 public:
  static absl::StatusOr<Transaction> Begin(Writer& writer);
  Transaction(Transaction&& other) noexcept : writer_(std::exchange(other.writer_, nullptr)) {}
  Transaction& operator=(Transaction&&) = delete;
  ~Transaction();
  // Returns when they are durable.
  absl::Status Commit();

 private:
  explicit Transaction(Writer* writer) : writer_(writer) {}
  Writer* writer_;
};

}  // namespace pewter::server
