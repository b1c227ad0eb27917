#include <sqlite3.h>

#include <atomic>

#include "absl/time/clock.h"
#include "tests/contract/job_store_contract.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::pewter::testing::TempFolder;

class SqliteFixture final : public JobStoreFixture {
 public:
  SqliteFixture() { Reopen(); }
  JobStore& store() override { return *store_; }
  void Reopen() override {
    store_.reset();
    auto opened = OpenJobStore(absl::StrCat("sqlite:", folder_ / "jobs.db"));
    ASSERT_THAT(opened, IsOk());
    store_ = *std::move(opened);
  }

 private:
  TempFolder folder_;
  std::unique_ptr<JobStore> store_;
};

std::unique_ptr<JobStoreFixture> MakeSqliteFixture() { return std::make_unique<SqliteFixture>(); }

INSTANTIATE_TEST_SUITE_P(Sqlite, JobStoreContract, ::testing::Values(&MakeSqliteFixture));

TEST(OpenJobStore, RefusesOtherDatabases) {
  for (const char* name : {"", "sqlite:", "jobs.db", "postgresql://localhost/jobs"}) {
    EXPECT_THAT(OpenJobStore(name),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sqlite:PATH")))
        << name;
  }
}

TEST(OpenJobStore, NamesTheFileThatCannotBeOpened) {
  const TempFolder folder;
  EXPECT_THAT(OpenJobStore(absl::StrCat("sqlite:", folder.path(), "/none/jobs.db")),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("none/jobs.db")));
  EXPECT_THAT(OpenJobStore(absl::StrCat("sqlite:", folder.Write("text", std::string(5000, 'x')))),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("not a database")));
}

TEST(OpenJobStore, RefusesAFileOfANewerVersion) {
  const TempFolder folder;
  const std::string path = folder / "jobs.db";
  ASSERT_THAT(OpenJobStore(absl::StrCat("sqlite:", path)), IsOk());
  sqlite3* database = nullptr;
  ASSERT_EQ(sqlite3_open(path.c_str(), &database), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(database, "PRAGMA user_version = 99", nullptr, nullptr, nullptr),
            SQLITE_OK);
  sqlite3_close(database);
  EXPECT_THAT(OpenJobStore(absl::StrCat("sqlite:", path)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("99")));
}

TEST(OpenJobStore, IsDurable) {
  const TempFolder folder;
  const std::string path = folder / "jobs.db";
  ASSERT_THAT(OpenJobStore(absl::StrCat("sqlite:", path)), IsOk());
  sqlite3* database = nullptr;
  ASSERT_EQ(sqlite3_open(path.c_str(), &database), SQLITE_OK);
  std::string mode;
  sqlite3_exec(
      database, "PRAGMA journal_mode",
      [](void* out, int, char** values, char**) {
        *static_cast<std::string*>(out) = values[0];
        return 0;
      },
      &mode, nullptr);
  sqlite3_close(database);
  EXPECT_EQ(mode, "wal");
}

}  // namespace
}  // namespace pewter::server
