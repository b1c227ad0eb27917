// Remote against a server of this process that answers as told.
#include "client/remote.h"

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"

namespace pewter::client {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class ScriptedService final : public v1::MergeService::Service {
 public:
  using WatchScript = std::function<grpc::Status(const v1::WatchJobRequest&, grpc::ServerContext&,
                                                 grpc::ServerWriter<v1::WatchJobResponse>&)>;

  grpc::Status CreateJob(grpc::ServerContext*, const v1::CreateJobRequest* request,
                         v1::CreateJobResponse* response) override {
    if (++creates == 1) return {grpc::StatusCode::UNAVAILABLE, "draining"};
    response->mutable_job()->set_id("j-1");
    response->mutable_job()->set_request_id(request->request_id());
    return grpc::Status::OK;
  }

  grpc::Status DeleteJob(grpc::ServerContext*, const v1::DeleteJobRequest*,
                         v1::DeleteJobResponse*) override {
    ++deletes;
    return {grpc::StatusCode::UNAVAILABLE, "draining"};
  }

  grpc::Status GetJob(grpc::ServerContext*, const v1::GetJobRequest* request,
                      v1::GetJobResponse*) override {
    google::rpc::BadRequest bad;
    auto& violation = *bad.add_field_violations();
    violation.set_field("job_id");
    violation.set_description("must be a job's id");
    google::rpc::Status details;
    details.add_details()->PackFrom(bad);
    return {grpc::StatusCode::INVALID_ARGUMENT, "bad request", details.SerializeAsString()};
  }

  grpc::Status WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::WatchJobResponse>* writer) override {
    return watch(*request, *context, *writer);
  }

  std::atomic<int> creates{0}, deletes{0};
  WatchScript watch;
};

void Send(grpc::ServerWriter<v1::WatchJobResponse>& writer, int64_t sequence, v1::JobState state) {
  v1::WatchJobResponse response;
  response.mutable_event()->set_sequence(sequence);
  response.mutable_event()->mutable_state_change()->set_state(state);
  writer.Write(response);
}

class RemoteTest : public testing::Test {
 protected:
  RemoteTest() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    remote_ =
        std::make_unique<Remote>(*Remote::Open({.address = "127.0.0.1:" + std::to_string(port)}));
  }

  absl::StatusOr<v1::JobStateChange> Watch(std::stop_token stop = {}) {
    return remote_->Watch(
        "j-1", [this](const v1::JobEvent& event) { seen_.push_back(event.sequence()); },
        [this](const absl::Status&) { ++lost_; }, stop);
  }

  ScriptedService service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Remote> remote_;
  std::vector<int64_t> seen_;
  int lost_ = 0;
};

TEST_F(RemoteTest, RepeatsWhatIsIdempotent) {
  v1::CreateJobRequest request;
  request.set_request_id("once");
  const auto job = remote_->CreateJob(request);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->request_id(), "once");
  EXPECT_EQ(service_.creates, 2);
  v1::DeleteJobRequest remove;
  remove.set_job_id("j-1");
  EXPECT_TRUE(absl::IsUnavailable(remote_->DeleteJob(remove)));
  EXPECT_EQ(service_.deletes, 1);
}

TEST_F(RemoteTest, ErrorsCarryTheFieldViolations) {
  const auto job = remote_->GetJob("?");
  ASSERT_TRUE(absl::IsInvalidArgument(job.status()));
  EXPECT_EQ(job.status().message(), "job_id: must be a job's id");
}

TEST_F(RemoteTest, WatchResumesBehindTheLastEvent) {
  int streams = 0;
  service_.watch = [&](const v1::WatchJobRequest& request, grpc::ServerContext&,
                       grpc::ServerWriter<v1::WatchJobResponse>& writer) -> grpc::Status {
    EXPECT_EQ(request.job_id(), "j-1");
    if (++streams == 1) {
      EXPECT_EQ(request.after_sequence(), 0);
      Send(writer, 1, v1::JOB_STATE_QUEUED);
      Send(writer, 2, v1::JOB_STATE_RUNNING);
      return {grpc::StatusCode::UNAVAILABLE, "draining"};
    }
    EXPECT_EQ(request.after_sequence(), 2);
    if (streams == 2) return {grpc::StatusCode::UNAVAILABLE, "still draining"};
    Send(writer, 3, v1::JOB_STATE_SUCCEEDED);
    return grpc::Status::OK;
  };
  const auto change = Watch();
  ASSERT_TRUE(change.ok()) << change.status();
  EXPECT_EQ(change->state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_THAT(seen_, ElementsAre(1, 2, 3));
  EXPECT_EQ(streams, 3);
  EXPECT_EQ(lost_, 1);  // told once, not at every attempt
}

TEST_F(RemoteTest, WatchPassesOnOtherErrors) {
  service_.watch = [](const auto&, auto&, auto&) {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no job j-1");
  };
  const auto change = Watch();
  EXPECT_TRUE(absl::IsNotFound(change.status())) << change.status();
  EXPECT_EQ(lost_, 0);
}

TEST_F(RemoteTest, WatchStops) {
  std::stop_source source;
  service_.watch = [&source](const v1::WatchJobRequest&, grpc::ServerContext& context,
                             grpc::ServerWriter<v1::WatchJobResponse>& writer) {
    Send(writer, 1, v1::JOB_STATE_RUNNING);
    source.request_stop();
    while (!context.IsCancelled()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return grpc::Status::CANCELLED;
  };
  const auto change = Watch(source.get_token());
  EXPECT_TRUE(absl::IsCancelled(change.status())) << change.status();
}

TEST(RemoteOpenTest, NeedsAnAddress) {
  const auto remote = Remote::Open({});
  ASSERT_TRUE(absl::IsInvalidArgument(remote.status()));
  EXPECT_THAT(std::string(remote.status().message()), HasSubstr("PEWTER_SERVER"));
}

TEST(ServerArgumentsTest, AServerOfThisMachineSeesItsFiles) {
  for (const char* address : {"localhost:7480", "127.0.0.1:1", "127.1.2.3:1", "[::1]:7480",
                              "unix:/run/pewter", "dns:///localhost:1", "ipv4:127.0.0.1:1"}) {
    EXPECT_TRUE(ServerArguments{.address = address}.IsLocal()) << address;
  }
  for (const char* address : {"merge.example.org:7480", "10.0.0.1:7480", "[fe80::1]:7480",
                              "localhost.example.org:1", "dns:///host:1", "0.0.0.0:1"}) {
    EXPECT_FALSE(ServerArguments{.address = address}.IsLocal()) << address;
  }
}

}  // namespace
}  // namespace pewter::client
