// MergeService over a JobManager and a Planner: unpack, call, pack.
#pragma once

#include "pewter/v1/merge_service.grpc.pb.h"
#include "server/job_manager.h"
#include "server/planner.h"

namespace pewter::server {

class MergeServiceImpl final : public v1::MergeService::Service {
 public:
  // Both must outlive it.
  MergeServiceImpl(JobManager* jobs, Planner* planner) : jobs_(*jobs), planner_(*planner) {}

  grpc::Status CreateJob(grpc::ServerContext* context, const v1::CreateJobRequest* request,
                         v1::CreateJobResponse* response) override;
  grpc::Status GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request,
                      v1::GetJobResponse* response) override;
  grpc::Status ListJobs(grpc::ServerContext* context, const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* response) override;
  grpc::Status CancelJob(grpc::ServerContext* context, const v1::CancelJobRequest* request,
                         v1::CancelJobResponse* response) override;
  grpc::Status RetryJob(grpc::ServerContext* context, const v1::RetryJobRequest* request,
                        v1::RetryJobResponse* response) override;
  grpc::Status DeleteJob(grpc::ServerContext* context, const v1::DeleteJobRequest* request,
                         v1::DeleteJobResponse* response) override;
  grpc::Status WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::WatchJobResponse>* writer) override;
  grpc::Status PlanMerge(grpc::ServerContext* context, const v1::PlanMergeRequest* request,
                         v1::PlanMergeResponse* response) override;
  grpc::Status ListMethods(grpc::ServerContext* context, const v1::ListMethodsRequest* request,
                           v1::ListMethodsResponse* response) override;

 private:
  JobManager& jobs_;
  Planner& planner_;
};

}  // namespace pewter::server
