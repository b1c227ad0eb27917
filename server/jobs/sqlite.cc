#include "server/jobs/sqlite.h"

#include <sqlite3.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "server/jobs/job_rules.h"

namespace pewter::server {
namespace {

absl::Status ToStatus(sqlite3* database, int code) {
  const char* const message = database != nullptr ? sqlite3_errmsg(database) : sqlite3_errstr(code);
  if ((code & 0xFF) == SQLITE_CONSTRAINT) {
    return absl::AlreadyExistsError(absl::StrCat("job database: ", message));
  }
  return DatabaseUnavailable(message);
}

}  // namespace

void Statement::Finalizer::operator()(sqlite3_stmt* statement) const {
  sqlite3_finalize(statement);
}

Statement& Statement::Bind(int64_t value) {
  bind_error_ |= sqlite3_bind_int64(statement_.get(), ++bound_, value);
  return *this;
}

Statement& Statement::Bind(absl::string_view text) {
  bind_error_ |= sqlite3_bind_text64(statement_.get(), ++bound_, text.empty() ? "" : text.data(),
                                     text.size(), SQLITE_TRANSIENT, SQLITE_UTF8);
  return *this;
}

Statement& Statement::BindBlob(absl::string_view bytes) {
  bind_error_ |= sqlite3_bind_blob64(statement_.get(), ++bound_, bytes.empty() ? "" : bytes.data(),
                                     bytes.size(), SQLITE_TRANSIENT);
  return *this;
}

Statement& Statement::BindNull() {
  bind_error_ |= sqlite3_bind_null(statement_.get(), ++bound_);
  return *this;
}

absl::StatusOr<bool> Statement::Step() {
  if (bind_error_ != SQLITE_OK) return ToStatus(nullptr, bind_error_);
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW) return true;
  if (code == SQLITE_DONE) return false;
  return ToStatus(database_, code);
}

absl::Status Statement::Run() { return Step().status(); }

int64_t Statement::Int(int column) const { return sqlite3_column_int64(statement_.get(), column); }

std::string Statement::Bytes(int column) const {
  const void* bytes = sqlite3_column_blob(statement_.get(), column);
  const int size = sqlite3_column_bytes(statement_.get(), column);
  return size > 0 ? std::string(static_cast<const char*>(bytes), size) : std::string();
}

void Database::Closer::operator()(sqlite3* database) const { sqlite3_close_v2(database); }

absl::StatusOr<Database> Database::Open(const std::string& path) {
  sqlite3* handle = nullptr;
  // FULLMUTEX: statements of those who wait for a commit are finalised in their own time.
  const int code =
      sqlite3_open_v2(path.c_str(), &handle,
                      SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_FULLMUTEX, nullptr);
  Database database(handle);
  if (code != SQLITE_OK) return Annotate(ToStatus(handle, code), path);
  // WAL: readers of other processes do not block us. FULL: what was acknowledged survives a power
  // cut.
  const absl::Status status = database.Execute(
      "PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
      "PRAGMA foreign_keys = ON;");
  if (!status.ok()) return Annotate(status, path);
  return database;
}

absl::StatusOr<Statement> Database::Prepare(absl::string_view sql) {
  sqlite3_stmt* statement = nullptr;
  const int code = sqlite3_prepare_v2(database_.get(), sql.data(), static_cast<int>(sql.size()),
                                      &statement, nullptr);
  if (code != SQLITE_OK) return ToStatus(database_.get(), code);
  return Statement(database_.get(), statement);
}

absl::Status Database::Execute(const std::string& sql) {
  const int code = sqlite3_exec(database_.get(), sql.c_str(), nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : ToStatus(database_.get(), code);
}

int64_t Database::last_row() const { return sqlite3_last_insert_rowid(database_.get()); }

int64_t Database::changed_rows() const { return sqlite3_changes64(database_.get()); }

bool Database::in_transaction() const { return sqlite3_get_autocommit(database_.get()) == 0; }

absl::Status Writer::Begin() {
  ++waiting_;
  mutex_.Lock();
  --waiting_;
  // The write lock is taken at once, so that what was read stays true until the commit.
  absl::Status status = group_ == nullptr ? Execute("BEGIN IMMEDIATE") : absl::OkStatus();
  if (status.ok()) {
    if (group_ == nullptr) group_ = std::make_shared<Group>();
    status = Execute("SAVEPOINT change");
    if (status.ok()) return status;
    End();
  }
  mutex_.Unlock();
  return status;
}

void Writer::End() {
  // Some errors end the transaction: with the changes before, which wait for its commit.
  const bool lost = !in_transaction();
  if (waiting_ > 0 && !lost) return;
  group_->status =
      lost ? DatabaseUnavailable("the transaction was rolled back") : Execute("COMMIT");
  if (in_transaction()) Execute("ROLLBACK").IgnoreError();
  group_->done = true;
  group_ = nullptr;
  committed_.SignalAll();
}

absl::StatusOr<Transaction> Transaction::Begin(Writer& writer) {
  RETURN_IF_ERROR(writer.Begin());
  return Transaction(&writer);
}

Transaction::~Transaction() {
  if (writer_ == nullptr) return;
  writer_->mutex_.AssertHeld();
  writer_->Execute("ROLLBACK TO change; RELEASE change").IgnoreError();
  writer_->End();
  writer_->mutex_.Unlock();
}

absl::Status Transaction::Commit() {
  RETURN_IF_ERROR(Reach(Failpoint::kBeforeDatabaseCommit));
  Writer& writer = *std::exchange(writer_, nullptr);
  writer.mutex_.AssertHeld();
  absl::Status status = writer.Execute("RELEASE change");
  const std::shared_ptr<Writer::Group> group = writer.group_;
  writer.End();
  while (!group->done) writer.committed_.Wait(&writer.mutex_);
  if (status.ok()) status = group->status;
  writer.mutex_.Unlock();
  return status.ok() ? Reach(Failpoint::kAfterDatabaseCommit) : status;
}

}  // namespace pewter::server
