#include "server/jobs/postgres_job_store.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/escaping.h"
#include "server/jobs/job_rules.h"
#include "server/jobs/migrations.h"
#include "server/jobs/postgres.h"
#include "tests/contract/job_store_contract.h"
#include "tests/server/postgres_server.h"

namespace pewter::server {
namespace {

using ::testing::AllOf;
using ::testing::Not;

class PostgresFixture final : public JobStoreFixture {
 public:
  explicit PostgresFixture(PostgresServer* server) : url_(server->MakeDatabase()) { Reopen({}); }
  JobStore& store() override { return *store_; }
  void Reopen(const ProjectPolicy& projects) override {
    store_.reset();
    auto opened = OpenJobStore(url_, projects);
    ASSERT_THAT(opened, IsOk());
    store_ = *std::move(opened);
  }

 private:
  const std::string url_;
  std::unique_ptr<JobStore> store_;
};

std::unique_ptr<JobStoreFixture> MakePostgresFixture() {
  std::string why;
  PostgresServer* const server = PostgresServer::Get(why);
  return server == nullptr ? nullptr : std::make_unique<PostgresFixture>(server);
}

INSTANTIATE_TEST_SUITE_P(Postgres, JobStoreContract, ::testing::Values(&MakePostgresFixture));

// What SQLite does not have.
class PostgresJobStoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    server_ = PostgresServer::Get(why);
    if (server_ == nullptr) GTEST_SKIP() << why;
    url_ = server_->MakeDatabase();
    store_ = Open();
  }
  std::unique_ptr<JobStore> Open() {
    auto opened = OpenJobStore(url_);
    EXPECT_THAT(opened, IsOk());
    return opened.ok() ? *std::move(opened) : nullptr;
  }
  static NewJob MakeJob(const std::string& id) {
    NewJob request;
    request.job.set_id(id);
    request.job.set_project(kDefaultProject);
    request.job.set_request_id(absl::StrCat("request ", id));
    request.destination_key = id;
    return request;
  }
  static bool Within(absl::Duration limit, const std::function<bool()>& condition) {
    for (const absl::Time end = absl::Now() + limit; absl::Now() < end;) {
      if (condition()) return true;
      absl::SleepFor(absl::Milliseconds(5));
    }
    return false;
  }

  PostgresServer* server_ = nullptr;
  std::string url_;
  std::unique_ptr<JobStore> store_;
};

// Notices of a store, as they come.
class Notices {
 public:
  explicit Notices(JobStore* store) : store_(*store) {
    store_.Listen([this](const JobNotice& notice) {
      absl::MutexLock lock(&mutex_);
      notices_.push_back(notice);
    });
  }
  ~Notices() { store_.Listen(nullptr); }
  bool Wait(JobNotice::Kind kind, const std::string& id, int64_t sequence = 0, int times = 1) {
    const auto come = [&] {
      return std::count_if(notices_.begin(), notices_.end(), [&](const JobNotice& notice) {
               return notice.kind == kind && notice.job_id == id && notice.sequence >= sequence;
             }) >= times;
    };
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(&come), absl::Seconds(30));
  }

 private:
  JobStore& store_;
  absl::Mutex mutex_;
  std::vector<JobNotice> notices_;
};

TEST_F(PostgresJobStoreTest, OtherServersHearOfEveryChange) {
  const std::unique_ptr<JobStore> other = Open();
  Notices notices(other.get());
  ASSERT_TRUE(notices.Wait(JobNotice::Kind::kMissed, ""));  // it listens
  ASSERT_THAT(store_->Create(MakeJob("a"), 10), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kQueued, "a", 1));
  ASSERT_THAT(store_->Claim("server", absl::Seconds(60)), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kEvent, "a", 2));
  ASSERT_THAT(store_->RenewLease("a", 1, absl::Seconds(60), {}), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kProgress, "a", 2));
  ASSERT_THAT(store_->AddWarnings("a", 1, {"w"}), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kEvent, "a", 3));
  ASSERT_THAT(store_->RequestCancel("a"), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kCancel, "a"));
  ASSERT_THAT(store_->GiveUp("a", {.lease_generation = 1}), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kEvent, "a", 4));
  ASSERT_THAT(store_->Delete("a"), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kGone, "a"));
  // What anybody may send there.
  server_->Run(url_, "NOTIFY pewter_jobs, 'nonsense'");
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kMissed, "", 0, 2));
}

TEST_F(PostgresJobStoreTest, GoesOnAfterARestartOfTheDatabase) {
  Notices notices(store_.get());
  ASSERT_TRUE(notices.Wait(JobNotice::Kind::kMissed, ""));
  ASSERT_THAT(store_->Create(MakeJob("a"), 10), IsOk());
  server_->Stop();
  for (int i = 0; i < 2; ++i) {
    const absl::Status gone = store_->Get("a").status();
    EXPECT_EQ(gone.code(), absl::StatusCode::kUnavailable) << gone;
    EXPECT_EQ(ReasonOf(gone), "DATABASE_UNAVAILABLE");
    EXPECT_EQ(ReasonOf(store_->Create(MakeJob("b"), 10).status()), "DATABASE_UNAVAILABLE");
    EXPECT_EQ(ReasonOf(store_->Claim("server", absl::Seconds(60)).status()),
              "DATABASE_UNAVAILABLE");
  }
  server_->Start();
  // It is there again, what was acknowledged too, and soon so are its notices.
  EXPECT_TRUE(Within(absl::Seconds(5), [&] { return store_->Get("a").ok(); }));
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kMissed, "", 0, 2));
  ASSERT_THAT(store_->Create(MakeJob("b"), 10), IsOk());
  EXPECT_TRUE(notices.Wait(JobNotice::Kind::kQueued, "b"));
}

TEST_F(PostgresJobStoreTest, ARestartBetweenTwoCallsIsNotSeen) {
  ASSERT_THAT(store_->Create(MakeJob("a"), 10), IsOk());
  server_->Stop();
  server_->Start();
  EXPECT_THAT(store_->Get("a"), IsOk());
  EXPECT_THAT(store_->Claim("server", absl::Seconds(60)), IsOk());
}

TEST_F(PostgresJobStoreTest, ServersThatStartTogetherMakeOneSchema) {
  url_ = server_->MakeDatabase();
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([this] { EXPECT_THAT(OpenJobStore(url_), IsOk()); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(server_->Run(url_, "SELECT count(*) FROM pewter_version"), "1");
}

TEST_F(PostgresJobStoreTest, BringsADatabaseOfVersionOneUpToDate) {
  url_ = server_->MakeDatabase();
  v1::Job spec, status;
  spec.set_id("a");
  status.set_state(v1::JOB_STATE_QUEUED);
  status.set_sequence(1);
  const auto hex = [](const v1::Job& job) {
    return absl::BytesToHexString(job.SerializeAsString());
  };
  server_->Run(
      url_, absl::StrCat(kPostgresMigrations[0],
                         "CREATE TABLE pewter_version (version BIGINT NOT NULL);"
                         "INSERT INTO pewter_version VALUES (1);"
                         "INSERT INTO pewter_jobs (id, request_digest, destination_key, priority, "
                         "state, spec, status) VALUES ('a', '', '/out', 3, 1, '\\x",
                         hex(spec), "', '\\x", hex(status), "')"));
  const std::unique_ptr<JobStore> store = Open();
  ASSERT_NE(store, nullptr);
  EXPECT_EQ(store->Get("a")->project(), kDefaultProject);
  // Older than what comes after it.
  NewJob later = MakeJob("b");
  later.job.set_project(kDefaultProject);
  later.job.set_priority(3);
  ASSERT_THAT(store->Create(later, 10), IsOk());
  for (const char* id : {"a", "b"}) {
    const auto claimed = store->Claim("server", absl::Seconds(60));
    ASSERT_THAT(claimed, IsOk());
    ASSERT_TRUE(claimed->job);
    EXPECT_EQ(claimed->job->id(), id);
  }
}

TEST_F(PostgresJobStoreTest, RefusesADatabaseOfANewerVersion) {
  server_->Run(url_, "UPDATE pewter_version SET version = 99");
  EXPECT_THAT(OpenJobStore(url_), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("99")));
}

TEST_F(PostgresJobStoreTest, WhoPausesInATransactionLosesIt) {
  ASSERT_THAT(store_->Create(MakeJob("a"), 10), IsOk());
  PostgresPool pool(url_);
  auto paused = PostgresTransaction::Begin(pool);
  ASSERT_THAT(paused, IsOk());
  ASSERT_THAT(paused->Run("SELECT 1 FROM pewter_jobs FOR UPDATE"), IsOk());
  // A claim passes over the row; a change of the job waits, but not for ever.
  const auto claimed = store_->Claim("server", absl::Seconds(60));
  ASSERT_THAT(claimed, IsOk());
  EXPECT_FALSE(claimed->job);
  EXPECT_THAT(store_->RequestCancel("a"), IsOk());
  EXPECT_EQ(ReasonOf(paused->Commit()), "DATABASE_UNAVAILABLE");
}

TEST_F(PostgresJobStoreTest, ReadOnlyDatabaseIsUnavailable) {
  ASSERT_THAT(store_->Create(MakeJob("a"), 10), IsOk());
  server_->Run(url_, "ALTER ROLE postgres SET default_transaction_read_only = on");
  store_ = nullptr;
  const std::string read_only = url_;
  PostgresPool pool(read_only);
  const absl::Status written =
      pool.Get([](PostgresConnection& connection) {
            return connection.Execute("UPDATE pewter_jobs SET state = state");
          })
          .status();
  server_->Run(absl::StrCat(url_, "%20-cdefault_transaction_read_only%3Doff"),
               "ALTER ROLE postgres RESET default_transaction_read_only");
  EXPECT_EQ(ReasonOf(written), "DATABASE_UNAVAILABLE") << written;
  EXPECT_THAT(std::string(written.message()), HasSubstr("read-only"));
}

TEST(PostgresUrl, NoMessageHoldsThePassword) {
  for (const char* url : {
           "postgresql://me:canary@127.0.0.1:1/jobs",
           "postgresql://me:canary%zz@127.0.0.1:1/jobs",
           "postgresql://me@127.0.0.1:1/jobs?password=canary",
           "postgresql://me:canary@127.0.0.1:port/jobs",
           "postgresql://me:canary@/jobs?host=/nowhere",
           "postgresql://me:canary@127.0.0.1:1/jobs?unknown=canary",
       }) {
    const absl::Status status = OpenJobStore(url).status();
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(status.ToString(), Not(HasSubstr("canary"))) << url;
  }
  EXPECT_TRUE(HoldsPassword("postgresql://me:canary@host/jobs"));
  EXPECT_TRUE(HoldsPassword("postgres://me@host/jobs?sslpassword=canary"));
  EXPECT_FALSE(HoldsPassword("postgresql://me@host/jobs"));
  EXPECT_FALSE(HoldsPassword("sqlite:/data/jobs:password@.db"));
}

TEST(PostgresUrl, BadOnesAreRefusedWithTheForm) {
  EXPECT_THAT(OpenJobStore("postgresql://host:1/jobs?nonsense=1"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("postgresql://USER@HOST")));
}

// A server that takes connections and says nothing.
TEST(PostgresConnection, DoesNotWaitForEverForASilentServer) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(listener, 8), 0);
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  PostgresPool pool(absl::StrCat("postgresql://me@127.0.0.1:", ntohs(address.sin_port),
                                 "/jobs?connect_timeout=2"));
  const auto get = [&] { return pool.Get([](PostgresConnection&) { return absl::OkStatus(); }); };
  const absl::Time begin = absl::Now();
  EXPECT_EQ(ReasonOf(get().status()), "DATABASE_UNAVAILABLE");
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  // Others do not wait again.
  const absl::Time again = absl::Now();
  EXPECT_EQ(ReasonOf(get().status()), "DATABASE_UNAVAILABLE");
  EXPECT_LT(absl::Now() - again, absl::Milliseconds(500));
  close(listener);
}

}  // namespace
}  // namespace pewter::server
