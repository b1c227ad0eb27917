#include "server/artifact_service.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "server/errors.h"

namespace pewter::server {
namespace {

using google::bytestream::QueryWriteStatusRequest;
using google::bytestream::QueryWriteStatusResponse;
using google::bytestream::ReadRequest;
using google::bytestream::ReadResponse;
using google::bytestream::WriteRequest;
using google::bytestream::WriteResponse;

// Of data in a message: gRPC is fastest with these, and takes 4 MiB at most.
constexpr int64_t kFrameBytes = int64_t{1} << 20;
constexpr int kJobPage = 1000;

absl::StatusOr<ResourceName> ParseName(absl::string_view text) {
  absl::StatusOr<ResourceName> name = ParseResourceName(text);
  if (name.ok()) return name;
  return BadRequestError("RESOURCE_NAME_INVALID",
                         {{"resource_name", std::string(name.status().message())}});
}

// FailedPrecondition while a job that is not final writes `uri`.
absl::Status CheckNotWritten(JobManager& jobs, absl::string_view uri) {
  v1::ListJobsRequest request;
  for (const v1::JobState state : {v1::JOB_STATE_QUEUED, v1::JOB_STATE_PLANNING,
                                   v1::JOB_STATE_RUNNING, v1::JOB_STATE_PUBLISHING}) {
    request.mutable_filter()->add_states(state);
  }
  request.set_page_size(kJobPage);
  do {
    ASSIGN_OR_RETURN(const v1::ListJobsResponse page, jobs.List(request));
    for (const v1::Job& job : page.jobs()) {
      if (job.destination_uri() != uri) continue;
      return MakeError(absl::StatusCode::kFailedPrecondition, "ARTIFACT_BUSY",
                       absl::StrCat("job ", job.id(), " writes ", uri, "; cancel it first"),
                       {{"job_id", job.id()}});
    }
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return absl::OkStatus();
}

}  // namespace

grpc::Status ArtifactServiceImpl::FindMissingBlobs(grpc::ServerContext*,
                                                   const v1::FindMissingBlobsRequest* request,
                                                   v1::FindMissingBlobsResponse* response) {
  return Reply(artifacts_.FindMissing(*request), response);
}

grpc::Status ArtifactServiceImpl::CreateArtifact(grpc::ServerContext*,
                                                 const v1::CreateArtifactRequest* request,
                                                 v1::CreateArtifactResponse* response) {
  return Reply(artifacts_.Create(*request), response->mutable_artifact());
}

grpc::Status ArtifactServiceImpl::GetArtifact(grpc::ServerContext*,
                                              const v1::GetArtifactRequest* request,
                                              v1::GetArtifactResponse* response) {
  if (request->source_case() != v1::GetArtifactRequest::kJobId) {
    return Reply(artifacts_.Get(request->uri()), response->mutable_artifact());
  }
  const absl::StatusOr<v1::Job> job = jobs_.Get(request->job_id());
  if (!job.ok()) return ToGrpc(job.status());
  return Reply(DescribeJobOutput(*job), response->mutable_artifact());
}

grpc::Status ArtifactServiceImpl::ListArtifacts(grpc::ServerContext*,
                                                const v1::ListArtifactsRequest* request,
                                                v1::ListArtifactsResponse* response) {
  return Reply(artifacts_.List(*request), response);
}

grpc::Status ArtifactServiceImpl::DeleteArtifact(grpc::ServerContext*,
                                                 const v1::DeleteArtifactRequest* request,
                                                 v1::DeleteArtifactResponse*) {
  if (const absl::Status busy = CheckNotWritten(jobs_, request->uri()); !busy.ok()) {
    return ToGrpc(busy);
  }
  return ToGrpc(artifacts_.Delete(request->uri()));
}

// A stream's place among those that run, and what is known of its waiting for the client.
class ByteStreamImpl::Slot {
 public:
  Slot(ByteStreamImpl* service, grpc::ServerContext* context) : service_(*service) {
    absl::MutexLock lock(&service_.mutex_);
    if (static_cast<int>(service_.streams_.size()) >= service_.options_.max_streams) return;
    service_.streams_.push_back({.cancel = [context] { context->TryCancel(); }});
    stream_ = std::prev(service_.streams_.end());
    taken_ = true;
  }
  ~Slot() {
    if (!taken_) return;
    absl::MutexLock lock(&service_.mutex_);
    service_.streams_.erase(stream_);
  }
  Slot(const Slot&) = delete;

  absl::Status status() const {
    if (taken_) return absl::OkStatus();
    return WithRetry(
        MakeError(absl::StatusCode::kResourceExhausted, "TOO_MANY_STREAMS",
                  absl::StrCat(service_.options_.max_streams,
                               " uploads and downloads run, as many as this server takes at a "
                               "time; try again"),
                  {{"limit", absl::StrCat(service_.options_.max_streams)}}),
        absl::Seconds(1));
  }

  // Runs what waits for the client.
  template <typename Wait>
  bool Waiting(Wait wait) {
    Set(absl::Now());
    const bool moved = wait();
    Set(absl::InfiniteFuture());
    return moved;
  }

  // Why a stream ended before its end, other than that the client is gone.
  absl::Status ended() {
    absl::MutexLock lock(&service_.mutex_);
    if (!stream_->idle) return absl::CancelledError("the client is gone");
    return MakeError(
        absl::StatusCode::kAborted, "STREAM_IDLE",
        absl::StrCat("nothing has moved for ", absl::FormatDuration(service_.options_.idle_limit),
                     "; go on with a new stream"));
  }

 private:
  void Set(absl::Time since) {
    absl::MutexLock lock(&service_.mutex_);
    stream_->waits_since = since;
  }

  ByteStreamImpl& service_;
  bool taken_ = false;
  std::list<Stream>::iterator stream_;
};

ByteStreamImpl::ByteStreamImpl(ArtifactManager* artifacts, JobManager* jobs,
                               const ByteStreamOptions& options)
    : artifacts_(*artifacts),
      jobs_(*jobs),
      options_(options),
      watcher_([this] { CancelIdleStreams(); }) {}

ByteStreamImpl::~ByteStreamImpl() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    stop_.SignalAll();
  }
  watcher_.join();
}

void ByteStreamImpl::CancelIdleStreams() {
  absl::MutexLock lock(&mutex_);
  while (!stopping_) {
    stop_.WaitWithTimeout(&mutex_, options_.idle_limit / 4);
    for (Stream& stream : streams_) {
      if (absl::Now() - stream.waits_since < options_.idle_limit) continue;
      stream.idle = true;
      stream.cancel();
    }
  }
}

absl::Status ByteStreamImpl::DoRead(const ReadRequest& request, Slot& slot,
                                    grpc::ServerWriter<ReadResponse>* writer) {
  ASSIGN_OR_RETURN(const ResourceName name, ParseName(request.resource_name()));
  ArtifactManager::Object object;
  if (name.kind == ResourceName::Kind::kJobFile) {
    ASSIGN_OR_RETURN(const v1::Job job, jobs_.Get(name.id));
    ASSIGN_OR_RETURN(object, FindJobFile(job, name.path));
  } else {
    ASSIGN_OR_RETURN(object, artifacts_.Find(name));
  }
  if (request.read_limit() < 0) {
    return BadRequestError("FIELD_INVALID", {{"read_limit", "must not be negative"}});
  }
  if (request.read_offset() < 0 || request.read_offset() > object.size) {
    return MakeError(absl::StatusCode::kOutOfRange, "READ_PAST_END",
                     absl::StrCat(name.ToString(), " has ", object.size, " bytes"),
                     {{"size", absl::StrCat(object.size)}});
  }
  int64_t left = object.size - request.read_offset();
  if (request.read_limit() > 0) left = std::min(left, request.read_limit());
  int64_t offset = request.read_offset();
  const auto intent = object.store->WillRead(object.key, offset, left);
  ReadResponse response;
  std::string& data = *response.mutable_data();
  while (left > 0) {
    data.resize(std::min(left, kFrameBytes));
    RETURN_IF_ERROR(object.store->ReadInto(
        object.key, offset,
        absl::MakeSpan(reinterpret_cast<std::byte*>(data.data()), data.size())));
    if (!slot.Waiting([&] { return writer->Write(response); })) return slot.ended();
    offset += data.size();
    left -= data.size();
  }
  return absl::OkStatus();
}

absl::Status ByteStreamImpl::DoWrite(grpc::ServerContext* context, Slot& slot,
                                     grpc::ServerReader<WriteRequest>* reader,
                                     WriteResponse* response) {
  WriteRequest request;
  const auto read = [&] { return reader->Read(&request); };
  if (!slot.Waiting(read)) return BadRequestError("RESOURCE_NAME_INVALID", {{"resource_name", ""}});
  ASSIGN_OR_RETURN(const ResourceName name, ParseName(request.resource_name()));
  if (name.kind != ResourceName::Kind::kUpload) {
    return BadRequestError("RESOURCE_NAME_INVALID",
                           {{"resource_name", "is not uploads/UUID/blobs/sha256/DIGEST/SIZE"}});
  }
  const std::string first = request.resource_name();
  ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactManager::Upload> upload,
                   artifacts_.Begin(name, [context] { context->TryCancel(); }));
  while (!upload->complete()) {
    if (!request.resource_name().empty() && request.resource_name() != first) {
      return BadRequestError("RESOURCE_NAME_INVALID",
                             {{"resource_name", "must not change within a stream"}});
    }
    RETURN_IF_ERROR(upload->Append(request.write_offset(), request.data()));
    if (request.finish_write()) {
      RETURN_IF_ERROR(upload->Finish());
    } else if (!slot.Waiting(read)) {
      if (context->IsCancelled()) return slot.ended();
      break;  // the client wants to go on later
    }
  }
  response->set_committed_size(upload->committed());
  return absl::OkStatus();
}

grpc::Status ByteStreamImpl::Read(grpc::ServerContext* context, const ReadRequest* request,
                                  grpc::ServerWriter<ReadResponse>* writer) {
  Slot slot(this, context);
  if (!slot.status().ok()) return ToGrpc(slot.status());
  return ToGrpc(DoRead(*request, slot, writer));
}

grpc::Status ByteStreamImpl::Write(grpc::ServerContext* context,
                                   grpc::ServerReader<WriteRequest>* reader,
                                   WriteResponse* response) {
  Slot slot(this, context);
  if (!slot.status().ok()) return ToGrpc(slot.status());
  return ToGrpc(DoWrite(context, slot, reader, response));
}

grpc::Status ByteStreamImpl::QueryWriteStatus(grpc::ServerContext*,
                                              const QueryWriteStatusRequest* request,
                                              QueryWriteStatusResponse* response) {
  const absl::StatusOr<ResourceName> name = ParseName(request->resource_name());
  if (!name.ok()) return ToGrpc(name.status());
  const auto status = artifacts_.Status(*name);
  if (!status.ok()) return ToGrpc(status.status());
  response->set_committed_size(status->committed);
  response->set_complete(status->complete);
  return grpc::Status::OK;
}

}  // namespace pewter::server
