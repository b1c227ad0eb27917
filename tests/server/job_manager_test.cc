#include "server/job_manager.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/errors.h"
#include "server/jobs/job_state.h"
#include "tests/server/fake_executor.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::pewter::testing::IsOk;
using ::pewter::testing::StatusIs;
using ::pewter::testing::TempFolder;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kRecipe[] =
    "models:\n"
    "  - model: /models/a\n"
    "    parameters: {weight: 1}\n"
    "  - model: hf://org/b\n"
    "    parameters: {weight: 1}\n"
    "merge_method: linear\n";

class JobManagerTest : public ::testing::Test {
 protected:
  void SetUp() override { Start({}); }

  // A server on the same database; the last one, if any, is gone without a word.
  void Start(const JobManagerOptions& options, const std::vector<std::string>& projects = {}) {
    manager_.reset();
    log_ = std::make_unique<FakeExecutor::Log>();
    auto store = OpenJobStore(absl::StrCat("sqlite:", folder_ / "jobs.db"),
                              ProjectPolicy::Make(projects).value());
    ASSERT_THAT(store, IsOk());
    manager_ = std::make_unique<JobManager>(*std::move(store), options);
    ASSERT_THAT(manager_->Start(std::make_unique<FakeExecutor>(log_.get())), IsOk());
  }
  void TearDown() override { manager_.reset(); }

  v1::CreateJobRequest Request(const std::string& name) {
    v1::CreateJobRequest request;
    request.set_recipe(kRecipe);
    request.set_destination_uri(folder_ / name);
    return request;
  }
  std::string Create(const std::string& name) {
    const auto job = manager_->Create(Request(name));
    EXPECT_THAT(job, IsOk());
    return job.ok() ? job->id() : "";
  }
  v1::Job Get(const std::string& id) {
    const auto job = manager_->Get(id);
    EXPECT_THAT(job, IsOk());
    return job.ok() ? *job : v1::Job();
  }
  v1::Job WaitForState(const std::string& id, v1::JobState state) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (absl::Now() < deadline) {
      v1::Job job = Get(id);
      if (job.state() == state) return job;
      absl::SleepFor(absl::Milliseconds(2));
    }
    ADD_FAILURE() << "job is " << Get(id).DebugString();
    return {};
  }
  // The n-th launch, claimed.
  v1::Job ClaimLaunch(size_t n) {
    const WorkerLaunch launch = log_->WaitForLaunch(n);
    v1::ClaimJobRequest request;
    request.set_job_id(launch.job_id);
    const auto claim = manager_->Claim(launch.token, request);
    EXPECT_THAT(claim, IsOk());
    token_ = launch.token;
    return claim.ok() ? claim->job() : v1::Job();
  }
  absl::StatusOr<v1::HeartbeatResponse> Beat(const v1::Job& job, v1::JobState state,
                                             int64_t written = 0) {
    v1::HeartbeatRequest request;
    request.set_job_id(job.id());
    request.set_lease_generation(job.lease_generation());
    request.set_state(state);
    request.mutable_progress()->set_written_bytes(written);
    return manager_->Heartbeat(token_, request);
  }
  absl::Status Finish(const v1::Job& job, const std::function<void(v1::FinishJobRequest&)>& fill) {
    v1::FinishJobRequest request;
    request.set_job_id(job.id());
    request.set_lease_generation(job.lease_generation());
    fill(request);
    return manager_->Finish(token_, request);
  }
  absl::Status Succeed(const v1::Job& job) {
    return Finish(job, [](auto& request) { request.mutable_output()->set_manifest_json("{}"); });
  }
  absl::StatusOr<v1::Job> Retry(const std::string& id, const std::string& request_id = "") {
    v1::RetryJobRequest request;
    request.set_job_id(id);
    request.set_request_id(request_id);
    return manager_->Retry(request);
  }
  absl::Status Delete(const std::string& id, bool force = false, bool outputs = false) {
    v1::DeleteJobRequest request;
    request.set_job_id(id);
    request.set_force(force);
    request.set_delete_outputs(outputs);
    return manager_->Delete(request, [] { return false; });
  }
  absl::StatusOr<std::vector<v1::JobEvent>> WatchAll(const std::string& id, int64_t after = 0) {
    std::vector<v1::JobEvent> events;
    v1::WatchJobRequest request;
    request.set_job_id(id);
    request.set_after_sequence(after);
    const absl::Status status = manager_->Watch(
        request,
        [&](const v1::JobEvent& event) {
          events.push_back(event);
          return true;
        },
        [] { return false; });
    if (!status.ok()) return status;
    return events;
  }
  static std::vector<v1::JobState> StatesOf(const std::vector<v1::JobEvent>& events) {
    std::vector<v1::JobState> states;
    for (const v1::JobEvent& event : events) {
      if (event.has_state_change()) states.push_back(event.state_change().state());
    }
    return states;
  }

  TempFolder folder_;
  std::unique_ptr<FakeExecutor::Log> log_;
  std::unique_ptr<JobManager> manager_;
  std::string token_;
  size_t launches_ = 0;
};

// Admission.

TEST_F(JobManagerTest, RefusesBadRequestsWithTheField) {
  struct Case {
    const char* field;
    const char* reason;
    const char* message;
    std::function<void(v1::CreateJobRequest&)> spoil;
  };
  const Case cases[] = {
      {"recipe", "RECIPE_INVALID", "empty", [](auto& r) { r.clear_recipe(); }},
      {"recipe", "RECIPE_INVALID", "recipe:1:", [](auto& r) { r.set_recipe("models: [}"); }},
      {"recipe", "RECIPE_INVALID", "1 MiB",
       [](auto& r) { r.set_recipe(std::string((1 << 20) + 1, ' ')); }},
      {"recipe", "RELATIVE_PATH", "models/a",
       [](auto& r) { r.set_recipe("models: [{model: models/a}]\nmerge_method: passthrough\n"); }},
      {"recipe", "RELATIVE_PATH", "adapters/b",
       [](auto& r) {
         r.set_recipe("models: [{model: /a+adapters/b}]\nmerge_method: passthrough\n");
       }},
      {"destination_uri", "DESTINATION_INVALID", "empty",
       [](auto& r) { r.clear_destination_uri(); }},
      {"destination_uri", "DESTINATION_INVALID", "out/here",
       [](auto& r) { r.set_destination_uri("out/here"); }},
      {"destination_uri", "DESTINATION_INVALID", "read-only",
       [](auto& r) { r.set_destination_uri("hf://org/model"); }},
      {"destination_uri", "DESTINATION_INVALID", "root",
       [](auto& r) { r.set_destination_uri("/tmp/.."); }},
      {"destination_uri", "DESTINATION_INVALID", "input",
       [](auto& r) { r.set_destination_uri("file:///models/./a/"); }},
      {"options.memory_bytes", "FIELD_INVALID", "negative",
       [](auto& r) { r.mutable_options()->set_memory_bytes(-1); }},
      {"options.device", "FIELD_INVALID", "tpu",
       [](auto& r) { r.mutable_options()->set_device("tpu"); }},
      {"options.threads", "FIELD_INVALID", "1024",
       [](auto& r) { r.mutable_options()->set_threads(5000); }},
      {"options.overrides[0].key", "FIELD_INVALID", "empty",
       [](auto& r) { r.mutable_options()->add_overrides(); }},
      {"priority", "FIELD_INVALID", "1000", [](auto& r) { r.set_priority(1001); }},
      {"request_id", "FIELD_INVALID", "printable", [](auto& r) { r.set_request_id("a b"); }},
      {"project", "FIELD_INVALID", "a-z", [](auto& r) { r.set_project("NLP"); }},
      {"queue_deadline", "FIELD_INVALID", "positive",
       [](auto& r) { r.mutable_queue_deadline()->set_seconds(0); }},
      {"run_deadline", "FIELD_INVALID", "positive",
       [](auto& r) { r.mutable_run_deadline()->set_seconds(-1); }},
      {"total_deadline", "FIELD_INVALID", "ten years",
       [](auto& r) { r.mutable_total_deadline()->set_seconds(int64_t{1} << 40); }},
      {"on_existing", "FIELD_INVALID", "OnExisting",
       [](auto& r) { r.set_on_existing(static_cast<v1::OnExisting>(99)); }},
      {"on_existing", "FIELD_INVALID", "overwrite",
       [](auto& r) {
         r.set_on_existing(v1::ON_EXISTING_FAIL);
         r.mutable_options()->set_overwrite(true);
       }},
      {"destination_uri", "DESTINATION_INVALID", "versions",
       [](auto& r) {
         r.set_destination_uri("artifact://merged");
         r.set_on_existing(v1::ON_EXISTING_NEW_VERSION);
       }},
      {"labels", "FIELD_INVALID", "keys", [](auto& r) { (*r.mutable_labels())[""] = "x"; }},
  };
  for (const Case& c : cases) {
    v1::CreateJobRequest request = Request("out");
    c.spoil(request);
    const absl::Status status = manager_->Create(request).status();
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(c.message)));
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.field));
    EXPECT_EQ(ReasonOf(status), c.reason) << status;
  }
  EXPECT_EQ(manager_->List({})->jobs_size(), 0);
}

TEST_F(JobManagerTest, TellsAllViolationsAtOnce) {
  v1::CreateJobRequest request = Request("out");
  request.set_priority(5000);
  request.clear_destination_uri();
  request.clear_recipe();
  const std::string message(manager_->Create(request).status().message());
  EXPECT_THAT(message, HasSubstr("priority"));
  EXPECT_THAT(message, HasSubstr("destination_uri"));
  EXPECT_THAT(message, HasSubstr("recipe"));
}

TEST_F(JobManagerTest, OverridesAreCheckedWithTheRecipe) {
  v1::CreateJobRequest request = Request("out");
  v1::RecipeOverride* override = request.mutable_options()->add_overrides();
  override->set_key("dtype");
  override->set_value("float99");
  EXPECT_THAT(manager_->Create(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("float99")));
}

TEST_F(JobManagerTest, EqualPlacesAreOneDestination) {
  const std::string id = Create("out");
  for (const std::string& name : {folder_ / "out/", absl::StrCat(folder_.path(), "/x/../out"),
                                  absl::StrCat("file://", folder_ / "out")}) {
    v1::CreateJobRequest request = Request("out");
    request.set_destination_uri(name);
    EXPECT_THAT(manager_->Create(request),
                StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr(id)))
        << name;
  }
}

TEST_F(JobManagerTest, SameRequestIsOneJob) {
  v1::CreateJobRequest request = Request("out");
  request.set_request_id("r1");
  const auto first = manager_->Create(request);
  const auto second = manager_->Create(request);
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(first->id(), second->id());
  request.set_priority(1);
  EXPECT_EQ(ReasonOf(manager_->Create(request).status()), "REQUEST_ID_REUSED");
}

// Running.

TEST_F(JobManagerTest, JobRunsToSuccess) {
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  EXPECT_EQ(job.id(), id);
  EXPECT_EQ(job.recipe(), kRecipe);
  ASSERT_THAT(Beat(job, v1::JOB_STATE_RUNNING, 10), IsOk());
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(Get(id).progress().written_bytes(), 10);
  ASSERT_THAT(Succeed(job), IsOk());
  log_->End({.job_id = id});
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_SUCCEEDED);
  const auto events = WatchAll(id);
  ASSERT_THAT(events, IsOk());
  EXPECT_THAT(StatesOf(*events),
              ElementsAre(v1::JOB_STATE_QUEUED, v1::JOB_STATE_PLANNING, v1::JOB_STATE_RUNNING,
                          v1::JOB_STATE_PUBLISHING, v1::JOB_STATE_SUCCEEDED));
}

TEST_F(JobManagerTest, FailureOfTheMergeIsTheJobs) {
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  ASSERT_THAT(Finish(job,
                     [](auto& request) {
                       request.mutable_error()->set_code(6);
                       request.mutable_error()->set_reason("OUTPUT_EXISTS");
                       request.add_warnings("by the way");
                     }),
              IsOk());
  const v1::Job failed = Get(id);
  EXPECT_EQ(failed.state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(failed.error().reason(), "OUTPUT_EXISTS");
  EXPECT_THAT(failed.warnings(), ElementsAre("by the way"));
}

TEST_F(JobManagerTest, RunsAsManyAsItMayAndTheUrgentFirst) {
  Start({.workers = 2});
  Create("a");
  Create("b");
  log_->WaitForLaunch(2);
  const std::string waiting = Create("c");
  v1::CreateJobRequest urgent = Request("d");
  urgent.set_priority(1);
  const auto urgent_job = manager_->Create(urgent);
  ASSERT_THAT(urgent_job, IsOk());
  absl::SleepFor(absl::Milliseconds(50));
  {
    absl::MutexLock lock(&log_->mutex);
    EXPECT_EQ(log_->launches.size(), 2u);
  }
  const v1::Job first = ClaimLaunch(1);
  ASSERT_THAT(Succeed(first), IsOk());
  log_->End({.job_id = first.id()});
  EXPECT_EQ(log_->WaitForLaunch(3).job_id, urgent_job->id());
  EXPECT_EQ(Get(waiting).state(), v1::JOB_STATE_QUEUED);
}

TEST_F(JobManagerTest, AMachineThatCannotStartWorkersCostsNoAttempts) {
  {
    absl::MutexLock lock(&log_->mutex);
    log_->submit_status = absl::UnavailableError("no processes left");
  }
  const std::string id = Create("out");
  absl::SleepFor(absl::Milliseconds(50));
  {
    absl::MutexLock lock(&log_->mutex);
    log_->submit_status = absl::OkStatus();
  }
  EXPECT_EQ(ClaimLaunch(1).attempt(), 1);
  EXPECT_EQ(Get(id).attempt(), 1);
}

// Leases.

TEST_F(JobManagerTest, LostWorkerIsReplacedUntilAttemptsRunOut) {
  Start({.retry_delay = absl::Milliseconds(1), .max_attempts = 3});
  const std::string id = Create("out");
  for (int attempt = 1; attempt <= 3; ++attempt) {
    const v1::Job job = ClaimLaunch(attempt);
    EXPECT_EQ(job.attempt(), attempt);
    EXPECT_EQ(job.lease_generation(), attempt);
    ASSERT_THAT(Beat(job, v1::JOB_STATE_RUNNING), IsOk());
    log_->End({.job_id = id, .signal = 9, .stderr_tail = "last words"});
  }
  const v1::Job failed = WaitForState(id, v1::JOB_STATE_FAILED);
  EXPECT_EQ(failed.error().reason(), "WORKER_LOST");
  EXPECT_THAT(failed.error().message(), HasSubstr("signal 9"));
  EXPECT_EQ(failed.error().metadata().at("stderr"), "last words");
  EXPECT_EQ(failed.error().metadata().at("attempts"), "3");
}

TEST_F(JobManagerTest, WorkerThatNeverClaimsCostsAnAttempt) {
  Start({.retry_delay = absl::Milliseconds(1), .max_attempts = 2});
  const std::string id = Create("out");
  log_->WaitForLaunch(1);
  log_->End({.job_id = id, .exit_code = 127});
  log_->WaitForLaunch(2);
  log_->End({.job_id = id, .exit_code = 127});
  EXPECT_THAT(WaitForState(id, v1::JOB_STATE_FAILED).error().message(), HasSubstr("code 127"));
}

TEST_F(JobManagerTest, SilentWorkerIsKilledAndOnlyThenReplaced) {
  Start({.lease = absl::Milliseconds(60), .retry_delay = absl::Milliseconds(1)});
  {
    absl::MutexLock lock(&log_->mutex);
    log_->kill_ends_worker = false;
  }
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  ASSERT_TRUE(log_->WaitFor([&] { return !log_->kills.empty(); }));
  // It takes its time to die: nobody else gets the job.
  absl::SleepFor(absl::Milliseconds(50));
  {
    absl::MutexLock lock(&log_->mutex);
    EXPECT_EQ(log_->launches.size(), 1u);
  }
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_PLANNING);
  log_->End({.job_id = id, .signal = 9});
  const v1::Job next = ClaimLaunch(2);
  EXPECT_EQ(next.lease_generation(), 2);

  // What the first one still says is refused.
  const auto beat = Beat(job, v1::JOB_STATE_PUBLISHING);
  EXPECT_EQ(beat.status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ReasonOf(beat.status()), "LEASE_LOST");
  EXPECT_EQ(ReasonOf(Succeed(job)), "LEASE_LOST");
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_PLANNING);
  EXPECT_THAT(Succeed(next), IsOk());
}

TEST_F(JobManagerTest, HeartbeatsKeepTheLease) {
  Start({.lease = absl::Seconds(1)});
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  const absl::Time end = absl::Now() + absl::Milliseconds(2500);
  while (absl::Now() < end) {
    ASSERT_THAT(Beat(job, v1::JOB_STATE_RUNNING), IsOk());
    absl::SleepFor(absl::Milliseconds(20));
  }
  absl::MutexLock lock(&log_->mutex);
  EXPECT_THAT(log_->kills, IsEmpty());
}

TEST_F(JobManagerTest, TokensAreOfOneJob) {
  Start({.workers = 2});
  Create("a");
  Create("b");
  const WorkerLaunch a = log_->WaitForLaunch(1);
  const WorkerLaunch b = log_->WaitForLaunch(2);
  EXPECT_NE(a.token, b.token);
  EXPECT_GE(a.token.size(), 32u);
  v1::ClaimJobRequest request;
  request.set_job_id(a.job_id);
  for (const std::string& token : {b.token, std::string(), absl::StrCat(a.token, "x")}) {
    const auto claim = manager_->Claim(token, request);
    EXPECT_EQ(claim.status().code(), absl::StatusCode::kUnauthenticated);
    EXPECT_EQ(ReasonOf(claim.status()), "TOKEN_INVALID");
  }
  EXPECT_THAT(manager_->Claim(a.token, request), IsOk());
  EXPECT_EQ(ReasonOf(manager_->Claim(a.token, request).status()), "LEASE_LOST");
}

TEST_F(JobManagerTest, FinishCountsOnce) {
  Create("out");
  const v1::Job job = ClaimLaunch(1);
  ASSERT_THAT(Succeed(job), IsOk());
  EXPECT_FALSE(Succeed(job).ok());
  EXPECT_FALSE(Beat(job, v1::JOB_STATE_RUNNING).ok());
}

// Cancelling and deleting.

TEST_F(JobManagerTest, QueuedJobIsCancelledAtOnce) {
  Create("a");
  log_->WaitForLaunch(1);
  const std::string id = Create("b");
  const auto job = manager_->Cancel(id);
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(job->error().reason(), "CANCELLED_BY_CLIENT");
  // Again: the same.
  EXPECT_EQ(manager_->Cancel(id)->SerializeAsString(), job->SerializeAsString());
}

TEST_F(JobManagerTest, JobCancelledBeforeItsWorkerClaimsIsNotClaimed) {
  const std::string id = Create("out");
  {
    absl::MutexLock lock(&log_->mutex);
    log_->kill_ends_worker = false;
  }
  const WorkerLaunch launch = log_->WaitForLaunch(1);
  EXPECT_TRUE(manager_->Cancel(id)->cancel_requested());
  // It is killed; if it still gets to ask, it is refused.
  v1::ClaimJobRequest request;
  request.set_job_id(id);
  EXPECT_EQ(manager_->Claim(launch.token, request).status().code(), absl::StatusCode::kCancelled);
  {
    absl::MutexLock lock(&log_->mutex);
    EXPECT_THAT(log_->kills, ElementsAre(id));
  }
  log_->End({.job_id = id, .signal = 9});
  WaitForState(id, v1::JOB_STATE_CANCELLED);
  // Its place is free.
  Create("b");
  EXPECT_NE(log_->WaitForLaunch(2).job_id, id);
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_CANCELLED);
}

TEST_F(JobManagerTest, RunningJobIsToldToStop) {
  for (const v1::JobState state :
       {v1::JOB_STATE_PLANNING, v1::JOB_STATE_RUNNING, v1::JOB_STATE_PUBLISHING}) {
    Start({});
    const std::string id = Create("out");
    const v1::Job job = ClaimLaunch(1);
    EXPECT_EQ(Beat(job, state)->stop(), v1::STOP_REASON_UNSPECIFIED);
    const auto asked = manager_->Cancel(id);
    ASSERT_THAT(asked, IsOk());
    EXPECT_TRUE(asked->cancel_requested());
    EXPECT_EQ(asked->state(), state);
    EXPECT_TRUE(manager_->Cancel(id)->cancel_requested());
    EXPECT_EQ(Beat(job, state)->stop(), v1::STOP_REASON_CANCEL);
    ASSERT_THAT(Finish(job, [](auto& request) { request.mutable_error()->set_code(1); }), IsOk());
    EXPECT_EQ(Get(id).state(), v1::JOB_STATE_CANCELLED);
    EXPECT_FALSE(Get(id).cancel_requested());
    EXPECT_EQ(manager_->Cancel(id)->state(), v1::JOB_STATE_CANCELLED);
    log_->End({.job_id = id});
  }
}

TEST_F(JobManagerTest, CancelThatComesTooLateLetsTheJobSucceed) {
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  ASSERT_THAT(manager_->Cancel(id), IsOk());
  ASSERT_THAT(Succeed(job), IsOk());
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_SUCCEEDED);
}

TEST_F(JobManagerTest, WorkerThatIgnoresACancelIsKilled) {
  Start({.cancel_grace = absl::Milliseconds(30)});
  const std::string id = Create("out");
  ClaimLaunch(1);
  ASSERT_THAT(manager_->Cancel(id), IsOk());
  EXPECT_EQ(WaitForState(id, v1::JOB_STATE_CANCELLED).attempt(), 1);
  absl::MutexLock lock(&log_->mutex);
  EXPECT_THAT(log_->kills, Contains(id));
}

TEST_F(JobManagerTest, DeleteIsForFinalJobs) {
  const std::string id = Create("out");
  EXPECT_EQ(ReasonOf(Delete(id)), "JOB_NOT_FINAL");
  ASSERT_THAT(manager_->Cancel(id), IsOk());
  WaitForState(id, v1::JOB_STATE_CANCELLED);
  EXPECT_THAT(Delete(id), IsOk());
  EXPECT_EQ(ReasonOf(Delete(id)), "JOB_NOT_FOUND");
  EXPECT_EQ(ReasonOf(manager_->Get(id).status()), "JOB_NOT_FOUND");
}

TEST_F(JobManagerTest, ForceCancelsAndWaits) {
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  absl::Status deleted = absl::UnknownError("not yet");
  std::thread deleting([&] { deleted = Delete(id, /*force=*/true); });
  const absl::Time end = absl::Now() + absl::Seconds(30);
  while (absl::Now() < end && Beat(job, v1::JOB_STATE_RUNNING)->stop() != v1::STOP_REASON_CANCEL) {
    absl::SleepFor(absl::Milliseconds(2));
  }
  ASSERT_THAT(Finish(job, [](auto& request) { request.mutable_error()->set_code(1); }), IsOk());
  deleting.join();
  EXPECT_THAT(deleted, IsOk());
  EXPECT_EQ(ReasonOf(manager_->Get(id).status()), "JOB_NOT_FOUND");
  // A queued one ends at once.
  Create("b");
  EXPECT_THAT(Delete(Create("c"), /*force=*/true), IsOk());
}

TEST_F(JobManagerTest, AForcedDeleteDoesNotWaitForEver) {
  Start({.delete_wait = absl::Milliseconds(50)});
  const std::string id = Create("out");
  ClaimLaunch(1);
  EXPECT_EQ(ReasonOf(Delete(id, /*force=*/true)), "JOB_NOT_FINAL");
  EXPECT_TRUE(Get(id).cancel_requested());
}

// Of a job that has left a model: a manifest and one file.
TEST_F(JobManagerTest, OutputsGoWithTheirJobAndNothingElse) {
  constexpr char kManifest[] =
      R"({"fingerprint": "f1", "files": [{"name": "model.safetensors", "bytes": 1, "sha256": ""}]})";
  constexpr char kOther[] = R"({"fingerprint": "f2", "files": []})";
  const std::string manifest = folder_.Write("out/pewter_manifest.json", kManifest);
  const std::string model = folder_.Write("out/model.safetensors", "x");
  const std::string mine = folder_.Write("out/mine.txt", "x");
  const auto run = [&] {
    const std::string id = Create("out");
    const v1::Job job = ClaimLaunch(++launches_);
    EXPECT_THAT(Finish(job,
                       [&](auto& request) {
                         request.mutable_output()->set_uri(folder_ / "out");
                         request.mutable_output()->set_manifest_json(kManifest);
                         request.mutable_output()->set_fingerprint("f1");
                       }),
                IsOk());
    log_->End({.job_id = id});
    return id;
  };
  std::string id = run();
  folder_.Write("out/pewter_manifest.json", kOther);
  EXPECT_EQ(ReasonOf(Delete(id, false, /*outputs=*/true)), "OUTPUT_CHANGED");
  EXPECT_THAT(manager_->Get(id), IsOk());
  EXPECT_EQ(access(model.c_str(), F_OK), 0);

  folder_.Write("out/pewter_manifest.json", kManifest);
  EXPECT_THAT(Delete(id, false, /*outputs=*/true), IsOk());
  EXPECT_NE(access(manifest.c_str(), F_OK), 0);
  EXPECT_NE(access(model.c_str(), F_OK), 0);
  EXPECT_EQ(access(mine.c_str(), F_OK), 0);

  // A run has begun to replace what this job has left.
  id = run();
  folder_.Write("out/.pewter-state.json", "{}");
  folder_.Write("out/model.safetensors", "y");
  EXPECT_EQ(ReasonOf(Delete(id, false, /*outputs=*/true)), "OUTPUT_CHANGED");
  EXPECT_EQ(access(model.c_str(), F_OK), 0);
  // Without them the record alone goes.
  EXPECT_THAT(Delete(id), IsOk());
  EXPECT_EQ(access(model.c_str(), F_OK), 0);
}

// Retrying.

TEST_F(JobManagerTest, ARetryIsANewJobOfTheSameRequest) {
  v1::CreateJobRequest request = Request("out");
  request.set_request_id("r1");
  request.set_priority(3);
  request.set_project("nlp");
  (*request.mutable_labels())["team"] = "x";
  request.mutable_options()->set_seed(7);
  request.mutable_run_deadline()->set_seconds(600);
  request.set_on_existing(v1::ON_EXISTING_REUSE_IF_IDENTICAL);
  const auto first = manager_->Create(request);
  ASSERT_THAT(first, IsOk());
  EXPECT_EQ(ReasonOf(Retry(first->id()).status()), "JOB_NOT_FINAL");
  ASSERT_THAT(manager_->Cancel(first->id()), IsOk());
  WaitForState(first->id(), v1::JOB_STATE_CANCELLED);

  const auto again = Retry(first->id(), "r2");
  ASSERT_THAT(again, IsOk());
  EXPECT_NE(again->id(), first->id());
  EXPECT_EQ(again->retry_of(), first->id());
  EXPECT_EQ(again->request_id(), "r2");
  EXPECT_EQ(again->state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(again->project(), "nlp");
  EXPECT_EQ(again->recipe(), first->recipe());
  EXPECT_EQ(again->destination_uri(), first->destination_uri());
  EXPECT_EQ(again->priority(), 3);
  EXPECT_EQ(again->labels().at("team"), "x");
  EXPECT_EQ(again->options().seed(), 7u);
  EXPECT_EQ(again->run_deadline().seconds(), 600);
  EXPECT_EQ(again->on_existing(), v1::ON_EXISTING_REUSE_IF_IDENTICAL);
  EXPECT_EQ(Get(first->id()).state(), v1::JOB_STATE_CANCELLED);

  // The same call gives the same job; the same id for anything else is refused.
  EXPECT_EQ(Retry(first->id(), "r2")->id(), again->id());
  EXPECT_EQ(ReasonOf(Retry(first->id(), "r1").status()), "REQUEST_ID_REUSED");
  request.set_request_id("r2");
  EXPECT_EQ(ReasonOf(manager_->Create(request).status()), "REQUEST_ID_REUSED");
  // Two jobs do not write one place.
  EXPECT_EQ(ReasonOf(Retry(first->id()).status()), "DESTINATION_BUSY");
  EXPECT_EQ(ReasonOf(Retry("none").status()), "JOB_NOT_FOUND");
}

TEST_F(JobManagerTest, ARetryIsAdmittedAnew) {
  const std::string id = Create("out");
  ASSERT_THAT(manager_->Cancel(id), IsOk());
  WaitForState(id, v1::JOB_STATE_CANCELLED);
  Start({.access = AccessPolicy::Make({}, {"s3://elsewhere"}).value()});
  EXPECT_EQ(ReasonOf(Retry(id).status()), "OUTPUT_PREFIX_DENIED");
  EXPECT_EQ(ReasonOf(Retry(id, "a b").status()), "FIELD_INVALID");
}

// Projects and deadlines.

TEST_F(JobManagerTest, LimitsOfAProjectHold) {
  Start({.workers = 4}, {"small:running=1,queued=1"});
  const auto create = [&](const std::string& name) {
    v1::CreateJobRequest request = Request(name);
    request.set_project("small");
    return manager_->Create(request);
  };
  ASSERT_THAT(create("a"), IsOk());
  const v1::Job running = ClaimLaunch(1);
  ASSERT_THAT(create("b"), IsOk());
  EXPECT_EQ(ReasonOf(create("c").status()), "QUOTA_JOBS");
  absl::SleepFor(absl::Milliseconds(50));
  {
    absl::MutexLock lock(&log_->mutex);
    EXPECT_EQ(log_->launches.size(), 1u);
  }
  ASSERT_THAT(Succeed(running), IsOk());
  log_->End({.job_id = running.id()});
  EXPECT_NE(log_->WaitForLaunch(2).job_id, running.id());
}

TEST_F(JobManagerTest, QueuedJobBeyondItsDeadlineFails) {
  Start({.look = absl::Milliseconds(20)});
  Create("a");
  log_->WaitForLaunch(1);
  v1::CreateJobRequest request = Request("b");
  request.mutable_queue_deadline()->set_nanos(30'000'000);
  const auto job = manager_->Create(request);
  ASSERT_THAT(job, IsOk());
  const v1::Job failed = WaitForState(job->id(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(failed.error().reason(), "QUEUE_DEADLINE");
  EXPECT_EQ(failed.error().code(), 4);
  EXPECT_EQ(failed.attempt(), 0);
}

TEST_F(JobManagerTest, RunningJobBeyondItsDeadlineIsToldToStop) {
  v1::CreateJobRequest request = Request("out");
  request.mutable_run_deadline()->set_seconds(2);
  request.mutable_total_deadline()->set_seconds(100);
  const auto created = manager_->Create(request);
  ASSERT_THAT(created, IsOk());
  const v1::Job job = ClaimLaunch(1);
  EXPECT_EQ(Beat(job, v1::JOB_STATE_RUNNING)->stop(), v1::STOP_REASON_UNSPECIFIED);
  const absl::Time end = absl::Now() + absl::Seconds(30);
  v1::StopReason stop = v1::STOP_REASON_UNSPECIFIED;
  while (stop == v1::STOP_REASON_UNSPECIFIED && absl::Now() < end) {
    absl::SleepFor(absl::Milliseconds(5));
    stop = Beat(job, v1::JOB_STATE_RUNNING)->stop();
  }
  EXPECT_EQ(stop, v1::STOP_REASON_DEADLINE);
  ASSERT_THAT(Finish(job, [](auto& request) { request.mutable_error()->set_code(1); }), IsOk());
  const v1::Job failed = Get(job.id());
  EXPECT_EQ(failed.state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(failed.error().reason(), "RUN_DEADLINE");
  EXPECT_EQ(failed.error().metadata().at("limit"), "2s");
}

TEST_F(JobManagerTest, WorkerThatIgnoresADeadlineIsKilled) {
  Start({.cancel_grace = absl::Milliseconds(30)});
  v1::CreateJobRequest request = Request("out");
  request.mutable_total_deadline()->set_seconds(3);
  const auto created = manager_->Create(request);
  ASSERT_THAT(created, IsOk());
  ClaimLaunch(1);
  const v1::Job failed = WaitForState(created->id(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(failed.error().reason(), "TOTAL_DEADLINE");
  EXPECT_EQ(failed.attempt(), 1);
  absl::MutexLock lock(&log_->mutex);
  EXPECT_THAT(log_->kills, Contains(created->id()));
}

TEST_F(JobManagerTest, AMergeThatIsDoneIsDoneWhateverTheDeadline) {
  v1::CreateJobRequest request = Request("out");
  request.mutable_run_deadline()->set_seconds(2);
  ASSERT_THAT(manager_->Create(request), IsOk());
  const v1::Job job = ClaimLaunch(1);
  absl::SleepFor(absl::Milliseconds(2100));
  ASSERT_THAT(Succeed(job), IsOk());
  EXPECT_EQ(Get(job.id()).state(), v1::JOB_STATE_SUCCEEDED);
}

// Restarts.

TEST_F(JobManagerTest, JobsOutliveTheServer) {
  const std::string running = Create("a");
  const v1::Job job = ClaimLaunch(1);
  ASSERT_THAT(Beat(job, v1::JOB_STATE_RUNNING), IsOk());
  const std::string queued = Create("b");
  std::string old_token = token_;
  Start({.retry_delay = absl::Milliseconds(1)});
  EXPECT_EQ(Get(running).error().reason(), "WORKER_LOST");
  std::vector<std::string> ids;
  for (int i = 1; i <= 2; ++i) {
    const v1::Job next = ClaimLaunch(i);
    ids.push_back(next.id());
    EXPECT_EQ(next.attempt(), next.id() == running ? 2 : 1);
    // The worker of the last server is a stranger.
    if (next.id() == running) {
      std::swap(token_, old_token);
      EXPECT_FALSE(Beat(job, v1::JOB_STATE_RUNNING).ok());
      std::swap(token_, old_token);
    }
    ASSERT_THAT(Succeed(next), IsOk());
    log_->End({.job_id = next.id()});
  }
  EXPECT_THAT(ids, ::testing::UnorderedElementsAre(running, queued));
}

TEST_F(JobManagerTest, CancelIsRememberedOverARestart) {
  const std::string id = Create("out");
  ClaimLaunch(1);
  ASSERT_THAT(manager_->Cancel(id), IsOk());
  Start({});
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_CANCELLED);
}

TEST_F(JobManagerTest, DrainLeavesJobsQueuedAndCountsNoAttempt) {
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  ASSERT_THAT(Beat(job, v1::JOB_STATE_RUNNING), IsOk());
  std::thread drain([&] { manager_->Drain(absl::Seconds(30)); });
  ASSERT_TRUE(log_->WaitFor([&] { return !log_->stops.empty(); }));
  EXPECT_EQ(Beat(job, v1::JOB_STATE_RUNNING)->stop(), v1::STOP_REASON_DRAIN);
  const absl::Status refused = manager_->Create(Request("b")).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(refused), "DRAINING");
  ASSERT_THAT(Finish(job, [](auto& request) { request.mutable_yielded(); }), IsOk());
  log_->End({.job_id = id});
  drain.join();
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Get(id).attempt(), 0);
  Start({});
  EXPECT_EQ(ClaimLaunch(1).attempt(), 1);
}

TEST_F(JobManagerTest, DrainKillsWhoDoesNotStop) {
  const std::string id = Create("out");
  ClaimLaunch(1);
  manager_->Drain(absl::Milliseconds(20));
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Get(id).attempt(), 0);
  absl::MutexLock lock(&log_->mutex);
  EXPECT_THAT(log_->kills, ElementsAre(id));
}

// Watching.

TEST_F(JobManagerTest, WatchFollowsAJobAsItHappens) {
  const std::string id = Create("out");
  absl::Mutex mutex;
  std::vector<v1::JobEvent> seen;
  absl::Status ended;
  std::thread watcher([&] {
    v1::WatchJobRequest request;
    request.set_job_id(id);
    ended = manager_->Watch(
        request,
        [&](const v1::JobEvent& event) {
          absl::MutexLock lock(&mutex);
          seen.push_back(event);
          return true;
        },
        [] { return false; });
  });
  const auto wait_for = [&](const std::function<bool(const v1::JobEvent&)>& is_it) {
    const auto there = [&] { return std::any_of(seen.begin(), seen.end(), is_it); };
    absl::MutexLock lock(&mutex);
    return mutex.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(30));
  };
  const v1::Job job = ClaimLaunch(1);
  EXPECT_TRUE(wait_for([](const v1::JobEvent& event) {
    return event.state_change().state() == v1::JOB_STATE_PLANNING;
  }));
  ASSERT_THAT(Beat(job, v1::JOB_STATE_RUNNING, 55), IsOk());
  EXPECT_TRUE(
      wait_for([](const v1::JobEvent& event) { return event.progress().written_bytes() == 55; }));
  ASSERT_THAT(Succeed(job), IsOk());
  watcher.join();
  EXPECT_THAT(ended, IsOk());
  int64_t last = 0;
  for (const v1::JobEvent& event : seen) {
    if (event.has_progress()) {
      EXPECT_EQ(event.sequence(), last);
    } else {
      EXPECT_EQ(event.sequence(), last + 1);
      last = event.sequence();
    }
  }
  EXPECT_EQ(seen.back().state_change().state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(seen.back().state_change().output().manifest_json(), "{}");
}

TEST_F(JobManagerTest, WatchIsResumedWithoutGaps) {
  const std::string id = Create("out");
  const v1::Job job = ClaimLaunch(1);
  ASSERT_THAT(Succeed(job), IsOk());
  const auto all = WatchAll(id);
  ASSERT_THAT(all, IsOk());
  ASSERT_EQ(all->size(), 5u);
  for (int64_t after = 0; after <= 5; ++after) {
    const auto rest = WatchAll(id, after);
    ASSERT_THAT(rest, IsOk());
    ASSERT_EQ(static_cast<int64_t>(rest->size()), 5 - after);
    for (size_t i = 0; i < rest->size(); ++i) {
      EXPECT_EQ((*rest)[i].SerializeAsString(), (*all)[after + i].SerializeAsString());
    }
  }
  const auto ahead = WatchAll(id, 6);
  EXPECT_EQ(ahead.status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(ReasonOf(ahead.status()), "SEQUENCE_AHEAD");
  EXPECT_EQ(WatchAll("none").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(JobManagerTest, WatchesAreBoundedAndEndWhenTheServerStops) {
  Start({.max_watches = 1});
  const std::string id = Create("out");
  std::atomic<bool> watching = false;
  absl::Status ended;
  std::thread watcher([&] {
    v1::WatchJobRequest request;
    request.set_job_id(id);
    ended = manager_->Watch(
        request,
        [&](const v1::JobEvent&) {
          watching = true;
          return true;
        },
        [] { return false; });
  });
  while (!watching) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(ReasonOf(WatchAll(id).status()), "TOO_MANY_WATCHES");
  manager_->Drain(absl::ZeroDuration());
  watcher.join();
  EXPECT_EQ(ReasonOf(ended), "DRAINING");
}

TEST_F(JobManagerTest, WatchEndsWhenTheClientIsGone) {
  const std::string id = Create("out");
  v1::WatchJobRequest request;
  request.set_job_id(id);
  EXPECT_EQ(manager_
                ->Watch(
                    request, [](const v1::JobEvent&) { return true; }, [] { return true; })
                .code(),
            absl::StatusCode::kCancelled);
  EXPECT_EQ(manager_
                ->Watch(
                    request, [](const v1::JobEvent&) { return false; }, [] { return false; })
                .code(),
            absl::StatusCode::kCancelled);
}

// Lists.

TEST_F(JobManagerTest, ListPagesWithBoundTokens) {
  for (const char* name : {"a", "b", "c"}) Create(name);
  v1::ListJobsRequest request;
  request.set_page_size(2);
  const auto first = manager_->List(request);
  ASSERT_THAT(first, IsOk());
  ASSERT_EQ(first->jobs_size(), 2);
  ASSERT_FALSE(first->next_page_token().empty());
  request.set_page_token(first->next_page_token());
  const auto second = manager_->List(request);
  ASSERT_THAT(second, IsOk());
  ASSERT_EQ(second->jobs_size(), 1);
  EXPECT_EQ(second->next_page_token(), "");
  request.mutable_filter()->add_states(v1::JOB_STATE_QUEUED);
  EXPECT_EQ(ReasonOf(manager_->List(request).status()), "PAGE_TOKEN_INVALID");
  request.clear_page_token();
  request.set_page_size(-1);
  EXPECT_EQ(ReasonOf(manager_->List(request).status()), "FIELD_INVALID");
  request.set_page_size(0);
  request.mutable_filter()->set_project("No");
  EXPECT_EQ(ReasonOf(manager_->List(request).status()), "FIELD_INVALID");
}

}  // namespace
}  // namespace pewter::server
