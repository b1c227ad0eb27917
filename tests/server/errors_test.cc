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

TEST(Errors, OfARecipeNameThePlace) {
  const absl::Status error = BadRequestError(
      "RECIPE_INVALID", {{"recipe", "recipe:7:3: no", 7, 3}, {"priority", "is too high"}});
  EXPECT_EQ(error.message(), "recipe:7:3: no; priority: is too high");
  const auto info = Unpack<google::rpc::ErrorInfo>(DetailsOf(ToGrpc(error)));
  EXPECT_EQ(info.metadata().at("field"), "recipe");
  EXPECT_EQ(info.metadata().at("line"), "7");
  EXPECT_EQ(info.metadata().at("column"), "3");
}

TEST(Errors, QuotasPreconditionsAndResourcesAreDetails) {
  const absl::Status error = MakeError(absl::StatusCode::kResourceExhausted, "QUOTA_JOBS", "full");
  const google::rpc::Status quota =
      DetailsOf(ToGrpc(WithQuota(error, "projects/nlp", absl::Seconds(30))));
  EXPECT_EQ(Unpack<google::rpc::QuotaFailure>(quota).violations(0).subject(), "projects/nlp");
  EXPECT_EQ(Unpack<google::rpc::QuotaFailure>(quota).violations(0).description(), "full");
  EXPECT_EQ(Unpack<google::rpc::RetryInfo>(quota).retry_delay().seconds(), 30);
  const google::rpc::Status state = DetailsOf(ToGrpc(WithPrecondition(error, "STATE", "jobs/j")));
  EXPECT_EQ(Unpack<google::rpc::PreconditionFailure>(state).violations(0).type(), "STATE");
  const google::rpc::Status missing = DetailsOf(ToGrpc(WithResource(error, "pewter.v1.Job", "j")));
  EXPECT_EQ(Unpack<google::rpc::ResourceInfo>(missing).resource_name(), "j");
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
  const google::rpc::Status details = DetailsOf(status);
  EXPECT_LE(status.error_details().size(), 4096u);
  EXPECT_EQ(Unpack<google::rpc::ErrorInfo>(details).reason(), "FIELD_INVALID");
  const auto request = Unpack<google::rpc::BadRequest>(details);
  const int last = request.field_violations_size() - 1;
  EXPECT_GE(last, 5);
  EXPECT_EQ(request.field_violations(0).field(), "field0");
  EXPECT_EQ(request.field_violations(last).description(), absl::StrCat(500 - last, " more"));
}

TEST(Errors, AtMostAHundredViolationsAreListed) {
  const std::vector<FieldViolation> violations(150, {"f", "x"});
  const auto request =
      Unpack<google::rpc::BadRequest>(DetailsOf(ToGrpc(BadRequestError("R", violations))));
  ASSERT_EQ(request.field_violations_size(), 101);
  EXPECT_EQ(request.field_violations(100).description(), "50 more");
}

TEST(Errors, WhateverIsAddedErrorInfoIsThere) {
  const std::string text(100'000, 'x');
  absl::Status error =
      MakeError(absl::StatusCode::kNotFound, "A", text, {{"a", text}, {"b", text}, {"c", text}});
  error = WithQuota(WithPrecondition(WithResource(error, text, text), "T", text), text,
                    absl::Seconds(1));
  const grpc::Status status = ToGrpc(error);
  EXPECT_LE(status.error_details().size(), 4096u);
  EXPECT_EQ(Unpack<google::rpc::ErrorInfo>(DetailsOf(status)).reason(), "A");
}

}  // namespace
}  // namespace pewter::server
