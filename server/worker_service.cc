#include "server/worker_service.h"

#include "absl/strings/string_view.h"
#include "server/errors.h"

namespace pewter::server {
namespace {

absl::string_view TokenOf(const grpc::ServerContext& context) {
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find(kTokenMetadata);
  return it == metadata.end() ? absl::string_view()
                              : absl::string_view(it->second.data(), it->second.size());
}

}  // namespace

grpc::Status WorkerServiceImpl::ClaimJob(grpc::ServerContext* context,
                                         const v1::ClaimJobRequest* request,
                                         v1::ClaimJobResponse* response) {
  return Reply(jobs_.Claim(TokenOf(*context), *request), response);
}

grpc::Status WorkerServiceImpl::Heartbeat(grpc::ServerContext* context,
                                          const v1::HeartbeatRequest* request,
                                          v1::HeartbeatResponse* response) {
  return Reply(jobs_.Heartbeat(TokenOf(*context), *request), response);
}

grpc::Status WorkerServiceImpl::FinishJob(grpc::ServerContext* context,
                                          const v1::FinishJobRequest* request,
                                          v1::FinishJobResponse*) {
  return ToGrpc(jobs_.Finish(TokenOf(*context), *request));
}

}  // namespace pewter::server
