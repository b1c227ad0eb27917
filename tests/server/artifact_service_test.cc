// ArtifactService and ByteStream over a real connection: what is on the wire, what survives.
#include "server/artifact_service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "merge/engine/manifest.h"
#include "server/errors.h"
#include "store/artifact_store.h"
#include "store/resource_name.h"
#include "tests/server/fake_executor.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::google::bytestream::ByteStream;
using ::google::bytestream::QueryWriteStatusRequest;
using ::google::bytestream::QueryWriteStatusResponse;
using ::google::bytestream::ReadRequest;
using ::google::bytestream::ReadResponse;
using ::google::bytestream::WriteRequest;
using ::google::bytestream::WriteResponse;
using ::pewter::testing::IsOk;
using ::pewter::testing::TempFolder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kUuid[] = "123e4567-e89b-12d3-a456-426614174000";

// Bytes that are not all alike.
std::string Content(int64_t size, int seed = 1) {
  std::string content(size, '\0');
  uint32_t state = seed;
  for (char& byte : content) byte = static_cast<char>((state = state * 1664525 + 1013904223) >> 24);
  return content;
}

std::string UploadName(absl::string_view content, absl::string_view uuid = kUuid) {
  return absl::StrCat("uploads/", uuid, "/blobs/sha256/", Sha256::Of(content), "/", content.size());
}
std::string BlobName(absl::string_view content) {
  return absl::StrCat("blobs/sha256/", Sha256::Of(content), "/", content.size());
}

class ArtifactServiceTest : public ::testing::Test {
 protected:
  ArtifactServiceTest() { Start({}); }
  ~ArtifactServiceTest() override { Stop(); }

  void Start(ArtifactOptions options, ByteStreamOptions streams = {}) {
    if (options.root.empty()) options.root = folder_ / "artifacts";
    options.partial = folder_ / "partial";
    options.min_free_bytes = min_free_bytes_;
    auto store = OpenJobStore(absl::StrCat("sqlite:", folder_ / "jobs.db"));
    ASSERT_THAT(store, IsOk());
    jobs_ = std::make_unique<JobManager>(*std::move(store), JobManagerOptions{});
    auto artifacts = ArtifactManager::Open(options);
    ASSERT_THAT(artifacts, IsOk());
    artifacts_ = *std::move(artifacts);
    service_ = std::make_unique<ArtifactServiceImpl>(artifacts_.get(), jobs_.get());
    bytes_service_ = std::make_unique<ByteStreamImpl>(artifacts_.get(), jobs_.get(), streams);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service_.get());
    builder.RegisterService(bytes_service_.get());
    server_ = builder.BuildAndStart();
    const auto channel =
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials());
    stub_ = v1::ArtifactService::NewStub(channel);
    bytes_ = ByteStream::NewStub(channel);
  }
  void Stop() {
    if (server_ == nullptr) return;
    server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
    bytes_service_.reset();
    service_.reset();
    artifacts_.reset();
    jobs_.reset();
  }
  void Restart(ArtifactOptions options = {}, ByteStreamOptions streams = {}) {
    Stop();
    Start(std::move(options), streams);
  }

  // Writes `bytes` at `offset`, in frames, and returns how the stream ended.
  grpc::Status Write(const std::string& name, int64_t offset, absl::string_view bytes, bool finish,
                     WriteResponse* response = nullptr) {
    WriteResponse ignored;
    grpc::ClientContext context;
    const auto writer = bytes_->Write(&context, response == nullptr ? &ignored : response);
    WriteRequest request;
    request.set_resource_name(name);
    do {
      const absl::string_view frame = bytes.substr(0, 1000);
      bytes.remove_prefix(frame.size());
      request.set_write_offset(offset);
      request.set_data(std::string(frame));
      request.set_finish_write(finish && bytes.empty());
      offset += frame.size();
      if (!writer->Write(request)) break;
      request.clear_resource_name();
    } while (!bytes.empty());
    writer->WritesDone();
    return writer->Finish();
  }
  void Put(const std::string& content) {
    ASSERT_TRUE(Write(UploadName(content), 0, content, /*finish=*/true).ok());
  }
  grpc::Status Query(const std::string& name, QueryWriteStatusResponse& response) {
    grpc::ClientContext context;
    QueryWriteStatusRequest request;
    request.set_resource_name(name);
    return bytes_->QueryWriteStatus(&context, request, &response);
  }
  int64_t Committed(const std::string& name) {
    QueryWriteStatusResponse response;
    return Query(name, response).ok() ? response.committed_size() : -1;
  }
  // The bytes, or the error.
  absl::StatusOr<std::string> Read(const std::string& name, int64_t offset = 0, int64_t limit = 0) {
    grpc::ClientContext context;
    ReadRequest request;
    request.set_resource_name(name);
    request.set_read_offset(offset);
    request.set_read_limit(limit);
    const auto reader = bytes_->Read(&context, request);
    std::string bytes;
    ReadResponse response;
    while (reader->Read(&response)) bytes += response.data();
    const grpc::Status status = reader->Finish();
    if (!status.ok()) return FromGrpc(status);
    return bytes;
  }
  absl::StatusOr<v1::Artifact> Create(
      const std::vector<std::pair<std::string, std::string>>& files) {
    v1::CreateArtifactRequest request;
    for (const auto& [path, content] : files) {
      v1::ArtifactFile& file = *request.add_files();
      file.set_path(path);
      file.mutable_digest()->set_sha256(Sha256::Of(content));
      file.mutable_digest()->set_size_bytes(content.size());
    }
    grpc::ClientContext context;
    v1::CreateArtifactResponse response;
    const grpc::Status status = stub_->CreateArtifact(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response.artifact();
  }
  absl::StatusOr<v1::Artifact> Get(const v1::GetArtifactRequest& request) {
    grpc::ClientContext context;
    v1::GetArtifactResponse response;
    const grpc::Status status = stub_->GetArtifact(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response.artifact();
  }
  absl::Status Delete(const std::string& uri) {
    grpc::ClientContext context;
    v1::DeleteArtifactRequest request;
    request.set_uri(uri);
    v1::DeleteArtifactResponse response;
    return FromGrpc(stub_->DeleteArtifact(&context, request, &response));
  }
  // What of an upload lies around.
  int PartialFiles() {
    int files = 0;
    for ([[maybe_unused]] const auto& entry :
         std::filesystem::directory_iterator(folder_ / "artifacts/partial")) {
      ++files;
    }
    return files;
  }

  TempFolder folder_;
  int64_t min_free_bytes_ = 0;
  std::unique_ptr<JobManager> jobs_;
  std::unique_ptr<ArtifactManager> artifacts_;
  std::unique_ptr<ArtifactServiceImpl> service_;
  std::unique_ptr<ByteStreamImpl> bytes_service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::ArtifactService::Stub> stub_;
  std::unique_ptr<ByteStream::Stub> bytes_;
};

TEST_F(ArtifactServiceTest, ABlobComesBackAsItWasSent) {
  const std::string content = Content(3'000'000);
  WriteResponse response;
  ASSERT_TRUE(Write(UploadName(content), 0, content, /*finish=*/true, &response).ok());
  EXPECT_EQ(response.committed_size(), 3'000'000);
  EXPECT_EQ(PartialFiles(), 0);
  EXPECT_EQ(Read(BlobName(content)).value(), content);
  EXPECT_EQ(Read(BlobName(content), 2'999'000).value(), content.substr(2'999'000));
  EXPECT_EQ(Read(BlobName(content), 5, 7).value(), content.substr(5, 7));
  EXPECT_EQ(Read(BlobName(content), 3'000'000).value(), "");
  EXPECT_EQ(ReasonOf(Read(BlobName(content), 3'000'001).status()), "READ_PAST_END");
  EXPECT_EQ(ReasonOf(Read(BlobName(content), -1).status()), "READ_PAST_END");
  EXPECT_EQ(ReasonOf(Read(BlobName("another")).status()), "BLOB_NOT_FOUND");
  // The size is a part of the name.
  EXPECT_EQ(ReasonOf(Read(absl::StrCat("blobs/sha256/", Sha256::Of(content), "/7")).status()),
            "BLOB_NOT_FOUND");
}

TEST_F(ArtifactServiceTest, AnEmptyFileIsABlob) {
  ASSERT_TRUE(Write(UploadName(""), 0, "", /*finish=*/true).ok());
  EXPECT_EQ(Read(BlobName("")).value(), "");
}

TEST_F(ArtifactServiceTest, AnUploadGoesOnWhereItWasCut) {
  const std::string content = Content(100'000);
  const std::string name = UploadName(content);
  QueryWriteStatusResponse status;
  EXPECT_EQ(ReasonOf(FromGrpc(Query(name, status))), "UPLOAD_NOT_FOUND");
  int64_t committed = 0;
  for (const int64_t end : {1, 40'000, 40'000, 99'999}) {
    ASSERT_TRUE(
        Write(name, committed, content.substr(committed, end - committed), /*finish=*/false).ok());
    EXPECT_EQ(Committed(name), end);
    EXPECT_EQ(ReasonOf(Read(BlobName(content)).status()), "BLOB_NOT_FOUND");
    committed = end;
    Restart();  // it survives the server, too
    EXPECT_EQ(Committed(name), end);
  }
  ASSERT_TRUE(Write(name, committed, content.substr(committed), /*finish=*/true).ok());
  EXPECT_EQ(Read(BlobName(content)).value(), content);
  ASSERT_TRUE(Query(name, status).ok());
  EXPECT_TRUE(status.complete());
  EXPECT_EQ(status.committed_size(), 100'000);
}

TEST_F(ArtifactServiceTest, GapsAndReplaysAreRefusedAndTakeNothingAway) {
  const std::string content = Content(10'000);
  const std::string name = UploadName(content);
  ASSERT_TRUE(Write(name, 0, content.substr(0, 6000), /*finish=*/false).ok());
  for (const int64_t offset : {0, 5000, 6001, 10'000, -1}) {
    const grpc::Status status = Write(name, offset, "x", /*finish=*/false);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::OUT_OF_RANGE) << offset;
    EXPECT_EQ(ReasonOf(FromGrpc(status)), "OFFSET_MISMATCH");
    EXPECT_EQ(Committed(name), 6000);
  }
  // Not whole yet.
  EXPECT_EQ(ReasonOf(FromGrpc(Write(name, 6000, "", /*finish=*/true))), "SIZE_MISMATCH");
  ASSERT_TRUE(Write(name, 6000, content.substr(6000), /*finish=*/true).ok());
}

TEST_F(ArtifactServiceTest, WrongBytesAreThrownAway) {
  const std::string content = Content(10'000);
  std::string wrong = content;
  wrong[7000] ^= 1;
  const std::string name = UploadName(content);
  const grpc::Status status = Write(name, 0, wrong, /*finish=*/true);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(ReasonOf(FromGrpc(status)), "DIGEST_MISMATCH");
  EXPECT_THAT(status.error_message(), HasSubstr(Sha256::Of(wrong)));
  EXPECT_EQ(Committed(name), -1);
  EXPECT_EQ(PartialFiles(), 0);
  EXPECT_EQ(ReasonOf(Read(BlobName(content)).status()), "BLOB_NOT_FOUND");

  EXPECT_EQ(ReasonOf(FromGrpc(Write(name, 0, absl::StrCat(content, "more"), /*finish=*/true))),
            "SIZE_MISMATCH");
  EXPECT_EQ(PartialFiles(), 0);
  Put(content);
}

TEST_F(ArtifactServiceTest, WhatIsThereIsNotTakenAgain) {
  const std::string content = Content(5'000'000);
  Put(content);
  // The first frame is enough for the server to say so.
  WriteResponse response;
  ASSERT_TRUE(Write(UploadName(content, "00000000-0000-0000-0000-000000000000"), 0,
                    content.substr(0, 1000), /*finish=*/false, &response)
                  .ok());
  EXPECT_EQ(response.committed_size(), 5'000'000);

  v1::FindMissingBlobsRequest request;
  for (const std::string& blob : {content, std::string("new"), content, std::string("new")}) {
    request.add_blobs()->set_sha256(Sha256::Of(blob));
    request.mutable_blobs()->rbegin()->set_size_bytes(blob.size());
  }
  grpc::ClientContext context;
  v1::FindMissingBlobsResponse missing;
  ASSERT_TRUE(stub_->FindMissingBlobs(&context, request, &missing).ok());
  ASSERT_EQ(missing.missing_size(), 1);
  EXPECT_EQ(missing.missing(0).sha256(), Sha256::Of("new"));

  request.add_blobs()->set_sha256("../../etc/passwd");
  grpc::ClientContext refused;
  EXPECT_EQ(stub_->FindMissingBlobs(&refused, request, &missing).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ArtifactServiceTest, ANewStreamTakesOverFromOneThatHangs) {
  const std::string content = Content(10'000);
  const std::string name = UploadName(content);
  grpc::ClientContext context;
  WriteResponse response;
  const auto hanging = bytes_->Write(&context, &response);
  WriteRequest request;
  request.set_resource_name(name);
  request.set_data(content.substr(0, 4000));
  ASSERT_TRUE(hanging->Write(request));
  while (Committed(name) != 4000) absl::SleepFor(absl::Milliseconds(5));
  ASSERT_TRUE(Write(name, 4000, content.substr(4000), /*finish=*/true).ok());
  EXPECT_FALSE(hanging->Finish().ok());
  EXPECT_EQ(Read(BlobName(content)).value(), content);
}

TEST_F(ArtifactServiceTest, AStreamThatDoesNotMoveIsEnded) {
  Restart({}, {.max_streams = 1, .idle_limit = absl::Milliseconds(200)});
  const std::string content = Content(10'000);
  grpc::ClientContext context;
  WriteResponse response;
  const auto hanging = bytes_->Write(&context, &response);
  WriteRequest request;
  request.set_resource_name(UploadName(content));
  request.set_data(content.substr(0, 4000));
  ASSERT_TRUE(hanging->Write(request));
  while (Committed(UploadName(content)) != 4000) absl::SleepFor(absl::Milliseconds(5));
  // It takes the only place.
  const absl::Status refused = Read(BlobName(content)).status();
  EXPECT_EQ(ReasonOf(refused), "TOO_MANY_STREAMS");
  const grpc::Status ended = hanging->Finish();
  EXPECT_FALSE(ended.ok());
  EXPECT_EQ(Committed(UploadName(content)), 4000);
  EXPECT_EQ(ReasonOf(Read(BlobName(content)).status()), "BLOB_NOT_FOUND");
}

TEST_F(ArtifactServiceTest, NamesAreTakenAsTheyAreDefinedAndNoOtherWay) {
  const std::string digest = Sha256::Of("x");
  for (const std::string& name : std::vector<std::string>{
           "",
           "/",
           "blobs",
           absl::StrCat("blobs/sha256/", digest),
           absl::StrCat("blobs/sha256/", digest, "/"),
           absl::StrCat("blobs/sha256/", digest, "/01"),
           absl::StrCat("blobs/sha256/", digest, "/+1"),
           absl::StrCat("blobs/sha256/", digest, "/-1"),
           absl::StrCat("blobs/sha256/", digest, "/1/"),
           absl::StrCat("blobs/sha256/", digest, "/99999999999999999999"),
           absl::StrCat("blobs/sha256/", digest.substr(1), "/1"),
           absl::StrCat("blobs/sha256/", absl::AsciiStrToUpper(digest), "/1"),
           absl::StrCat("/blobs/sha256/", digest, "/1"),
           absl::StrCat("uploads/x/blobs/sha256/", digest, "/1"),
           absl::StrCat("uploads/../blobs/sha256/", digest, "/1"),
           absl::StrCat("uploads/", kUuid, "/sha256/", digest, "/1"),
           "outputs/name",
           "outputs/name/",
           "outputs/name/../../blobs/x",
           "outputs/../partial/x",
           "outputs/.hidden/x",
           "outputs/name//x",
           "outputs/name/./x",
           "jobs/j1",
           "jobs/j1/../x",
           "jobs/../x",
           "jobs/a.b/x",
           "artifacts/name/x",
       }) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseResourceName(name).status())) << name;
    EXPECT_EQ(ReasonOf(Read(name).status()), "RESOURCE_NAME_INVALID") << name;
    QueryWriteStatusResponse response;
    EXPECT_EQ(ReasonOf(FromGrpc(Query(name, response))), "RESOURCE_NAME_INVALID") << name;
  }
  for (const std::string& name :
       {UploadName("x"), BlobName("x"), std::string("outputs/a.b_c-d/1_Pooling/config.json"),
        std::string("jobs/j1/config.json")}) {
    const auto parsed = ParseResourceName(name);
    ASSERT_THAT(parsed, IsOk());
    EXPECT_EQ(parsed->ToString(), name);
  }
  // To be read alone.
  EXPECT_EQ(ReasonOf(FromGrpc(Write(BlobName("x"), 0, "x", /*finish=*/true))),
            "RESOURCE_NAME_INVALID");
}

TEST_F(ArtifactServiceTest, AnArtifactIsNamedByItsContent) {
  Put("{}");
  Put("weights");
  const auto artifact = Create({{"model.safetensors", "weights"}, {"config.json", "{}"}});
  ASSERT_THAT(artifact, IsOk());
  EXPECT_EQ(artifact->size_bytes(), 9);
  ASSERT_EQ(artifact->files_size(), 2);
  EXPECT_EQ(artifact->files(0).path(), "config.json");
  EXPECT_EQ(Read(artifact->files(1).resource_name()).value(), "weights");
  // Whatever the order.
  const auto again = Create({{"config.json", "{}"}, {"model.safetensors", "weights"}});
  ASSERT_THAT(again, IsOk());
  EXPECT_EQ(again->uri(), artifact->uri());
  v1::GetArtifactRequest request;
  request.set_uri(artifact->uri());
  const auto got = Get(request);
  ASSERT_THAT(got, IsOk());
  EXPECT_EQ(got->SerializeAsString(), artifact->SerializeAsString());

  // What a merge sees of it.
  setenv(kArtifactRootVariable, (folder_ / "artifacts").c_str(), 1);
  const auto store = OpenStore(artifact->uri());
  ASSERT_THAT(store, IsOk());
  EXPECT_EQ(ReadText(**store, "config.json", 10).value(), "{}");
  EXPECT_EQ((*store)->Stat("config.json")->etag, Sha256::Of("{}"));
  EXPECT_EQ((*store)->List("")->size(), 2u);
  EXPECT_TRUE(absl::IsNotFound((*store)->Stat("absent").status()));
  std::vector<std::byte> bytes(5);
  EXPECT_TRUE(absl::IsDataLoss((*store)->ReadInto("config.json", 0, absl::MakeSpan(bytes))));
  EXPECT_TRUE(absl::IsUnimplemented((*store)->Create("config.json").status()));
  unsetenv(kArtifactRootVariable);
  EXPECT_TRUE(absl::IsFailedPrecondition(OpenStore(artifact->uri()).status()));

  EXPECT_THAT(Delete(artifact->uri()), IsOk());
  EXPECT_EQ(ReasonOf(Delete(artifact->uri())), "ARTIFACT_NOT_FOUND");
  EXPECT_EQ(ReasonOf(Get(request).status()), "ARTIFACT_NOT_FOUND");
}

TEST_F(ArtifactServiceTest, AnArtifactNeedsItsBlobs) {
  Put("{}");
  const absl::Status missing = Create({{"config.json", "{}"}, {"model.bin", "weights"}}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(missing));
  EXPECT_EQ(ReasonOf(missing), "BLOB_MISSING");
  google::rpc::PreconditionFailure failure;
  const auto payload = missing.GetPayload("type.googleapis.com/google.rpc.PreconditionFailure");
  ASSERT_TRUE(payload.has_value());
  ASSERT_TRUE(failure.ParseFromString(std::string(*payload)));
  ASSERT_EQ(failure.violations_size(), 1);
  EXPECT_EQ(failure.violations(0).type(), "MISSING");
  EXPECT_EQ(failure.violations(0).subject(), BlobName("weights"));
  // Nothing of it is left.
  grpc::ClientContext context;
  v1::ListArtifactsResponse list;
  ASSERT_TRUE(stub_->ListArtifacts(&context, {}, &list).ok());
  EXPECT_EQ(list.artifacts_size(), 0);

  for (const char* path : {"", "/config.json", "../config.json", "a//b", "a/./b"}) {
    EXPECT_EQ(ReasonOf(Create({{path, "{}"}}).status()), "FIELD_INVALID") << path;
  }
  EXPECT_EQ(ReasonOf(Create({{"a", "{}"}, {"a", "{}"}}).status()), "FIELD_INVALID");
  EXPECT_EQ(ReasonOf(Create({{"a", "{}"}, {"a-b", "{}"}, {"a/b", "{}"}}).status()),
            "FIELD_INVALID");
  EXPECT_EQ(ReasonOf(Create({}).status()), "FIELD_INVALID");
}

TEST_F(ArtifactServiceTest, OutputsAreThereWithTheirManifest) {
  const std::string manifest =
      absl::StrCat(R"({"files": [{"name": "model.safetensors", "bytes": 7, "sha256": ")",
                   Sha256::Of("weights"), R"("}]})");
  folder_.Write("artifacts/outputs/merged/model.safetensors", "weights");
  folder_.Write("artifacts/outputs/merged/stray", "x");
  v1::GetArtifactRequest request;
  request.set_uri("artifact://merged");
  EXPECT_EQ(ReasonOf(Get(request).status()), "ARTIFACT_NOT_FOUND");
  EXPECT_EQ(ReasonOf(Read("outputs/merged/model.safetensors").status()), "ARTIFACT_NOT_FOUND");

  folder_.Write("artifacts/outputs/merged/pewter_manifest.json", manifest);
  const auto artifact = Get(request);
  ASSERT_THAT(artifact, IsOk());
  ASSERT_EQ(artifact->files_size(), 2);
  EXPECT_EQ(Read(artifact->files(0).resource_name()).value(), "weights");
  EXPECT_EQ(Read(artifact->files(1).resource_name()).value(), manifest);
  EXPECT_EQ(artifact->files(1).digest().sha256(), Sha256::Of(manifest));
  EXPECT_EQ(ReasonOf(Read("outputs/merged/stray").status()), "ARTIFACT_NOT_FOUND");

  Put("{}");
  const std::string uploaded = Create({{"config.json", "{}"}})->uri();
  v1::ListArtifactsRequest page;
  page.set_page_size(1);
  std::vector<std::string> uris;
  do {
    grpc::ClientContext context;
    v1::ListArtifactsResponse list;
    ASSERT_TRUE(stub_->ListArtifacts(&context, page, &list).ok());
    for (const v1::Artifact& item : list.artifacts()) uris.push_back(item.uri());
    page.set_page_token(list.next_page_token());
  } while (!page.page_token().empty());
  EXPECT_THAT(uris, ElementsAre("artifact://merged", uploaded));

  EXPECT_THAT(Delete("artifact://merged"), IsOk());
  EXPECT_FALSE(std::filesystem::exists(folder_ / "artifacts/outputs/merged"));
}

TEST_F(ArtifactServiceTest, WhatAJobHasWrittenIsReadAndNothingElse) {
  v1::Job job;
  job.set_id("j1");
  job.set_destination_uri(folder_ / "out");
  job.mutable_output()->set_uri(folder_ / "out");
  job.mutable_output()->set_manifest_json(
      absl::StrCat(R"({"files": [{"name": "model.safetensors", "bytes": 7, "sha256": ")",
                   Sha256::Of("weights"), R"("}]})"));
  EXPECT_EQ(ReasonOf(DescribeJobOutput(job).status()), "JOB_NOT_SUCCEEDED");
  job.set_state(v1::JOB_STATE_SUCCEEDED);
  const auto artifact = DescribeJobOutput(job);
  ASSERT_THAT(artifact, IsOk());
  EXPECT_EQ(artifact->files(0).resource_name(), "jobs/j1/model.safetensors");
  EXPECT_THAT(FindJobFile(job, "model.safetensors"), IsOk());
  EXPECT_EQ(ReasonOf(FindJobFile(job, "id_rsa").status()), "ARTIFACT_NOT_FOUND");
  // A manifest that names what lies elsewhere is none.
  job.mutable_output()->set_manifest_json(R"({"files": [{"name": "../id_rsa", "bytes": 7}]})");
  EXPECT_FALSE(DescribeJobOutput(job).ok());
  const std::string secret = folder_.Write("id_rsa", "secret!");
  EXPECT_FALSE(DeleteJobOutput(job).ok());
  EXPECT_TRUE(std::filesystem::exists(secret));
  EXPECT_EQ(ReasonOf(Read("jobs/j1/model.safetensors").status()), "JOB_NOT_FOUND");
}

TEST_F(ArtifactServiceTest, SpaceIsAskedForBeforeBytesAreTaken) {
  Restart({.quota_bytes = 10'000});
  Put(Content(6000, 1));
  const std::string large = Content(6000, 2);
  const grpc::Status over = Write(UploadName(large), 0, large, /*finish=*/true);
  EXPECT_EQ(over.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonOf(FromGrpc(over)), "QUOTA_BYTES");
  Put(Content(4000, 3));

  min_free_bytes_ = int64_t{1} << 60;
  Restart();
  EXPECT_EQ(ReasonOf(FromGrpc(Write(UploadName(large), 0, large, /*finish=*/true))), "DISK_FULL");
}

TEST_F(ArtifactServiceTest, SweepsWhatNobodyNeeds) {
  Put("kept");
  Put("unused");
  const std::string uri = Create({{"config.json", "kept"}})->uri();
  const std::string partial = UploadName("never whole");
  ASSERT_TRUE(Write(partial, 0, "never", /*finish=*/false).ok());
  const absl::Time now = absl::Now();
  ASSERT_THAT(artifacts_->Sweep(now + absl::Hours(23)), IsOk());
  EXPECT_EQ(Committed(partial), 5);
  EXPECT_THAT(Read(BlobName("unused")), IsOk());
  ASSERT_THAT(artifacts_->Sweep(now + absl::Hours(48)), IsOk());
  EXPECT_EQ(Committed(partial), -1);
  EXPECT_EQ(ReasonOf(Read(BlobName("unused")).status()), "BLOB_NOT_FOUND");
  EXPECT_EQ(Read(BlobName("kept")).value(), "kept");

  ASSERT_THAT(Delete(uri), IsOk());
  ASSERT_THAT(artifacts_->Sweep(now + absl::Hours(49)), IsOk());
  // Who asks for it keeps it.
  v1::FindMissingBlobsRequest request;
  request.add_blobs()->set_sha256(Sha256::Of("kept"));
  request.mutable_blobs(0)->set_size_bytes(4);
  ASSERT_THAT(artifacts_->FindMissing(request), IsOk());
  ASSERT_THAT(artifacts_->Sweep(now + absl::Hours(74)), IsOk());
  EXPECT_EQ(Read(BlobName("kept")).value(), "kept");
  ASSERT_THAT(artifacts_->Sweep(now + absl::Hours(98)), IsOk());
  EXPECT_EQ(ReasonOf(Read(BlobName("kept")).status()), "BLOB_NOT_FOUND");
}

}  // namespace
}  // namespace pewter::server
