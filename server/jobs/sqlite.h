// The little of SQLite's C interface that the job store needs, with owned handles and Status.
//
// A Database is one connection; the caller serialises access. Errors of SQLite are Unavailable
// (DATABASE_UNAVAILABLE), with its message; a constraint that a statement breaks is AlreadyExists.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

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

 private:
  struct Closer {
    void operator()(sqlite3* database) const;
  };
  explicit Database(sqlite3* database) : database_(database) {}

  std::unique_ptr<sqlite3, Closer> database_;
};

// Rolls back unless committed.
class Transaction {
 public:
  static absl::StatusOr<Transaction> Begin(Database& database);
  Transaction(Transaction&& other) noexcept : database_(other.database_) {
    other.database_ = nullptr;
  }
  Transaction& operator=(Transaction&&) = delete;
  ~Transaction();
  absl::Status Commit();

 private:
  explicit Transaction(Database* database) : database_(database) {}
  Database* database_;
};

}  // namespace pewter::server
