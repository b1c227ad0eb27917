// What every JobStore must do. A store's test instantiates it:
//
//   INSTANTIATE_TEST_SUITE_P(Sqlite, JobStoreContract, ::testing::Values(&MakeSqliteFixture));
//
// A factory that gives null has its tests skipped.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "server/errors.h"
#include "server/jobs/job_state.h"
#include "server/jobs/job_store.h"
#include "tests/support/matchers.h"

namespace pewter::server {

using ::pewter::testing::IsOk;
using ::pewter::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class JobStoreFixture {
 public:
  virtual ~JobStoreFixture() = default;
  virtual JobStore& store() = 0;
  // Closes the store and opens it again: what was acknowledged must still be there.
  virtual void Reopen(const ProjectPolicy& projects) = 0;
};

using JobStoreFactory = std::unique_ptr<JobStoreFixture> (*)();

class JobStoreContract : public ::testing::TestWithParam<JobStoreFactory> {
 protected:
  static constexpr int64_t kQueueLimit = 1000;

  void SetUp() override {
    if (fixture_ == nullptr) GTEST_SKIP() << "the database's server is not installed";
  }
  JobStore& store() { return fixture_->store(); }
  void Reopen(const std::vector<std::string>& projects = {}) {
    const auto policy = ProjectPolicy::Make(projects);
    ASSERT_THAT(policy, IsOk());
    fixture_->Reopen(*policy);
  }

  static NewJob MakeJob(const std::string& id) {
    NewJob request;
    request.job.set_id(id);
    request.job.set_project(kDefaultProject);
    request.job.set_recipe("merge_method: linear");
    request.job.set_destination_uri(absl::StrCat("/out/", id));
    request.request_digest = absl::StrCat("digest of ", id);
    request.destination_key = absl::StrCat("/out/", id);
    return request;
  }
  v1::Job Create(const NewJob& request) {
    const auto created = store().Create(request, kQueueLimit);
    EXPECT_THAT(created, IsOk());
    return created.ok() ? created->job : v1::Job();
  }
  v1::Job Create(const std::string& id) { return Create(MakeJob(id)); }
  v1::Job CreateIn(const std::string& project, const std::string& id, int priority = 0) {
    NewJob request = MakeJob(id);
    request.job.set_project(project);
    request.job.set_priority(priority);
    return Create(request);
  }
  // The next job, which must be `id`.
  v1::Job Claim(const std::string& id, absl::Duration lease = absl::Seconds(60)) {
    const auto claimed = store().Claim("server", lease);
    EXPECT_THAT(claimed, IsOk());
    const v1::Job job = claimed.ok() && claimed->job ? *claimed->job : v1::Job();
    EXPECT_EQ(job.id(), id);
    return job;
  }
  bool NothingToClaim() {
    const auto claimed = store().Claim("server", absl::Seconds(60));
    EXPECT_THAT(claimed, IsOk());
    return claimed.ok() && !claimed->job;
  }
  absl::StatusOr<v1::Job> GiveUp(const std::string& id, const LostAttempt& lost) {
    return store().GiveUp(id, lost);
  }
  static LostAttempt Lost(int64_t generation) {
    LostAttempt lost{.lease_generation = generation, .max_attempts = 3};
    lost.why.set_reason("WORKER_LOST");
    lost.why.set_message("it is gone");
    return lost;
  }
  static std::vector<std::string> IdsOf(const absl::StatusOr<std::vector<v1::Job>>& jobs) {
    EXPECT_THAT(jobs, IsOk());
    std::vector<std::string> ids;
    if (jobs.ok()) {
      for (const v1::Job& job : *jobs) ids.push_back(job.id());
    }
    return ids;
  }
  v1::Job Get(const std::string& id) {
    const auto job = store().Get(id);
    EXPECT_THAT(job, IsOk());
    return job.ok() ? *job : v1::Job();
  }
  void Move(const std::string& id, std::vector<v1::JobState> way) {
    for (const v1::JobState to : way) {
      ASSERT_THAT(store().Transition(id, Get(id).state(), to, {}), IsOk());
    }
  }
  std::vector<int64_t> Sequences(const std::string& id, int64_t after = 0) {
    const auto events = store().Events(id, after, 1000);
    EXPECT_THAT(events, IsOk());
    std::vector<int64_t> sequences;
    if (events.ok()) {
      for (const v1::JobEvent& event : *events) sequences.push_back(event.sequence());
    }
    return sequences;
  }
  std::vector<std::string> ListIds(const v1::JobFilter& filter) {
    const auto page = store().List(filter, 100, 0);
    EXPECT_THAT(page, IsOk());
    std::vector<std::string> ids;
    if (page.ok()) {
      for (const v1::Job& job : page->jobs) ids.push_back(job.id());
    }
    return ids;
  }

 private:
  std::unique_ptr<JobStoreFixture> fixture_ = GetParam()();
};

TEST_P(JobStoreContract, ChangesThatComeAtTheSameTimeAreEachMadeOrNotAtAll) {
  constexpr int kThreads = 12, kEach = 40;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int j = 0; j < kEach; ++j) {
        const std::string id = absl::StrCat("j", i, "-", j);
        NewJob request = MakeJob(id);
        (*request.job.mutable_labels())["thread"] = absl::StrCat(i);
        ASSERT_THAT(store().Create(request, kQueueLimit), IsOk());
        // What is acknowledged is there for all at once.
        ASSERT_THAT(store().Get(id), IsOk());
        request.job.set_id(absl::StrCat(id, "-again"));
        ASSERT_THAT(store().Create(request, kQueueLimit),
                    StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr(id)));
        if (j % 2 == 0) {
          ASSERT_THAT(store().RequestCancel(id), IsOk());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  threads.clear();
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int j = 0; j < kEach / 2; ++j) {
        ASSERT_THAT(store().Claim(absl::StrCat("server", i), absl::Seconds(60)), IsOk());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  Reopen();
  for (int i = 0; i < kThreads; ++i) {
    v1::JobFilter filter;
    (*filter.mutable_labels())["thread"] = absl::StrCat(i);
    EXPECT_EQ(ListIds(filter).size(), kEach);
    EXPECT_THAT(IdsOf(store().Held(absl::StrCat("server", i))), ::testing::SizeIs(kEach / 2));
    for (int j = 0; j < kEach; ++j) {
      EXPECT_EQ(Sequences(absl::StrCat("j", i, "-", j)), (std::vector<int64_t>{1, 2}));
      EXPECT_THAT(store().Get(absl::StrCat("j", i, "-", j, "-again")),
                  StatusIs(absl::StatusCode::kNotFound, HasSubstr("again")));
    }
  }
}

TEST_P(JobStoreContract, CreatedJobIsQueuedWithOneEventAndSurvivesReopening) {
  NewJob request = MakeJob("a");
  request.job.set_request_id("r1");
  request.job.set_priority(7);
  (*request.job.mutable_labels())["team"] = "nlp";
  request.job.mutable_options()->set_seed(42);
  const v1::Job created = Create(request);
  EXPECT_EQ(created.state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(created.sequence(), 1);
  EXPECT_EQ(created.attempt(), 0);
  EXPECT_TRUE(created.has_create_time());
  EXPECT_FALSE(created.has_start_time());

  Reopen();
  EXPECT_EQ(Get("a").SerializeAsString(), created.SerializeAsString());
  const auto events = store().Events("a", 0, 10);
  ASSERT_THAT(events, IsOk());
  ASSERT_EQ(events->size(), 1u);
  EXPECT_EQ((*events)[0].sequence(), 1);
  EXPECT_EQ((*events)[0].state_change().state(), v1::JOB_STATE_QUEUED);
}

TEST_P(JobStoreContract, SameRequestGivesTheSameJobInItsCurrentState) {
  NewJob request = MakeJob("a");
  request.job.set_request_id("r1");
  Create(request);
  Claim("a");
  Reopen();
  request.job.set_id("b");
  const auto again = store().Create(request, kQueueLimit);
  ASSERT_THAT(again, IsOk());
  EXPECT_FALSE(again->is_new);
  EXPECT_EQ(again->job.id(), "a");
  EXPECT_EQ(again->job.state(), v1::JOB_STATE_PLANNING);
  EXPECT_THAT(ListIds({}), ElementsAre("a"));
}

TEST_P(JobStoreContract, SameRequestIdWithAnotherBodyIsRefused) {
  NewJob request = MakeJob("a");
  request.job.set_request_id("r1");
  Create(request);
  NewJob other = MakeJob("b");
  other.job.set_request_id("r1");
  const auto refused = store().Create(other, kQueueLimit);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("r1")));
  EXPECT_EQ(ReasonOf(refused.status()), "REQUEST_ID_REUSED");
  EXPECT_THAT(ListIds({}), ElementsAre("a"));
}

TEST_P(JobStoreContract, JobsWithoutRequestIdAreAllNew) {
  Create("a");
  EXPECT_EQ(Create("b").id(), "b");
}

TEST_P(JobStoreContract, ConcurrentSameRequestsMakeOneJob) {
  std::vector<std::thread> threads;
  std::atomic<int> made = 0;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      NewJob request = MakeJob(absl::StrCat("job", i));
      request.job.set_request_id("r1");
      request.request_digest = "same";
      request.destination_key = "/out/same";
      const auto created = store().Create(request, kQueueLimit);
      EXPECT_THAT(created, IsOk());
      if (created.ok() && created->is_new) ++made;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(made, 1);
}

TEST_P(JobStoreContract, DestinationIsBusyUntilItsJobIsFinal) {
  NewJob first = MakeJob("a");
  NewJob second = MakeJob("b");
  second.destination_key = first.destination_key;
  Create(first);
  auto refused = store().Create(second, kQueueLimit);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("job a")));
  EXPECT_EQ(ReasonOf(refused.status()), "DESTINATION_BUSY");
  Claim("a");
  EXPECT_THAT(store().Create(second, kQueueLimit),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("job a")));
  Move("a", {v1::JOB_STATE_FAILED});
  EXPECT_THAT(store().Create(second, kQueueLimit), IsOk());
}

TEST_P(JobStoreContract, QueueIsBounded) {
  ASSERT_THAT(store().Create(MakeJob("a"), 2), IsOk());
  ASSERT_THAT(store().Create(MakeJob("b"), 2), IsOk());
  const auto refused = store().Create(MakeJob("c"), 2);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(refused.status()), "QUEUE_FULL");
  Claim("a");
  EXPECT_THAT(store().Create(MakeJob("c"), 2), IsOk());
}

TEST_P(JobStoreContract, UnknownJobsAreNotFound) {
  const auto code = absl::StatusCode::kNotFound;
  for (const std::string& id : {std::string("x"), std::string("x\0y", 3), std::string()}) {
    EXPECT_THAT(store().Get(id), StatusIs(code, HasSubstr("no job")));
    EXPECT_EQ(ReasonOf(store().Get(id).status()), "JOB_NOT_FOUND");
    EXPECT_THAT(store().Delete(id), StatusIs(code, HasSubstr("no job")));
    EXPECT_THAT(store().Events(id, 0, 10), StatusIs(code, HasSubstr("no job")));
    EXPECT_THAT(store().RenewLease(id, 1, absl::Seconds(1), {}),
                StatusIs(code, HasSubstr("no job")));
    EXPECT_THAT(store().GiveUp(id, Lost(1)), StatusIs(code, HasSubstr("no job")));
    EXPECT_THAT(store().RequestCancel(id), StatusIs(code, HasSubstr("no job")));
    EXPECT_THAT(store().FailOverdue(id), StatusIs(code, HasSubstr("no job")));
    EXPECT_THAT(store().Transition(id, v1::JOB_STATE_QUEUED, v1::JOB_STATE_CANCELLED, {}),
                StatusIs(code, HasSubstr("no job")));
  }
}

TEST_P(JobStoreContract, TextsOfClientsAreKeptAsTheyAre) {
  NewJob request = MakeJob("a");
  const std::string odd("\xC3\xA4\0'; --", 7);
  (*request.job.mutable_labels())["key"] = odd;
  request.job.set_recipe(odd);
  request.destination_key = absl::StrCat("/out/", std::string(8000, 'x'), "\xFF");
  Create(request);
  EXPECT_EQ(Get("a").recipe(), odd);
  v1::JobFilter filter;
  (*filter.mutable_labels())["key"] = odd;
  EXPECT_THAT(ListIds(filter), ElementsAre("a"));
  request.job.set_id("b");
  EXPECT_EQ(ReasonOf(store().Create(request, kQueueLimit).status()), "DESTINATION_BUSY");
}

TEST_P(JobStoreContract, ClaimStartsAnAttemptWithANewGeneration) {
  EXPECT_TRUE(NothingToClaim());
  Create("a");
  v1::Job job = Claim("a");
  EXPECT_EQ(job.state(), v1::JOB_STATE_PLANNING);
  EXPECT_EQ(job.attempt(), 1);
  EXPECT_EQ(job.lease_generation(), 1);
  EXPECT_EQ(job.server(), "server");
  EXPECT_EQ(job.recipe(), "merge_method: linear");
  EXPECT_TRUE(job.has_start_time());
  EXPECT_TRUE(NothingToClaim());

  const google::protobuf::Timestamp start = job.start_time();
  Move("a", {v1::JOB_STATE_QUEUED});
  job = Claim("a");
  EXPECT_EQ(job.attempt(), 2);
  EXPECT_EQ(job.lease_generation(), 2);
  EXPECT_EQ(job.start_time().SerializeAsString(), start.SerializeAsString());
}

TEST_P(JobStoreContract, NoJobIsClaimedTwice) {
  constexpr int kJobs = 40;
  for (int i = 0; i < kJobs; ++i) Create(absl::StrCat("job", i));
  absl::Mutex mutex;
  std::vector<std::string> claimed;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      while (true) {
        const auto next = store().Claim(absl::StrCat("server", i), absl::Seconds(60));
        EXPECT_THAT(next, IsOk());
        if (!next.ok() || !next->job) return;
        absl::MutexLock lock(&mutex);
        claimed.push_back(next->job->id());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(claimed.size(), static_cast<size_t>(kJobs));
  EXPECT_EQ(std::set<std::string>(claimed.begin(), claimed.end()).size(),
            static_cast<size_t>(kJobs));
}

TEST_P(JobStoreContract, TransitionComparesBeforeItSets) {
  Create("a");
  Claim("a");
  const auto moved = store().Transition("a", v1::JOB_STATE_RUNNING, v1::JOB_STATE_PUBLISHING, {});
  EXPECT_EQ(moved.status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ReasonOf(moved.status()), "STATE_CHANGED");
  EXPECT_EQ(Get("a").state(), v1::JOB_STATE_PLANNING);
  EXPECT_THAT(Sequences("a"), ElementsAre(1, 2));
}

TEST_P(JobStoreContract, OnlyChangesOfTheTableAreMade) {
  Create("a");
  for (int from = v1::JobState_MIN; from <= v1::JobState_MAX; ++from) {
    for (int to = v1::JobState_MIN; to <= v1::JobState_MAX; ++to) {
      const auto from_state = static_cast<v1::JobState>(from);
      const auto to_state = static_cast<v1::JobState>(to);
      if (IsAllowed(from_state, to_state)) continue;
      EXPECT_EQ(store().Transition("a", from_state, to_state, {}).status().code(),
                absl::StatusCode::kInternal)
          << from << " to " << to;
    }
  }
  EXPECT_THAT(Sequences("a"), ElementsAre(1));
}

TEST_P(JobStoreContract, ConcurrentTransitionsHaveOneWinner) {
  Create("a");
  Claim("a");
  std::atomic<int> winners = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      const v1::JobState to = i % 2 == 0 ? v1::JOB_STATE_FAILED : v1::JOB_STATE_CANCELLED;
      if (store().Transition("a", v1::JOB_STATE_PLANNING, to, {}).ok()) ++winners;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(winners, 1);
  EXPECT_THAT(Sequences("a"), ElementsAre(1, 2, 3));
}

TEST_P(JobStoreContract, SuccessKeepsOutputAndTimes) {
  Create("a");
  Claim("a");
  Move("a", {v1::JOB_STATE_RUNNING, v1::JOB_STATE_PUBLISHING});
  v1::JobOutput output;
  output.set_manifest_json("{}");
  output.set_fingerprint("f");
  v1::Progress progress;
  progress.set_tensors_done(3);
  ASSERT_THAT(store().Transition("a", v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_SUCCEEDED,
                                 {.lease_generation = 1, .output = output, .progress = progress}),
              IsOk());
  Reopen();
  const v1::Job job = Get("a");
  EXPECT_EQ(job.output().manifest_json(), "{}");
  EXPECT_EQ(job.progress().tensors_done(), 3);
  EXPECT_TRUE(job.has_end_time());
  const auto events = store().Events("a", 4, 10);
  ASSERT_THAT(events, IsOk());
  ASSERT_EQ(events->size(), 1u);
  EXPECT_EQ((*events)[0].state_change().output().fingerprint(), "f");
}

TEST_P(JobStoreContract, ErrorIsToldAndClearedByTheNextAttempt) {
  Create("a");
  Claim("a");
  v1::JobError error;
  error.set_reason("WORKER_LOST");
  ASSERT_THAT(
      store().Transition("a", v1::JOB_STATE_PLANNING, v1::JOB_STATE_QUEUED, {.error = error}),
      IsOk());
  EXPECT_EQ(Get("a").error().reason(), "WORKER_LOST");
  EXPECT_FALSE(Claim("a").has_error());
}

TEST_P(JobStoreContract, LostAttemptsAreRepeatedUntilTheyRunOut) {
  Create("a");
  for (int attempt = 1; attempt <= 3; ++attempt) {
    const v1::Job claimed = Claim("a");
    EXPECT_EQ(claimed.attempt(), attempt);
    EXPECT_FALSE(claimed.has_error());
    const auto job = GiveUp("a", Lost(attempt));
    ASSERT_THAT(job, IsOk());
    EXPECT_EQ(job->state(), attempt < 3 ? v1::JOB_STATE_QUEUED : v1::JOB_STATE_FAILED);
    EXPECT_EQ(job->error().reason(), "WORKER_LOST");
    EXPECT_EQ(job->error().metadata().at("attempts"), absl::StrCat(attempt));
  }
  EXPECT_THAT(Get("a").error().message(), HasSubstr("given up after 3 attempts"));
  EXPECT_TRUE(Get("a").has_end_time());
}

TEST_P(JobStoreContract, AnAttemptThatDoesNotCountIsRefunded) {
  Create("a");
  Claim("a");
  LostAttempt lost = Lost(1);
  lost.counts = false;
  ASSERT_THAT(GiveUp("a", lost), IsOk());
  EXPECT_EQ(Get("a").attempt(), 0);
  EXPECT_FALSE(Get("a").has_error());
  const v1::Job job = Claim("a");
  EXPECT_EQ(job.attempt(), 1);
  EXPECT_EQ(job.lease_generation(), 2);
}

TEST_P(JobStoreContract, AJobWaitsAfterALossAndLetsOthersPass) {
  Create("a");
  Create("b");
  Claim("a");
  LostAttempt lost = Lost(1);
  lost.retry_delay = absl::Seconds(1);
  ASSERT_THAT(GiveUp("a", lost), IsOk());
  Claim("b");
  const absl::Time begin = absl::Now();
  auto next = store().Claim("server", absl::Seconds(60));
  ASSERT_THAT(next, IsOk());
  EXPECT_FALSE(next->job);
  EXPECT_GT(next->next, absl::ZeroDuration());
  EXPECT_LE(next->next, absl::Seconds(1));
  while (next.ok() && !next->job && absl::Now() < begin + absl::Seconds(30)) {
    absl::SleepFor(next->next);
    next = store().Claim("server", absl::Seconds(60));
  }
  ASSERT_THAT(next, IsOk());
  ASSERT_TRUE(next->job);
  EXPECT_EQ(next->job->attempt(), 2);
}

TEST_P(JobStoreContract, OnlyExpiredLeasesAreGivenUpByOthers) {
  Create("a");
  Claim("a", absl::Seconds(60));
  EXPECT_THAT(IdsOf(store().Expired(10)), IsEmpty());
  LostAttempt lost = Lost(1);
  lost.only_if_expired = true;
  EXPECT_EQ(ReasonOf(GiveUp("a", lost).status()), "LEASE_LOST");
  EXPECT_EQ(Get("a").state(), v1::JOB_STATE_PLANNING);

  // It ends at once, and is renewed after all.
  ASSERT_THAT(store().RenewLease("a", 1, absl::ZeroDuration(), {}), IsOk());
  absl::SleepFor(absl::Milliseconds(2));
  EXPECT_THAT(IdsOf(store().Expired(10)), ElementsAre("a"));
  ASSERT_THAT(store().RenewLease("a", 1, absl::Seconds(60), {}), IsOk());
  EXPECT_THAT(IdsOf(store().Expired(10)), IsEmpty());
  EXPECT_EQ(ReasonOf(GiveUp("a", lost).status()), "LEASE_LOST");

  // And once more: of all who see it, one gives it up.
  ASSERT_THAT(store().RenewLease("a", 1, absl::ZeroDuration(), {}), IsOk());
  absl::SleepFor(absl::Milliseconds(2));
  std::atomic<int> winners = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      if (GiveUp("a", lost).ok()) ++winners;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(winners, 1);
  EXPECT_EQ(Get("a").state(), v1::JOB_STATE_QUEUED);
  EXPECT_THAT(IdsOf(store().Expired(10)), IsEmpty());
}

TEST_P(JobStoreContract, SupersededWorkersAreFenced) {
  Create("a");
  Claim("a");
  Move("a", {v1::JOB_STATE_QUEUED});
  const auto check = [&](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    EXPECT_EQ(ReasonOf(status), "LEASE_LOST");
  };
  // Nobody holds it.
  check(store().RenewLease("a", 1, absl::Seconds(60), {}).status());
  Claim("a");
  // Somebody else does.
  check(store().RenewLease("a", 1, absl::Seconds(60), {}).status());
  check(store().AddWarnings("a", 1, {"w"}).status());
  check(store().GiveUp("a", Lost(1)).status());
  for (const v1::JobState to : {v1::JOB_STATE_RUNNING, v1::JOB_STATE_FAILED}) {
    check(store().Transition("a", v1::JOB_STATE_PLANNING, to, {.lease_generation = 1}).status());
  }
  EXPECT_THAT(store().RenewLease("a", 2, absl::Seconds(60), {}), IsOk());
  EXPECT_EQ(Get("a").state(), v1::JOB_STATE_PLANNING);
  EXPECT_THAT(Sequences("a"), ElementsAre(1, 2, 3, 4));
}

TEST_P(JobStoreContract, RenewalKeepsProgressAndMakesNoEvent) {
  Create("a");
  Claim("a");
  v1::Progress progress;
  progress.set_written_bytes(99);
  const auto renewed = store().RenewLease("a", 1, absl::Seconds(5), progress);
  ASSERT_THAT(renewed, IsOk());
  EXPECT_FALSE(renewed->cancel_requested());
  EXPECT_EQ(Get("a").progress().written_bytes(), 99);
  EXPECT_THAT(Sequences("a"), ElementsAre(1, 2));
  ASSERT_THAT(store().RequestCancel("a"), IsOk());
  EXPECT_TRUE(store().RenewLease("a", 1, absl::Seconds(5), progress)->cancel_requested());
}

TEST_P(JobStoreContract, WarningsAreEventsOnceAndBounded) {
  Create("a");
  Claim("a");
  ASSERT_THAT(store().AddWarnings("a", 1, {"one", "two"}), IsOk());
  ASSERT_THAT(store().AddWarnings("a", 1, {"two", "three"}), IsOk());
  EXPECT_THAT(Get("a").warnings(), ElementsAre("one", "two", "three"));
  EXPECT_THAT(Sequences("a"), ElementsAre(1, 2, 3, 4, 5));
  const auto events = store().Events("a", 2, 1);
  ASSERT_THAT(events, IsOk());
  ASSERT_EQ(events->size(), 1u);
  EXPECT_EQ((*events)[0].warning(), "one");

  std::vector<std::string> many;
  for (int i = 0; i < 2 * JobStore::kMaxWarnings; ++i) many.push_back(absl::StrCat("w", i));
  ASSERT_THAT(store().AddWarnings("a", 1, many), IsOk());
  EXPECT_EQ(Get("a").warnings_size(), JobStore::kMaxWarnings);
}

TEST_P(JobStoreContract, EventsAreNumberedWithoutGapsUnderConcurrency) {
  Create("a");
  Claim("a");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int k = 0; k < 10; ++k) {
        EXPECT_THAT(store().AddWarnings("a", 1, {absl::StrCat(i, "/", k)}), IsOk());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::vector<int64_t> sequences = Sequences("a");
  ASSERT_EQ(sequences.size(), 42u);
  for (int i = 0; i < 42; ++i) EXPECT_EQ(sequences[i], i + 1);
  EXPECT_THAT(Sequences("a", 40), ElementsAre(41, 42));
}

TEST_P(JobStoreContract, CancelIsRemembered) {
  Create("a");
  Claim("a");
  ASSERT_THAT(store().RequestCancel("a"), IsOk());
  Reopen();
  EXPECT_TRUE(Get("a").cancel_requested());
  Move("a", {v1::JOB_STATE_CANCELLED});
  EXPECT_FALSE(Get("a").cancel_requested());
  // A final job is not changed.
  const auto job = store().RequestCancel("a");
  ASSERT_THAT(job, IsOk());
  EXPECT_FALSE(job->cancel_requested());
}

TEST_P(JobStoreContract, CancelOfAQueuedJobIsItsEnd) {
  Create("a");
  const auto job = store().RequestCancel("a");
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(job->error().reason(), "CANCELLED_BY_CLIENT");
  EXPECT_FALSE(job->cancel_requested());
  EXPECT_TRUE(NothingToClaim());
  EXPECT_THAT(store().RequestCancel("a"), IsOk());
  EXPECT_THAT(Sequences("a"), ElementsAre(1, 2));
}

TEST_P(JobStoreContract, ACancelledJobWhoseWorkerIsLostIsNotRepeated) {
  Create("a");
  Claim("a");
  ASSERT_THAT(store().RequestCancel("a"), IsOk());
  const auto job = GiveUp("a", Lost(1));
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(job->error().reason(), "CANCELLED_BY_CLIENT");
}

TEST_P(JobStoreContract, AJobThatMayHavePublishedIsRepeatedAndNotCancelled) {
  Create("a");
  Claim("a");
  Move("a", {v1::JOB_STATE_RUNNING, v1::JOB_STATE_PUBLISHING});
  ASSERT_THAT(store().RequestCancel("a"), IsOk());
  const auto job = GiveUp("a", Lost(1));
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->state(), v1::JOB_STATE_QUEUED);
  EXPECT_FALSE(job->cancel_requested());
  EXPECT_EQ(store().RequestCancel("a")->state(), v1::JOB_STATE_QUEUED);
  EXPECT_FALSE(Claim("a").cancel_requested());
  // Nor while the next attempt finds out, nor when that is lost, too.
  EXPECT_FALSE(store().RequestCancel("a")->cancel_requested());
  EXPECT_EQ(GiveUp("a", Lost(2))->state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(store().RequestCancel("a")->state(), v1::JOB_STATE_QUEUED);
  Claim("a");
  Move("a", {v1::JOB_STATE_RUNNING, v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_SUCCEEDED});
  EXPECT_FALSE(Get("a").perhaps_published());
}

TEST_P(JobStoreContract, ChangesCanBeMade) {
  EXPECT_THAT(store().Check(), IsOk());
  // It leaves no lock.
  Create("a");
  EXPECT_THAT(store().Check(), IsOk());
}

TEST_P(JobStoreContract, OnlyFinalJobsAreDeleted) {
  Create("a");
  auto refused = store().Delete("a");
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(refused), "JOB_NOT_FINAL");
  Move("a", {v1::JOB_STATE_CANCELLED});
  ASSERT_THAT(store().Delete("a"), IsOk());
  EXPECT_EQ(store().Get("a").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(store().Events("a", 0, 10).status().code(), absl::StatusCode::kNotFound);
}

TEST_P(JobStoreContract, QueueIsByPriorityThenAge) {
  Create("old");
  NewJob urgent = MakeJob("urgent");
  urgent.job.set_priority(5);
  Create(urgent);
  NewJob idle = MakeJob("idle");
  idle.job.set_priority(-5);
  Create(idle);
  Create("new");
  for (const char* id : {"urgent", "old", "new", "idle"}) Claim(id);
}

TEST_P(JobStoreContract, ProjectsTakeTurnsWhateverTheLengthOfTheirQueues) {
  for (int i = 0; i < 6; ++i) CreateIn("many", absl::StrCat("m", i));
  for (int i = 0; i < 3; ++i) CreateIn("few", absl::StrCat("f", i));
  for (const char* id : {"m0", "f0", "m1", "f1", "m2", "f2", "m3"}) Claim(id);
  // What has ended counts no more.
  for (const char* id : {"m0", "m1", "m2", "m3"}) Move(id, {v1::JOB_STATE_FAILED});
  CreateIn("few", "f3");
  Claim("m4");
}

TEST_P(JobStoreContract, SharesGoByWeight) {
  Reopen({"heavy:weight=2", "light:weight=1"});
  for (int i = 0; i < 6; ++i) {
    CreateIn("light", absl::StrCat("l", i));
    CreateIn("heavy", absl::StrCat("h", i));
  }
  // Of equal shares, 1/1 and 2/2, the one that has waited longer for a start.
  for (const char* id : {"l0", "h0", "h1", "l1", "h2", "h3"}) Claim(id);
}

TEST_P(JobStoreContract, PriorityGoesBeforeShare) {
  CreateIn("a", "a0");
  CreateIn("b", "b0", /*priority=*/3);
  CreateIn("b", "b1", /*priority=*/3);
  for (const char* id : {"b0", "b1", "a0"}) Claim(id);
}

TEST_P(JobStoreContract, OfProjectsThatRunNothingTheOneThatWaitsLongerGoesFirst) {
  for (int i = 0; i < 3; ++i) CreateIn("a", absl::StrCat("a", i));
  CreateIn("b", "b0");
  CreateIn("b", "b1");
  // One worker: nothing runs when the next is taken.
  for (const char* id : {"a0", "b0", "a1", "b1", "a2"}) {
    Claim(id);
    Move(id, {v1::JOB_STATE_FAILED});
    absl::SleepFor(absl::Milliseconds(2));
  }
}

TEST_P(JobStoreContract, AProjectRunsNoMoreThanItMay) {
  Reopen({"small:running=1", "*:running=2"});
  for (int i = 0; i < 3; ++i) CreateIn("small", absl::StrCat("s", i), /*priority=*/9);
  for (int i = 0; i < 3; ++i) CreateIn("other", absl::StrCat("o", i));
  for (const char* id : {"s0", "o0", "o1"}) Claim(id);
  EXPECT_TRUE(NothingToClaim());
  Move("o0", {v1::JOB_STATE_FAILED});
  Claim("o2");
  EXPECT_TRUE(NothingToClaim());
  ASSERT_THAT(GiveUp("s0", Lost(1)), IsOk());
  Claim("s0");
  Move("s0", {v1::JOB_STATE_FAILED});
  Claim("s1");
}

TEST_P(JobStoreContract, LimitsHoldWhoeverClaimsAtTheSameTime) {
  Reopen({"small:running=3"});
  for (int i = 0; i < 20; ++i) CreateIn("small", absl::StrCat("s", i));
  std::atomic<int> claimed = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 3; ++k) {
        const auto next = store().Claim("server", absl::Seconds(60));
        EXPECT_THAT(next, IsOk());
        if (next.ok() && next->job) ++claimed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(claimed, 3);
}

TEST_P(JobStoreContract, AProjectQueuesNoMoreThanItMay) {
  Reopen({"small:queued=2"});
  CreateIn("small", "s0");
  CreateIn("small", "s1");
  NewJob third = MakeJob("s2");
  third.job.set_project("small");
  const auto refused = store().Create(third, kQueueLimit);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(refused.status()), "QUOTA_JOBS");
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("small"));
  // Others may, and so may it when one has left the queue.
  CreateIn("other", "o0");
  Claim("s0");
  EXPECT_THAT(store().Create(third, kQueueLimit), IsOk());
}

TEST_P(JobStoreContract, QueueDeadlineEndsAJobThatNobodyTakes) {
  NewJob request = MakeJob("late");
  request.job.mutable_queue_deadline()->set_nanos(1'000'000);
  Create(request);
  Create("other");
  absl::SleepFor(absl::Milliseconds(5));
  Claim("other");
  EXPECT_TRUE(NothingToClaim());
  EXPECT_THAT(IdsOf(store().Overdue(10)), ElementsAre("late"));
  const auto failed = store().FailOverdue("late");
  ASSERT_THAT(failed, IsOk());
  EXPECT_EQ(failed->state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(failed->error().reason(), "QUEUE_DEADLINE");
  EXPECT_EQ(failed->error().code(), static_cast<int>(absl::StatusCode::kDeadlineExceeded));
  EXPECT_TRUE(failed->has_end_time());
  EXPECT_THAT(Sequences("late"), ElementsAre(1, 2));
  EXPECT_THAT(IdsOf(store().Overdue(10)), IsEmpty());
  EXPECT_EQ(ReasonOf(store().FailOverdue("late").status()), "STATE_CHANGED");
}

TEST_P(JobStoreContract, QueueDeadlineIsMetByTheFirstAttempt) {
  NewJob request = MakeJob("a");
  request.job.mutable_queue_deadline()->set_seconds(1);
  Create(request);
  EXPECT_EQ(ReasonOf(store().FailOverdue("a").status()), "STATE_CHANGED");
  Claim("a");
  Reopen();
  ASSERT_THAT(GiveUp("a", Lost(1)), IsOk());
  absl::SleepFor(absl::Milliseconds(1100));
  EXPECT_THAT(IdsOf(store().Overdue(10)), IsEmpty());
  Claim("a");
}

TEST_P(JobStoreContract, ALostAttemptBeyondItsDeadlineIsNotRepeated) {
  for (const char* id : {"run", "total"}) {
    NewJob request = MakeJob(id);
    google::protobuf::Duration& limit = id == std::string("run")
                                            ? *request.job.mutable_run_deadline()
                                            : *request.job.mutable_total_deadline();
    limit.set_nanos(50'000'000);
    Create(request);
    Claim(id);
    absl::SleepFor(absl::Milliseconds(60));
    const auto job = GiveUp(id, Lost(1));
    ASSERT_THAT(job, IsOk());
    EXPECT_EQ(job->state(), v1::JOB_STATE_FAILED);
    EXPECT_EQ(job->error().reason(), id == std::string("run") ? "RUN_DEADLINE" : "TOTAL_DEADLINE");
  }
}

TEST_P(JobStoreContract, EveryAttemptHasItsRunDeadline) {
  NewJob request = MakeJob("a");
  request.job.mutable_run_deadline()->set_nanos(500'000'000);
  Create(request);
  Claim("a");
  ASSERT_THAT(GiveUp("a", Lost(1)), IsOk());
  absl::SleepFor(absl::Milliseconds(600));
  EXPECT_THAT(IdsOf(store().Overdue(10)), IsEmpty());
  const v1::Job job = Claim("a");
  EXPECT_NE(job.attempt_time().SerializeAsString(), job.start_time().SerializeAsString());
  const auto again = GiveUp("a", Lost(2));
  ASSERT_THAT(again, IsOk());
  EXPECT_EQ(again->state(), v1::JOB_STATE_QUEUED);
}

TEST_P(JobStoreContract, TotalDeadlineEndsAJobThatWaitsAgain) {
  NewJob request = MakeJob("a");
  request.job.mutable_total_deadline()->set_nanos(300'000'000);
  Create(request);
  Claim("a");
  ASSERT_THAT(GiveUp("a", Lost(1)), IsOk());
  absl::SleepFor(absl::Milliseconds(310));
  EXPECT_TRUE(NothingToClaim());
  ASSERT_THAT(store().FailOverdue("a"), IsOk());
  EXPECT_EQ(Get("a").error().reason(), "TOTAL_DEADLINE");
}

TEST_P(JobStoreContract, HeldJobsAreThoseOfAServersWorkers) {
  for (const char* id : {"planning", "running", "failed", "other", "queued"}) Create(id);
  Claim("planning");
  Claim("running");
  Move("running", {v1::JOB_STATE_RUNNING});
  Claim("failed");
  Move("failed", {v1::JOB_STATE_FAILED});
  ASSERT_THAT(store().Claim("another", absl::Seconds(60)), IsOk());
  Reopen();
  EXPECT_THAT(IdsOf(store().Held("server")), ElementsAre("planning", "running"));
  EXPECT_THAT(IdsOf(store().Held("another")), ElementsAre("other"));
  EXPECT_THAT(IdsOf(store().Held("nobody")), IsEmpty());
}

TEST_P(JobStoreContract, ListIsNewestFirstByPage) {
  for (const char* id : {"a", "b", "c", "d", "e"}) Create(id);
  const auto first = store().List({}, 2, 0);
  ASSERT_THAT(first, IsOk());
  ASSERT_EQ(first->jobs.size(), 2u);
  EXPECT_EQ(first->jobs[0].id(), "e");
  EXPECT_EQ(first->jobs[1].id(), "d");
  EXPECT_EQ(first->jobs[0].recipe(), "");
  // A new job does not shift the pages.
  Create("f");
  const auto second = store().List({}, 2, first->next);
  ASSERT_THAT(second, IsOk());
  ASSERT_EQ(second->jobs.size(), 2u);
  EXPECT_EQ(second->jobs[0].id(), "c");
  const auto third = store().List({}, 2, second->next);
  ASSERT_THAT(third, IsOk());
  ASSERT_EQ(third->jobs.size(), 1u);
  EXPECT_EQ(third->jobs[0].id(), "a");
  EXPECT_EQ(third->next, 0);
  // A last page that is full has none after it.
  const auto all = store().List({}, 6, 0);
  ASSERT_THAT(all, IsOk());
  EXPECT_EQ(all->next, 0);
}

TEST_P(JobStoreContract, ListFiltersByStateAndLabels) {
  NewJob a = MakeJob("a");
  (*a.job.mutable_labels())["team"] = "nlp";
  (*a.job.mutable_labels())["run"] = "1";
  Create(a);
  NewJob b = MakeJob("b");
  (*b.job.mutable_labels())["team"] = "nlp";
  Create(b);
  NewJob c = MakeJob("c");
  (*c.job.mutable_labels())["team"] = "vision'; DROP TABLE jobs; --";
  Create(c);
  Move("b", {v1::JOB_STATE_PLANNING});

  v1::JobFilter filter;
  (*filter.mutable_labels())["team"] = "nlp";
  EXPECT_THAT(ListIds(filter), ElementsAre("b", "a"));
  filter.add_states(v1::JOB_STATE_QUEUED);
  EXPECT_THAT(ListIds(filter), ElementsAre("a"));
  filter.add_states(v1::JOB_STATE_PLANNING);
  EXPECT_THAT(ListIds(filter), ElementsAre("b", "a"));
  (*filter.mutable_labels())["run"] = "1";
  EXPECT_THAT(ListIds(filter), ElementsAre("a"));
  (*filter.mutable_labels())["run"] = "2";
  EXPECT_THAT(ListIds(filter), IsEmpty());
  v1::JobFilter project;
  project.set_project("other");
  EXPECT_THAT(ListIds(project), IsEmpty());
  CreateIn("other", "d");
  EXPECT_THAT(ListIds(project), ElementsAre("d"));
  v1::JobFilter quoted;
  (*quoted.mutable_labels())["team"] = "vision'; DROP TABLE jobs; --";
  EXPECT_THAT(ListIds(quoted), ElementsAre("c"));
}

}  // namespace pewter::server
