#include "server/health.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status.h"
#include "google/protobuf/wrappers.pb.h"
#include "server/errors.h"

namespace pewter::server {
namespace {

constexpr absl::Duration kCallLimit = absl::Seconds(5);
constexpr int kServing = 1;

}  // namespace

absl::Status CheckHealth(const std::string& address, const std::string& service) {
  // Debian's gRPC comes without the messages of grpc.health.v1. Each has one field, of number 1: as
  // in these.
  google::protobuf::StringValue request;
  google::protobuf::Int32Value response;
  request.set_value(service);
  grpc::TemplatedGenericStub<google::protobuf::StringValue, google::protobuf::Int32Value> stub(
      grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + kCallLimit));
  absl::Mutex mutex;
  bool done = false;
  grpc::Status status;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", {}, &request, &response,
                 [&](grpc::Status answer) {
                   absl::MutexLock lock(&mutex);
                   status = std::move(answer);
                   done = true;
                 });
  {
    absl::MutexLock lock(&mutex);
    mutex.Await(absl::Condition(&done));
  }
  RETURN_IF_ERROR(Annotate(FromGrpc(status), address));
  if (response.value() == kServing) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(address, " does not serve now"));
}

}  // namespace pewter::server
