// WorkerService over a JobManager: unpack, call, pack.
#pragma once

#include "pewter/v1/worker_service.grpc.pb.h"
#include "server/job_manager.h"

namespace pewter::server {

// Metadata of every call of a worker.
inline constexpr char kTokenMetadata[] = "pewter-job-token";

class WorkerServiceImpl final : public v1::WorkerService::Service {
 public:
  // `jobs` must outlive it.
  explicit WorkerServiceImpl(JobManager* jobs) : jobs_(*jobs) {}

  grpc::Status ClaimJob(grpc::ServerContext* context, const v1::ClaimJobRequest* request,
                        v1::ClaimJobResponse* response) override;
  grpc::Status Heartbeat(grpc::ServerContext* context, const v1::HeartbeatRequest* request,
                         v1::HeartbeatResponse* response) override;
  grpc::Status FinishJob(grpc::ServerContext* context, const v1::FinishJobRequest* request,
                         v1::FinishJobResponse* response) override;

 private:
  JobManager& jobs_;
};

}  // namespace pewter::server
