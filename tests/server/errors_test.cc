#include "server/errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace pewter::server {
namespace {

using ::testing::EndsWith;

google::rpc::Status DetailsOf(const grpc::Status& status) {
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  return details;
}

template <typename Detail>
Detail Unpack(const google::rpc::Status& status) {
  Detail detail;
  int found = 0;
  for (const auto& any : status.details()) found += any.UnpackTo(&detail) ? 1 : 0;
  EXPECT_EQ(found, 1) << Detail::descriptor()->full_name();
  return detail;
}

TEST(Errors, CarryStandardDetails) {
  const grpc::Status status = ToGrpc(WithRetry(
      MakeError(absl::StatusCode::kResourceExhausted, "QUEUE_FULL", "full", {{"limit", "9"}}),
      absl::Milliseconds(1500)));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_message(), "full");
  const google::rpc::Status details = DetailsOf(status);
  EXPECT_EQ(details.code(), 8);
  const auto info = Unpack<google::rpc::ErrorInfo>(details);
  EXPECT_EQ(info.reason(), "QUEUE_FULL");
  EXPECT_EQ(info.domain(), "pewter.dev");
  EXPECT_EQ(info.metadata().at("limit"), "9");
  const auto retry = Unpack<google::rpc::RetryInfo>(details);
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);
}

TEST(Errors, BadRequestHoldsAllViolations) {
  const absl::Status error = BadRequestError("FIELD_INVALID", {{"a", "is bad"}, {"b", "is worse"}});
  EXPECT_EQ(error.message(), "a: is bad; b: is worse");
  const auto request = Unpack<google::rpc::BadRequest>(DetailsOf(ToGrpc(error)));
  ASSERT_EQ(request.field_violations_size(), 2);
  EXPECT_EQ(request.field_violations(1).field(), "b");
  EXPECT_EQ(request.field_violations(1).description(), "is worse");
}

TEST(Errors, EveryErrorHasAReason) {
  const grpc::Status status = ToGrpc(absl::DataLossError("bad row"));
  EXPECT_EQ(Unpack<google::rpc::ErrorInfo>(DetailsOf(status)).reason(), "DATA_LOSS");
}

TEST(Errors, ComeBackAsTheyWere) {
  const absl::Status error =
      WithRetry(MakeError(absl::StatusCode::kAborted, "LEASE_LOST", "lost"), absl::Seconds(1));
  EXPECT_EQ(FromGrpc(ToGrpc(error)), error);
  EXPECT_EQ(ReasonOf(FromGrpc(ToGrpc(error))), "LEASE_LOST");
  EXPECT_TRUE(FromGrpc(grpc::Status::OK).ok());
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
}

TEST(Errors, LongMessagesAreCutAtACharacter) {
  std::string message;
  for (int i = 0; i < 3000; ++i) message += "\xC3\xA9";  // é
  const grpc::Status status = ToGrpc(absl::InternalError("x" + message));
  EXPECT_LE(status.error_message().size(), 2100u);
  EXPECT_THAT(status.error_message(), EndsWith("\xC3\xA9..."));
}

TEST(Errors, ManyViolationsFitIntoMetadata) {
  std::vector<FieldViolation> violations;
  for (int i = 0; i < 500; ++i) {
    violations.push_back({absl::StrCat("field", i), std::string(200, 'x')});
  }
  const grpc::Status status = ToGrpc(BadRequestError("FIELD_INVALID", violations));
  EXPECT_LE(status.error_message().size() + status.error_details().size(), 8000u);
  EXPECT_EQ(Unpack<google::rpc::ErrorInfo>(DetailsOf(status)).reason(), "FIELD_INVALID");
}

}  // namespace
}  // namespace pewter::server
