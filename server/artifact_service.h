// ArtifactService and ByteStream over an ArtifactManager, and a JobManager for what jobs have left.
//
// A stream holds one of gRPC's threads, so their number is bounded, and one on which nothing moves
// for `idle_limit` is cancelled.
#pragma once

#include <functional>
#include <list>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "google/bytestream/bytestream.grpc.pb.h"
#include "pewter/v1/artifact_service.grpc.pb.h"
#include "server/artifact_manager.h"
#include "server/job_manager.h"

namespace pewter::server {

class ArtifactServiceImpl final : public v1::ArtifactService::Service {
 public:
  // Both must outlive it.
  ArtifactServiceImpl(ArtifactManager* artifacts, JobManager* jobs)
      : artifacts_(*artifacts), jobs_(*jobs) {}

  grpc::Status FindMissingBlobs(grpc::ServerContext* context,
                                const v1::FindMissingBlobsRequest* request,
                                v1::FindMissingBlobsResponse* response) override;
  grpc::Status CreateArtifact(grpc::ServerContext* context,
                              const v1::CreateArtifactRequest* request,
                              v1::CreateArtifactResponse* response) override;
  grpc::Status GetArtifact(grpc::ServerContext* context, const v1::GetArtifactRequest* request,
                           v1::GetArtifactResponse* response) override;
  grpc::Status ListArtifacts(grpc::ServerContext* context, const v1::ListArtifactsRequest* request,
                             v1::ListArtifactsResponse* response) override;
  grpc::Status DeleteArtifact(grpc::ServerContext* context,
                              const v1::DeleteArtifactRequest* request,
                              v1::DeleteArtifactResponse* response) override;

 private:
  ArtifactManager& artifacts_;
  JobManager& jobs_;
};

struct ByteStreamOptions {
  int max_streams = 64;
  absl::Duration idle_limit = absl::Seconds(60);
};

class ByteStreamImpl final : public google::bytestream::ByteStream::Service {
 public:
  // Both must outlive it.
  ByteStreamImpl(ArtifactManager* artifacts, JobManager* jobs, const ByteStreamOptions& options);
  ~ByteStreamImpl() override;

  grpc::Status Read(grpc::ServerContext* context, const google::bytestream::ReadRequest* request,
                    grpc::ServerWriter<google::bytestream::ReadResponse>* writer) override;
  grpc::Status Write(grpc::ServerContext* context,
                     grpc::ServerReader<google::bytestream::WriteRequest>* reader,
                     google::bytestream::WriteResponse* response) override;
  grpc::Status QueryWriteStatus(grpc::ServerContext* context,
                                const google::bytestream::QueryWriteStatusRequest* request,
                                google::bytestream::QueryWriteStatusResponse* response) override;

 private:
  // A stream that runs.
  struct Stream {
    std::function<void()> cancel;
    absl::Time waits_since = absl::InfiniteFuture();  // for the client
    bool idle = false;                                // and therefore cancelled
  };
  class Slot;

  absl::Status DoRead(const google::bytestream::ReadRequest& request, Slot& slot,
                      grpc::ServerWriter<google::bytestream::ReadResponse>* writer);
  absl::Status DoWrite(grpc::ServerContext* context, Slot& slot,
                       grpc::ServerReader<google::bytestream::WriteRequest>* reader,
                       google::bytestream::WriteResponse* response);
  void CancelIdleStreams();

  ArtifactManager& artifacts_;
  JobManager& jobs_;
  const ByteStreamOptions options_;
  absl::Mutex mutex_;
  absl::CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::list<Stream> streams_ ABSL_GUARDED_BY(mutex_);
  std::thread watcher_;
};

}  // namespace pewter::server
