// The services over a real connection, with a fake executor: what is on the wire.
#include "server/merge_service.h"

#include <gmock/gmock.h>
#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "server/errors.h"
#include "server/worker_service.h"
#include "tests/server/fake_executor.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::pewter::testing::IsOk;
using ::pewter::testing::TempFolder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class MergeServiceTest : public ::testing::Test {
 protected:
  MergeServiceTest() {
    auto store = OpenJobStore(absl::StrCat("sqlite:", folder_ / "jobs.db"));
    EXPECT_THAT(store, IsOk());
    jobs_ = std::make_unique<JobManager>(*std::move(store), JobManagerOptions{});
    merge_ = std::make_unique<MergeServiceImpl>(jobs_.get(), &planner_);
    worker_ = std::make_unique<WorkerServiceImpl>(jobs_.get());
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(merge_.get());
    builder.RegisterService(worker_.get());
    server_ = builder.BuildAndStart();
    EXPECT_THAT(jobs_->Start(std::make_unique<FakeExecutor>(&log_)), IsOk());
    channel_ =
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials());
    stub_ = v1::MergeService::NewStub(channel_);
    worker_stub_ = v1::WorkerService::NewStub(channel_);
  }
  ~MergeServiceTest() override {
    jobs_->Drain(absl::ZeroDuration());
    server_->Shutdown();
  }

  v1::CreateJobRequest Request() {
    v1::CreateJobRequest request;
    request.set_recipe("models: [{model: /models/a}]\nmerge_method: passthrough\n");
    request.set_destination_uri(folder_ / "out");
    return request;
  }
  v1::Job Create() {
    grpc::ClientContext context;
    v1::CreateJobResponse response;
    EXPECT_TRUE(stub_->CreateJob(&context, Request(), &response).ok());
    return response.job();
  }
  // Plays the worker until the job has succeeded.
  void RunWorker() {
    const WorkerLaunch launch = log_.WaitForLaunch(1);
    v1::ClaimJobRequest claim;
    claim.set_job_id(launch.job_id);
    v1::ClaimJobResponse claimed;
    {
      grpc::ClientContext context;
      context.AddMetadata(kTokenMetadata, launch.token);
      ASSERT_TRUE(worker_stub_->ClaimJob(&context, claim, &claimed).ok());
    }
    v1::FinishJobRequest finish;
    finish.set_job_id(launch.job_id);
    finish.set_lease_generation(claimed.job().lease_generation());
    finish.mutable_output()->set_manifest_json("{}");
    v1::FinishJobResponse finished;
    grpc::ClientContext context;
    context.AddMetadata(kTokenMetadata, launch.token);
    ASSERT_TRUE(worker_stub_->FinishJob(&context, finish, &finished).ok());
    log_.End({.job_id = launch.job_id});
  }

  // The details of an error, which must have exactly one ErrorInfo, of `reason`.
  static google::rpc::Status DetailsOf(const grpc::Status& status, const std::string& reason) {
    EXPECT_FALSE(status.ok());
    google::rpc::Status details;
    EXPECT_TRUE(details.ParseFromString(status.error_details()));
    EXPECT_EQ(details.code(), status.error_code());
    EXPECT_LE(status.error_details().size(), 4096u);
    std::vector<std::string> infos;
    std::set<std::string> types;
    for (const auto& detail : details.details()) {
      EXPECT_TRUE(types.insert(detail.type_url()).second) << detail.type_url();
      google::rpc::ErrorInfo info;
      if (!detail.UnpackTo(&info)) continue;
      EXPECT_EQ(info.domain(), "pewter.dev");
      infos.push_back(info.reason());
    }
    EXPECT_THAT(infos, ElementsAre(reason)) << status.error_message();
    return details;
  }

  TempFolder folder_;
  FakeExecutor::Log log_;
  Planner planner_{1};
  std::unique_ptr<JobManager> jobs_;
  std::unique_ptr<MergeServiceImpl> merge_;
  std::unique_ptr<WorkerServiceImpl> worker_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::MergeService::Stub> stub_;
  std::unique_ptr<v1::WorkerService::Stub> worker_stub_;
};

TEST_F(MergeServiceTest, BadRecipeComesBackAsFieldViolation) {
  v1::CreateJobRequest request = Request();
  request.set_recipe("models: [{model: /a}]\nmerge_method: [\n");
  grpc::ClientContext context;
  v1::CreateJobResponse response;
  const grpc::Status status = stub_->CreateJob(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(ReasonOf(FromGrpc(status)), "RECIPE_INVALID");
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  google::rpc::BadRequest bad;
  bool found = false;
  for (const auto& detail : details.details()) found |= detail.UnpackTo(&bad);
  ASSERT_TRUE(found);
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "recipe");
  EXPECT_THAT(bad.field_violations(0).description(), HasSubstr("recipe:"));
}

TEST_F(MergeServiceTest, AllProblemsComeBackAtOnceWithTheirPlaces) {
  v1::CreateJobRequest request = Request();
  request.set_recipe(
      "merge_method: linear\n"
      "dtype: float99\n"
      "models:\n"
      "  - weight: 1\n"
      "  - model: a@b@c\n");
  request.set_priority(5000);
  request.mutable_options()->set_threads(-1);
  grpc::ClientContext context;
  v1::CreateJobResponse response;
  const google::rpc::Status details =
      DetailsOf(stub_->CreateJob(&context, request, &response), "FIELD_INVALID");
  google::rpc::BadRequest bad;
  for (const auto& detail : details.details()) detail.UnpackTo(&bad);
  std::vector<std::string> fields, places;
  for (const auto& violation : bad.field_violations()) {
    fields.push_back(violation.field());
    if (violation.field() == "recipe") places.push_back(violation.description().substr(0, 11));
  }
  EXPECT_THAT(fields, ElementsAre("options.threads", "priority", "recipe", "recipe", "recipe"));
  EXPECT_THAT(places, ElementsAre("recipe:2:8:", "recipe:4:5:", "recipe:5:12"));

  v1::PlanMergeRequest plan;
  plan.set_recipe(request.recipe());
  grpc::ClientContext plan_context;
  v1::PlanMergeResponse planned;
  ASSERT_TRUE(stub_->PlanMerge(&plan_context, plan, &planned).ok());
  ASSERT_EQ(planned.findings_size(), 3);
  EXPECT_EQ(planned.findings(1).line(), 4);
  EXPECT_EQ(planned.findings(1).column(), 5);
}

// What clients can meet, each with one ErrorInfo of our domain and the details that belong to it.
TEST_F(MergeServiceTest, EveryErrorHasOneErrorInfo) {
  const auto call = [&](auto method, const auto& request, auto response) {
    grpc::ClientContext context;
    return (stub_.get()->*method)(&context, request, &response);
  };
  using Stub = v1::MergeService::Stub;
  const auto create = [&](const std::function<void(v1::CreateJobRequest&)>& change) {
    v1::CreateJobRequest request = Request();
    change(request);
    return call(&Stub::CreateJob, request, v1::CreateJobResponse());
  };
  const auto has = [](const google::rpc::Status& details, auto detail) {
    return std::any_of(details.details().begin(), details.details().end(),
                       [&](const auto& any) { return any.UnpackTo(&detail); });
  };
  const google::rpc::BadRequest bad;
  const google::rpc::ResourceInfo resource;
  const google::rpc::PreconditionFailure precondition;

  // Of requests.
  for (const auto& [reason, change] :
       std::vector<std::pair<const char*, std::function<void(v1::CreateJobRequest&)>>>{
           {"RECIPE_INVALID", [](auto& r) { r.clear_recipe(); }},
           {"RELATIVE_PATH",
            [](auto& r) { r.set_recipe("models: [{model: a}]\nmerge_method: passthrough\n"); }},
           {"DESTINATION_INVALID", [](auto& r) { r.clear_destination_uri(); }},
           {"FIELD_INVALID", [](auto& r) { r.set_project("-"); }}}) {
    EXPECT_TRUE(has(DetailsOf(create(change), reason), bad)) << reason;
  }
  ASSERT_TRUE(create([](auto& r) { r.set_request_id("r1"); }).ok());
  DetailsOf(create([](auto& r) {
              r.set_request_id("r1");
              r.set_priority(1);
            }),
            "REQUEST_ID_REUSED");
  EXPECT_TRUE(has(DetailsOf(create([](auto&) {}), "DESTINATION_BUSY"), resource));
  const std::string id = log_.WaitForLaunch(1).job_id;

  // Of every call that names a job.
  const auto of_job = [&](auto method, auto request, auto response, const std::string& job) {
    request.set_job_id(job);
    return call(method, request, response);
  };
  for (const grpc::Status& status :
       {of_job(&Stub::GetJob, v1::GetJobRequest(), v1::GetJobResponse(), "none"),
        of_job(&Stub::CancelJob, v1::CancelJobRequest(), v1::CancelJobResponse(), "none"),
        of_job(&Stub::RetryJob, v1::RetryJobRequest(), v1::RetryJobResponse(), "none"),
        of_job(&Stub::DeleteJob, v1::DeleteJobRequest(), v1::DeleteJobResponse(), "none")}) {
    EXPECT_TRUE(has(DetailsOf(status, "JOB_NOT_FOUND"), resource));
  }
  for (const grpc::Status& status :
       {of_job(&Stub::RetryJob, v1::RetryJobRequest(), v1::RetryJobResponse(), id),
        of_job(&Stub::DeleteJob, v1::DeleteJobRequest(), v1::DeleteJobResponse(), id)}) {
    EXPECT_TRUE(has(DetailsOf(status, "JOB_NOT_FINAL"), precondition));
  }

  // Of lists and plans.
  v1::ListJobsRequest list;
  list.set_page_size(-1);
  EXPECT_TRUE(
      has(DetailsOf(call(&Stub::ListJobs, list, v1::ListJobsResponse()), "FIELD_INVALID"), bad));
  list.set_page_size(0);
  list.set_page_token("x");
  EXPECT_TRUE(has(
      DetailsOf(call(&Stub::ListJobs, list, v1::ListJobsResponse()), "PAGE_TOKEN_INVALID"), bad));
  v1::PlanMergeRequest plan;
  EXPECT_TRUE(
      has(DetailsOf(call(&Stub::PlanMerge, plan, v1::PlanMergeResponse()), "RECIPE_INVALID"), bad));

  // Of watches.
  const auto watch = [&](const std::string& job, int64_t after) {
    v1::WatchJobRequest request;
    request.set_job_id(job);
    request.set_after_sequence(after);
    grpc::ClientContext context;
    const auto stream = stub_->WatchJob(&context, request);
    v1::WatchJobResponse response;
    while (stream->Read(&response)) {
    }
    return stream->Finish();
  };
  EXPECT_TRUE(has(DetailsOf(watch("none", 0), "JOB_NOT_FOUND"), resource));
  EXPECT_TRUE(has(DetailsOf(watch(id, -1), "FIELD_INVALID"), bad));
  DetailsOf(watch(id, 1000), "SEQUENCE_AHEAD");

  // Of workers.
  grpc::ClientContext context;
  v1::ClaimJobResponse claimed;
  v1::ClaimJobRequest claim;
  claim.set_job_id(id);
  DetailsOf(worker_stub_->ClaimJob(&context, claim, &claimed), "TOKEN_INVALID");

  jobs_->Drain(absl::ZeroDuration());
  const google::rpc::RetryInfo retry;
  EXPECT_TRUE(has(
      DetailsOf(create([](auto& r) { r.set_destination_uri("/elsewhere"); }), "DRAINING"), retry));
  EXPECT_TRUE(has(DetailsOf(watch(id, 0), "DRAINING"), retry));
}

TEST_F(MergeServiceTest, JobIsWatchedToItsEndAndRead) {
  const v1::Job job = Create();
  grpc::ClientContext context;
  v1::WatchJobRequest request;
  request.set_job_id(job.id());
  auto stream = stub_->WatchJob(&context, request);
  v1::WatchJobResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.event().state_change().state(), v1::JOB_STATE_QUEUED);
  RunWorker();
  int64_t sequence = 1;
  while (stream->Read(&response)) {
    if (response.event().has_progress()) continue;
    EXPECT_EQ(response.event().sequence(), ++sequence);
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(response.event().state_change().state(), v1::JOB_STATE_SUCCEEDED);

  grpc::ClientContext get_context;
  v1::GetJobRequest get;
  get.set_job_id(job.id());
  v1::GetJobResponse got;
  ASSERT_TRUE(stub_->GetJob(&get_context, get, &got).ok());
  EXPECT_EQ(got.job().sequence(), sequence);
  EXPECT_EQ(got.job().output().manifest_json(), "{}");

  grpc::ClientContext list_context;
  v1::ListJobsResponse listed;
  ASSERT_TRUE(stub_->ListJobs(&list_context, v1::ListJobsRequest(), &listed).ok());
  ASSERT_EQ(listed.jobs_size(), 1);
  EXPECT_EQ(listed.jobs(0).recipe(), "");

  grpc::ClientContext cancel_context;
  v1::CancelJobRequest cancel;
  cancel.set_job_id(job.id());
  v1::CancelJobResponse cancelled;
  ASSERT_TRUE(stub_->CancelJob(&cancel_context, cancel, &cancelled).ok());
  EXPECT_EQ(cancelled.job().state(), v1::JOB_STATE_SUCCEEDED);

  v1::DeleteJobRequest remove;
  remove.set_job_id(job.id());
  v1::DeleteJobResponse removed;
  grpc::ClientContext first, second;
  EXPECT_TRUE(stub_->DeleteJob(&first, remove, &removed).ok());
  EXPECT_EQ(stub_->DeleteJob(&second, remove, &removed).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(MergeServiceTest, WorkersNeedTheirToken) {
  Create();
  v1::ClaimJobRequest request;
  request.set_job_id(log_.WaitForLaunch(1).job_id);
  v1::ClaimJobResponse response;
  grpc::ClientContext context;
  const grpc::Status status = worker_stub_->ClaimJob(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(MergeServiceTest, MethodsHaveWhatClientsNeed) {
  grpc::ClientContext context;
  v1::ListMethodsResponse response;
  ASSERT_TRUE(stub_->ListMethods(&context, v1::ListMethodsRequest(), &response).ok());
  const auto names_of = [](const auto& methods) {
    std::vector<std::string> names;
    for (const v1::MethodInfo& method : methods) {
      names.push_back(method.name());
      EXPECT_NE(method.summary(), "");
      EXPECT_NE(method.base_model_use(), v1::BASE_MODEL_USE_UNSPECIFIED);
      EXPECT_GE(method.max_inputs(), method.min_inputs());
      for (const v1::ParamInfo& param : method.params()) {
        EXPECT_NE(param.type(), v1::PARAM_TYPE_UNSPECIFIED);
        EXPECT_NE(param.scope(), v1::PARAM_SCOPE_UNSPECIFIED);
        EXPECT_NE(param.help(), "");
        EXPECT_FALSE(param.required() && param.has_default_value());
      }
    }
    EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
    return names;
  };
  EXPECT_THAT(names_of(response.methods()), ::testing::IsSupersetOf({"linear", "slerp", "ties"}));
  EXPECT_THAT(names_of(response.adapter_methods()), ::testing::IsSupersetOf({"cat", "ties_svd"}));
}

TEST_F(MergeServiceTest, PlanTellsWhatIsWrongAsFindings) {
  v1::PlanMergeRequest request;
  request.set_recipe("models: [{model: /nowhere/a}]\nmerge_method: passthrough\n");
  grpc::ClientContext context;
  v1::PlanMergeResponse response;
  ASSERT_TRUE(stub_->PlanMerge(&context, request, &response).ok());
  EXPECT_FALSE(response.has_plan());
  ASSERT_GE(response.findings_size(), 1);
  EXPECT_EQ(response.findings(0).severity(), v1::FINDING_SEVERITY_ERROR);
  EXPECT_EQ(response.findings(0).code(), 5);
  EXPECT_THAT(response.findings(0).message(), HasSubstr("/nowhere/a"));

  request.set_recipe("models:\n  - model: /a\nmerge_method: [\n");
  grpc::ClientContext second;
  ASSERT_TRUE(stub_->PlanMerge(&second, request, &response).ok());
  ASSERT_GE(response.findings_size(), 1);
  EXPECT_EQ(response.findings(0).reason(), "RECIPE_INVALID");
  EXPECT_GT(response.findings(0).line(), 0);

  request.set_recipe("models: [{model: a}]\nmerge_method: passthrough\n");
  grpc::ClientContext third;
  const grpc::Status refused = stub_->PlanMerge(&third, request, &response);
  EXPECT_EQ(ReasonOf(FromGrpc(refused)), "RELATIVE_PATH");
}

TEST_F(MergeServiceTest, PlanIsReadByPage) {
  // A raw checkpoint of five tensors.
  std::string header = "{";
  for (int i = 0; i < 5; ++i) {
    absl::StrAppend(&header, i == 0 ? "" : ",", "\"t", i,
                    "\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[", 8 * i, ",",
                    8 * (i + 1), "]}");
  }
  header += "}";
  while (header.size() % 8 != 0) header += " ";
  std::string file(8, '\0');
  file[0] = static_cast<char>(header.size() & 0xFF);
  file[1] = static_cast<char>(header.size() >> 8);
  folder_.Write("model.safetensors", absl::StrCat(file, header, std::string(40, '\0')));

  v1::PlanMergeRequest request;
  request.set_recipe(absl::StrCat("models: [{model: ", folder_ / "model.safetensors",
                                  "}]\nmerge_method: passthrough\n"));
  request.set_page_size(2);
  std::vector<std::string> names;
  for (int page = 0; page < 3; ++page) {
    grpc::ClientContext context;
    v1::PlanMergeResponse response;
    const grpc::Status status = stub_->PlanMerge(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_TRUE(response.has_plan()) << response.DebugString();
    EXPECT_EQ(response.plan().tensors_total(), 5);
    EXPECT_NE(response.plan().fingerprint(), "");
    ASSERT_EQ(response.plan().shards_size(), 1);
    for (const v1::PlanTensor& tensor : response.plan().tensors()) {
      names.push_back(tensor.name());
      EXPECT_EQ(tensor.dtype(), "F32");
      EXPECT_THAT(tensor.shape(), ::testing::ElementsAre(2));
      EXPECT_EQ(tensor.inputs_size(), 1);
    }
    request.set_page_token(response.next_page_token());
  }
  EXPECT_EQ(request.page_token(), "");
  EXPECT_THAT(names, ::testing::UnorderedElementsAre("t0", "t1", "t2", "t3", "t4"));

  request.set_page_token("nonsense");
  grpc::ClientContext context;
  v1::PlanMergeResponse response;
  EXPECT_EQ(ReasonOf(FromGrpc(stub_->PlanMerge(&context, request, &response))),
            "PAGE_TOKEN_INVALID");
}

// The interface's own rules, which a linter would check too.
TEST(Interface, EnumsBeginWithUnspecifiedAndRpcsHaveTheirOwnMessages) {
  std::vector<std::string> messages;
  for (const auto* file :
       {v1::CreateJobRequest::descriptor()->file(), v1::Job::descriptor()->file(),
        v1::PlanSummary::descriptor()->file(), v1::MethodInfo::descriptor()->file(),
        v1::ClaimJobRequest::descriptor()->file()}) {
    for (int i = 0; i < file->enum_type_count(); ++i) {
      const auto* zero = file->enum_type(i)->FindValueByNumber(0);
      ASSERT_NE(zero, nullptr) << file->enum_type(i)->name();
      EXPECT_TRUE(absl::EndsWith(zero->name(), "_UNSPECIFIED")) << zero->name();
    }
    for (int i = 0; i < file->service_count(); ++i) {
      for (int k = 0; k < file->service(i)->method_count(); ++k) {
        const auto* method = file->service(i)->method(k);
        EXPECT_EQ(method->input_type()->name(), method->name() + "Request");
        EXPECT_EQ(method->output_type()->name(), method->name() + "Response");
      }
    }
  }
}

}  // namespace
}  // namespace pewter::server
