#include "server/merge_service.h"

#include "server/convert.h"
#include "server/errors.h"

namespace pewter::server {
grpc::Status MergeServiceImpl::CreateJob(grpc::ServerContext*, const v1::CreateJobRequest* request,
                                         v1::CreateJobResponse* response) {
  return Reply(jobs_.Create(*request), response->mutable_job());
}

grpc::Status MergeServiceImpl::GetJob(grpc::ServerContext*, const v1::GetJobRequest* request,
                                      v1::GetJobResponse* response) {
  return Reply(jobs_.Get(request->job_id()), response->mutable_job());
}

grpc::Status MergeServiceImpl::ListJobs(grpc::ServerContext*, const v1::ListJobsRequest* request,
                                        v1::ListJobsResponse* response) {
  return Reply(jobs_.List(*request), response);
}

grpc::Status MergeServiceImpl::CancelJob(grpc::ServerContext*, const v1::CancelJobRequest* request,
                                         v1::CancelJobResponse* response) {
  return Reply(jobs_.Cancel(request->job_id()), response->mutable_job());
}

grpc::Status MergeServiceImpl::RetryJob(grpc::ServerContext*, const v1::RetryJobRequest* request,
                                        v1::RetryJobResponse* response) {
  return Reply(jobs_.Retry(*request), response->mutable_job());
}

grpc::Status MergeServiceImpl::DeleteJob(grpc::ServerContext* context,
                                         const v1::DeleteJobRequest* request,
                                         v1::DeleteJobResponse*) {
  return ToGrpc(jobs_.Delete(*request, [&] { return context->IsCancelled(); }));
}

grpc::Status MergeServiceImpl::WatchJob(grpc::ServerContext* context,
                                        const v1::WatchJobRequest* request,
                                        grpc::ServerWriter<v1::WatchJobResponse>* writer) {
  v1::WatchJobResponse response;
  return ToGrpc(jobs_.Watch(
      *request,
      [&](const v1::JobEvent& event) {
        *response.mutable_event() = event;
        return writer->Write(response);
      },
      [&] { return context->IsCancelled(); }));
}

grpc::Status MergeServiceImpl::PlanMerge(grpc::ServerContext*, const v1::PlanMergeRequest* request,
                                         v1::PlanMergeResponse* response) {
  return Reply(planner_.Plan(*request), response);
}

grpc::Status MergeServiceImpl::ListMethods(grpc::ServerContext*, const v1::ListMethodsRequest*,
                                           v1::ListMethodsResponse* response) {
  for (const MergeMethod* method : Methods()) *response->add_methods() = ToMethodInfo(*method);
  for (const AdapterMethod* method : AdapterMethods()) {
    *response->add_adapter_methods() = ToMethodInfo(*method);
  }
  return grpc::Status::OK;
}

}  // namespace pewter::server
