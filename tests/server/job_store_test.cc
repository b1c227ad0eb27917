#include <sqlite3.h>

#include <atomic>

#include "absl/strings/escaping.h"
#include "absl/time/clock.h"
#include "server/jobs/job_rules.h"
#include "server/jobs/migrations.h"
#include "tests/contract/job_store_contract.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::pewter::testing::TempFolder;
using ::testing::AllOf;
using ::testing::Not;

class SqliteFixture final : public JobStoreFixture {
 public:
  SqliteFixture() { Reopen({}); }
  JobStore& store() override { return *store_; }
  void Reopen(const ProjectPolicy& projects) override {
    store_.reset();
    auto opened = OpenJobStore(absl::StrCat("sqlite:", folder_ / "jobs.db"), projects);
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
  for (const char* name : {"", "sqlite:", "jobs.db", "mysql://me:secret@localhost/jobs"}) {
    EXPECT_THAT(OpenJobStore(name),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("sqlite:PATH"), Not(HasSubstr("secret")))))
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

TEST(OpenJobStore, BringsAFileOfVersionOneUpToDate) {
  const TempFolder folder;
  const std::string path = folder / "jobs.db";
  sqlite3* database = nullptr;
  ASSERT_EQ(sqlite3_open(path.c_str(), &database), SQLITE_OK);
  // A job of an earlier pewterd that was running when it stopped.
  v1::Job status;
  status.set_state(v1::JOB_STATE_RUNNING);
  status.set_lease_generation(1);
  status.set_attempt(1);
  status.set_sequence(3);
  ASSERT_EQ(sqlite3_exec(database,
                         absl::StrCat(kSqliteMigrations[0],
                                      "INSERT INTO jobs (id, request_digest, destination_key, "
                                      "priority, state, lease_expiry_ms, spec, status) VALUES "
                                      "('a', '', '/out', 0, 3, 1, x'0A0161', x'",
                                      absl::BytesToHexString(status.SerializeAsString()),
                                      "'); PRAGMA user_version = 1")
                             .c_str(),
                         nullptr, nullptr, nullptr),
            SQLITE_OK);
  sqlite3_close(database);
  auto store = OpenJobStore(absl::StrCat("sqlite:", path));
  ASSERT_THAT(store, IsOk());
  const auto expired = (*store)->Expired(10);
  ASSERT_THAT(expired, IsOk());
  ASSERT_EQ(expired->size(), 1u);
  EXPECT_EQ((*expired)[0].id(), "a");
  LostAttempt lost{.lease_generation = 1, .only_if_expired = true, .max_attempts = 2};
  ASSERT_THAT((*store)->GiveUp("a", lost), IsOk());
  const auto claimed = (*store)->Claim("server", absl::Seconds(1));
  ASSERT_THAT(claimed, IsOk());
  ASSERT_TRUE(claimed->job);
  EXPECT_EQ(claimed->job->lease_generation(), 2);
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

TEST(JobNotice, IsReadAsItWasWritten) {
  for (const auto kind :
       {JobNotice::Kind::kEvent, JobNotice::Kind::kQueued, JobNotice::Kind::kProgress,
        JobNotice::Kind::kCancel, JobNotice::Kind::kGone}) {
    const JobNotice read =
        ParseNotice(FormatNotice({.kind = kind, .job_id = "j1 2", .sequence = 34}));
    EXPECT_EQ(read.kind, kind);
    EXPECT_EQ(read.job_id, "j1 2");
    EXPECT_EQ(read.sequence, 34);
  }
}

TEST(JobNotice, OfAnotherKindIsOneThatWasMissed) {
  for (const char* text :
       {"", "e", "e1", "e1 ", "x1 j", "e j", "e-1 j", "e99999999999999999999 j"}) {
    EXPECT_EQ(ParseNotice(text).kind, JobNotice::Kind::kMissed) << text;
  }
}

}  // namespace
}  // namespace pewter::server
