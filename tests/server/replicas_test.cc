// Several servers on one database, with fake executors: what each of them sees and may do.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/errors.h"
#include "server/job_manager.h"
#include "server/jobs/job_state.h"
#include "tests/server/fake_executor.h"
#include "tests/server/postgres_server.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::pewter::testing::IsOk;
using ::pewter::testing::TempFolder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A server and the workers that the test plays.
class Replica {
 public:
  Replica(const std::string& url, const std::string& id, JobManagerOptions options) {
    options.server = id;
    auto store = OpenJobStore(url);
    EXPECT_THAT(store, IsOk());
    manager_ = std::make_unique<JobManager>(*std::move(store), options);
    EXPECT_THAT(manager_->Start(std::make_unique<FakeExecutor>(&log_)), IsOk());
  }

  JobManager& operator*() { return *manager_; }
  JobManager* operator->() { return manager_.get(); }
  FakeExecutor::Log& log() { return log_; }

  // The n-th worker takes its job.
  v1::Job ClaimLaunch(size_t n) {
    const WorkerLaunch launch = log_.WaitForLaunch(n);
    v1::ClaimJobRequest request;
    request.set_job_id(launch.job_id);
    const auto claim = manager_->Claim(launch.token, request);
    EXPECT_THAT(claim, IsOk());
    tokens_[launch.job_id] = launch.token;
    return claim.ok() ? claim->job() : v1::Job();
  }
  absl::StatusOr<v1::HeartbeatResponse> Beat(const v1::Job& job, v1::JobState state,
                                             bool confirm = false, int64_t written = 0) {
    v1::HeartbeatRequest request;
    request.set_job_id(job.id());
    request.set_lease_generation(job.lease_generation());
    request.set_state(state);
    request.set_confirm_lease(confirm);
    request.mutable_progress()->set_written_bytes(written);
    return manager_->Heartbeat(tokens_[job.id()], request);
  }
  absl::Status Succeed(const v1::Job& job) {
    v1::FinishJobRequest request;
    request.set_job_id(job.id());
    request.set_lease_generation(job.lease_generation());
    request.mutable_output()->set_manifest_json("{}");
    return manager_->Finish(tokens_[job.id()], request);
  }
  absl::Status Yield(const v1::Job& job) {
    v1::FinishJobRequest request;
    request.set_job_id(job.id());
    request.set_lease_generation(job.lease_generation());
    request.mutable_yielded();
    return manager_->Finish(tokens_[job.id()], request);
  }

 private:
  FakeExecutor::Log log_;
  std::unique_ptr<JobManager> manager_;
  std::map<std::string, std::string> tokens_;  // by job
};

class ReplicasTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    postgres_ = PostgresServer::Get(why);
    if (postgres_ == nullptr) GTEST_SKIP() << why;
    url_ = postgres_->MakeDatabase();
  }
  std::unique_ptr<Replica> Start(const std::string& id, const JobManagerOptions& options = {}) {
    return std::make_unique<Replica>(url_, id, options);
  }
  // Serves clients, but runs nothing.
  std::unique_ptr<Replica> StartIdle(const std::string& id) {
    return Start(id, {.workers = 0, .look = absl::Milliseconds(100)});
  }
  std::string Create(Replica& replica, const std::string& name) {
    v1::CreateJobRequest request;
    request.set_recipe("models: [{model: /models/a}]\nmerge_method: passthrough\n");
    request.set_destination_uri(folder_ / name);
    const auto job = replica->Create(request);
    EXPECT_THAT(job, IsOk());
    return job.ok() ? job->id() : "";
  }
  v1::Job WaitForState(Replica& replica, const std::string& id, v1::JobState state) {
    v1::Job job;
    for (const absl::Time end = absl::Now() + absl::Seconds(30); absl::Now() < end;) {
      const auto got = replica->Get(id);
      if (got.ok()) job = *got;
      if (job.state() == state) return job;
      absl::SleepFor(absl::Milliseconds(2));
    }
    ADD_FAILURE() << "job is " << job.DebugString();
    return job;
  }
  // As when its server had been silent for long.
  void ExpireLease(const std::string& id) {
    postgres_->Run(url_, absl::StrCat("UPDATE pewter_jobs SET lease_expiry = now() - interval '1s' "
                                      "WHERE id = '",
                                      id, "'"));
  }
  static std::vector<v1::JobState> StatesOf(const std::vector<v1::JobEvent>& events) {
    std::vector<v1::JobState> states;
    for (const v1::JobEvent& event : events) {
      if (event.has_state_change()) states.push_back(event.state_change().state());
    }
    return states;
  }

  PostgresServer* postgres_ = nullptr;
  std::string url_;
  TempFolder folder_;
};

// Follows a job on a thread of its own.
class Watcher {
 public:
  Watcher(Replica& replica, const std::string& id)
      : thread_([this, &replica, id] {
          v1::WatchJobRequest request;
          request.set_job_id(id);
          status_ = replica->Watch(
              request,
              [this](const v1::JobEvent& event) {
                absl::MutexLock lock(&mutex_);
                events_.push_back(event);
                return true;
              },
              [] { return false; });
        }) {}
  ~Watcher() {
    if (thread_.joinable()) thread_.join();
  }
  bool WaitFor(const std::function<bool(const v1::JobEvent&)>& is_it) {
    const auto there = [&] { return std::any_of(events_.begin(), events_.end(), is_it); };
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(30));
  }
  absl::Status Join() {
    thread_.join();
    return status_;
  }
  const std::vector<v1::JobEvent>& events() const { return events_; }  // after Join

 private:
  absl::Mutex mutex_;
  std::vector<v1::JobEvent> events_;
  absl::Status status_;
  std::thread thread_;
};

TEST_F(ReplicasTest, EveryJobRunsOnce) {
  const auto a = Start("a", {.workers = 3});
  const auto b = Start("b", {.workers = 3});
  constexpr int kJobs = 24;
  std::set<std::string> jobs;
  for (int i = 0; i < kJobs; ++i) jobs.insert(Create(i % 2 == 0 ? *a : *b, absl::StrCat(i)));
  std::vector<std::string> done;
  absl::Mutex mutex;
  const auto work = [&](Replica& replica) {
    for (size_t n = 1;; ++n) {
      const auto more = [&] {
        absl::MutexLock lock(&mutex);
        return done.size() < kJobs;
      };
      const auto launched = [&] {
        absl::MutexLock lock(&replica.log().mutex);
        return replica.log().launches.size() >= n;
      };
      while (more() && !launched()) absl::SleepFor(absl::Milliseconds(1));
      if (!launched()) return;
      const v1::Job job = replica.ClaimLaunch(n);
      EXPECT_EQ(job.lease_generation(), 1);
      ASSERT_THAT(replica.Beat(job, v1::JOB_STATE_RUNNING), IsOk());
      ASSERT_THAT(replica.Succeed(job), IsOk());
      replica.log().End({.job_id = job.id()});
      absl::MutexLock lock(&mutex);
      done.push_back(job.id());
    }
  };
  std::thread other([&] { work(*b); });
  work(*a);
  other.join();
  EXPECT_EQ(done.size(), jobs.size());
  EXPECT_EQ(std::set<std::string>(done.begin(), done.end()), jobs);
  for (const std::string& id : jobs) {
    EXPECT_EQ((*a)->Get(id)->state(), v1::JOB_STATE_SUCCEEDED);
    EXPECT_EQ((*a)->Get(id)->attempt(), 1);
  }
  absl::MutexLock lock(&a->log().mutex);
  EXPECT_FALSE(a->log().launches.empty());
}

TEST_F(ReplicasTest, AnotherServerTakesOverFromOneThatIsGone) {
  auto a = Start("a", {.lease = absl::Seconds(1), .look = absl::Milliseconds(100)});
  const std::string id = Create(*a, "out");
  const v1::Job first = a->ClaimLaunch(1);
  EXPECT_EQ(first.server(), "a");
  ASSERT_THAT(a->Beat(first, v1::JOB_STATE_RUNNING), IsOk());
  const auto b =
      Start("b", {.look = absl::Milliseconds(100), .retry_delay = absl::Milliseconds(1)});
  Watcher watcher(*b, id);
  a.reset();  // without a word to the database
  const v1::Job second = b->ClaimLaunch(1);
  EXPECT_EQ(second.id(), id);
  EXPECT_EQ(second.server(), "b");
  EXPECT_EQ(second.attempt(), 2);
  EXPECT_EQ(second.lease_generation(), 2);
  ASSERT_THAT(b->Succeed(second), IsOk());
  EXPECT_THAT(watcher.Join(), IsOk());
  EXPECT_THAT(StatesOf(watcher.events()),
              ElementsAre(v1::JOB_STATE_QUEUED, v1::JOB_STATE_PLANNING, v1::JOB_STATE_RUNNING,
                          v1::JOB_STATE_QUEUED, v1::JOB_STATE_PLANNING, v1::JOB_STATE_RUNNING,
                          v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_SUCCEEDED));
  for (const v1::JobEvent& event : watcher.events()) {
    if (event.sequence() != 4) continue;
    EXPECT_EQ(event.state_change().error().reason(), "WORKER_LOST");
    EXPECT_THAT(event.state_change().error().message(), HasSubstr("server a"));
  }
}

TEST_F(ReplicasTest, AServerThatComesBackTakesUpItsOwnJobsAtOnce) {
  auto a = Start("a", {.lease = absl::Seconds(60)});
  const std::string id = Create(*a, "out");
  a->ClaimLaunch(1);
  a.reset();
  a = Start("a", {.retry_delay = absl::Milliseconds(1)});
  const v1::Job again = a->ClaimLaunch(1);
  EXPECT_EQ(again.id(), id);
  EXPECT_EQ(again.lease_generation(), 2);
}

TEST_F(ReplicasTest, WhoHasLostALeaseIsFenced) {
  const auto a = Start("a", {.lease = absl::Seconds(60), .look = absl::Seconds(60)});
  const std::string id = Create(*a, "out");
  const v1::Job late = a->ClaimLaunch(1);
  ASSERT_THAT(a->Beat(late, v1::JOB_STATE_RUNNING), IsOk());
  ExpireLease(id);
  const auto b = Start("b", {.look = absl::Milliseconds(50), .retry_delay = absl::Milliseconds(1)});
  const v1::Job job = b->ClaimLaunch(1);
  EXPECT_EQ(job.lease_generation(), 2);

  // All that the late one can say before it may publish.
  for (const auto& status : {a->Beat(late, v1::JOB_STATE_RUNNING, /*confirm=*/true).status(),
                             a->Beat(late, v1::JOB_STATE_PUBLISHING).status(), a->Succeed(late)}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    EXPECT_EQ(ReasonOf(status), "LEASE_LOST");
  }
  // Its end is nothing to the job.
  a->log().End({.job_id = id, .exit_code = 1});
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_EQ((*b)->Get(id)->state(), v1::JOB_STATE_PLANNING);
  EXPECT_EQ((*b)->Get(id)->lease_generation(), 2);
  EXPECT_THAT(b->Beat(job, v1::JOB_STATE_RUNNING, /*confirm=*/true), IsOk());
  EXPECT_THAT(b->Succeed(job), IsOk());
  const v1::Job done = WaitForState(*a, id, v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(done.attempt(), 2);
  EXPECT_EQ(done.sequence(), 8);
}

TEST_F(ReplicasTest, OfTwoThatFinishOneDoes) {
  const auto a = Start("a", {.lease = absl::Seconds(60), .look = absl::Seconds(60)});
  const std::string id = Create(*a, "out");
  const v1::Job late = a->ClaimLaunch(1);
  ASSERT_THAT(a->Beat(late, v1::JOB_STATE_PUBLISHING), IsOk());
  ExpireLease(id);
  const auto b = Start("b", {.look = absl::Milliseconds(50), .retry_delay = absl::Milliseconds(1)});
  const v1::Job job = b->ClaimLaunch(1);
  absl::Status first, second;
  std::thread racer([&] { first = a->Succeed(late); });
  second = b->Succeed(job);
  racer.join();
  EXPECT_EQ(ReasonOf(first), "LEASE_LOST");
  EXPECT_THAT(second, IsOk());
  EXPECT_EQ((*a)->Get(id)->state(), v1::JOB_STATE_SUCCEEDED);
}

TEST_F(ReplicasTest, AWorkerNeverCountsOnMoreThanTheDatabaseGrants) {
  const auto a = Start("a", {.lease = absl::Seconds(10)});
  Create(*a, "out");
  const v1::Job job = a->ClaimLaunch(1);
  ASSERT_THAT(a->Beat(job, v1::JOB_STATE_RUNNING, /*confirm=*/true), IsOk());
  absl::SleepFor(absl::Milliseconds(1500));
  // Not renewed by this one: less than a fifth of the lease is over.
  const auto beat = a->Beat(job, v1::JOB_STATE_RUNNING);
  ASSERT_THAT(beat, IsOk());
  const double left =
      static_cast<double>(beat->lease_duration().seconds()) + 1e-9 * beat->lease_duration().nanos();
  EXPECT_LT(left, 8.6);
  EXPECT_GT(left, 5);
}

TEST_F(ReplicasTest, AnyServerTellsHowAJobGoesOn) {
  const auto a = Start("a", {.lease = absl::Seconds(1)});
  const auto b = StartIdle("b");
  const std::string id = Create(*b, "out");
  Watcher watcher(*b, id);
  const v1::Job job = a->ClaimLaunch(1);
  ASSERT_TRUE(watcher.WaitFor([](const v1::JobEvent& event) {
    return event.state_change().state() == v1::JOB_STATE_PLANNING;
  }));
  ASSERT_THAT(a->Beat(job, v1::JOB_STATE_RUNNING, /*confirm=*/true, /*written=*/55), IsOk());
  EXPECT_TRUE(watcher.WaitFor(
      [](const v1::JobEvent& event) { return event.progress().written_bytes() == 55; }));
  EXPECT_EQ((*b)->Get(id)->progress().written_bytes(), 55);
  ASSERT_THAT(a->Succeed(job), IsOk());
  EXPECT_THAT(watcher.Join(), IsOk());
  int64_t last = 0;
  for (const v1::JobEvent& event : watcher.events()) {
    if (event.has_progress()) continue;
    EXPECT_EQ(event.sequence(), last + 1);
    last = event.sequence();
  }
  EXPECT_EQ(watcher.events().back().state_change().state(), v1::JOB_STATE_SUCCEEDED);
}

TEST_F(ReplicasTest, AnyServerCancels) {
  const auto a = Start("a");
  const auto b = StartIdle("b");
  const std::string id = Create(*a, "out");
  const v1::Job job = a->ClaimLaunch(1);
  const std::string queued = Create(*a, "queued");
  EXPECT_EQ((*b)->Cancel(queued)->state(), v1::JOB_STATE_CANCELLED);
  EXPECT_TRUE((*b)->Cancel(id)->cancel_requested());
  v1::StopReason stop = v1::STOP_REASON_UNSPECIFIED;
  for (const absl::Time end = absl::Now() + absl::Seconds(5);
       stop == v1::STOP_REASON_UNSPECIFIED && absl::Now() < end;) {
    const auto beat = a->Beat(job, v1::JOB_STATE_RUNNING);
    ASSERT_THAT(beat, IsOk());
    stop = beat->stop();
    absl::SleepFor(absl::Milliseconds(5));
  }
  EXPECT_EQ(stop, v1::STOP_REASON_CANCEL);
  // Its worker ends without a word.
  a->log().End({.job_id = id, .exit_code = 1});
  WaitForState(*b, id, v1::JOB_STATE_CANCELLED);
  v1::DeleteJobRequest remove;
  remove.set_job_id(id);
  EXPECT_THAT((*b)->Delete(remove, [] { return false; }), IsOk());
  EXPECT_EQ(ReasonOf((*a)->Get(id).status()), "JOB_NOT_FOUND");
}

TEST_F(ReplicasTest, AServerThatStopsInOrderHandsItsJobsOver) {
  auto a = Start("a");
  const std::string id = Create(*a, "out");
  const v1::Job job = a->ClaimLaunch(1);
  const auto b = Start("b", {.look = absl::Seconds(60)});
  std::thread drain([&] { (*a)->Drain(absl::Seconds(30)); });
  ASSERT_TRUE(a->log().WaitFor([&] { return !a->log().stops.empty(); }));
  EXPECT_EQ(a->Beat(job, v1::JOB_STATE_RUNNING)->stop(), v1::STOP_REASON_DRAIN);
  ASSERT_THAT(a->Yield(job), IsOk());
  a->log().End({.job_id = id});
  drain.join();
  const v1::Job next = b->ClaimLaunch(1);
  EXPECT_EQ(next.id(), id);
  EXPECT_EQ(next.attempt(), 1);
  EXPECT_EQ(next.lease_generation(), 2);
}

TEST_F(ReplicasTest, ARestartOfTheDatabaseCostsNoAttempt) {
  const auto a = Start("a", {.lease = absl::Seconds(30), .look = absl::Milliseconds(200)});
  const std::string id = Create(*a, "out");
  const v1::Job job = a->ClaimLaunch(1);
  Watcher watcher(*a, id);
  ASSERT_TRUE(watcher.WaitFor([](const v1::JobEvent& event) {
    return event.state_change().state() == v1::JOB_STATE_PLANNING;
  }));
  postgres_->Stop();
  EXPECT_EQ(ReasonOf(a->Beat(job, v1::JOB_STATE_RUNNING).status()), "DATABASE_UNAVAILABLE");
  EXPECT_EQ(ReasonOf(a->Succeed(job)), "DATABASE_UNAVAILABLE");
  EXPECT_EQ(ReasonOf((*a)->Get(id).status()), "DATABASE_UNAVAILABLE");
  // The client asks again, as for any UNAVAILABLE.
  EXPECT_EQ(ReasonOf(watcher.Join()), "DATABASE_UNAVAILABLE");
  postgres_->Start();
  const absl::Time back = absl::Now();
  absl::Status beat;
  do {
    beat = a->Beat(job, v1::JOB_STATE_RUNNING).status();
    absl::SleepFor(absl::Milliseconds(20));
  } while (!beat.ok() && absl::Now() - back < absl::Seconds(5));
  EXPECT_THAT(beat, IsOk());
  ASSERT_THAT(a->Succeed(job), IsOk());
  a->log().End({.job_id = id});
  const v1::Job done = WaitForState(*a, id, v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(done.attempt(), 1);
  EXPECT_EQ(done.sequence(), 5);
  // The queue goes on.
  const std::string next = Create(*a, "next");
  EXPECT_EQ(a->ClaimLaunch(2).id(), next);
}

// The answer to a commit may be lost after the commit was made: what is then repeated is not
// done twice, and not refused.
TEST_F(ReplicasTest, WhatIsRepeatedAfterALostAnswerIsTakenForDone) {
  const auto a = Start("a", {.lease = absl::Seconds(60)});
  auto store = OpenJobStore(url_);
  ASSERT_THAT(store, IsOk());
  const std::string id = Create(*a, "out");
  const v1::Job job = a->ClaimLaunch(1);
  // As if the server had not heard that its own change was made.
  ASSERT_THAT((*store)->Transition(id, v1::JOB_STATE_PLANNING, v1::JOB_STATE_RUNNING,
                                   {.lease_generation = 1}),
              IsOk());
  ASSERT_THAT(a->Beat(job, v1::JOB_STATE_RUNNING), IsOk());
  ASSERT_THAT(a->Beat(job, v1::JOB_STATE_PUBLISHING), IsOk());
  v1::JobOutput output;
  output.set_manifest_json("{}");
  ASSERT_THAT((*store)->Transition(id, v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_SUCCEEDED,
                                   {.lease_generation = 1, .output = output}),
              IsOk());
  EXPECT_THAT(a->Succeed(job), IsOk());
  EXPECT_EQ((*a)->Get(id)->sequence(), 5);
}

}  // namespace
}  // namespace pewter::server
