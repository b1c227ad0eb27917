#include "server/errors.h"

#include <algorithm>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace pewter::server {
namespace {

constexpr absl::string_view kDomain = "pewter.dev";
constexpr absl::string_view kTypePrefix = "type.googleapis.com/";
constexpr size_t kMaxMessageBytes = 2048;
constexpr size_t kMaxDetailsBytes = 3072;
constexpr size_t kMaxViolations = 20;

template <typename Detail>
std::string TypeUrl() {
  return absl::StrCat(kTypePrefix, Detail::descriptor()->full_name());
}

template <typename Detail>
void SetDetail(absl::Status& status, const Detail& detail) {
  status.SetPayload(TypeUrl<Detail>(), absl::Cord(detail.SerializeAsString()));
}

// Cuts at a character of UTF-8.
std::string Cut(absl::string_view text, size_t limit) {
  if (text.size() <= limit) return std::string(text);
  while (limit > 0 && (static_cast<unsigned char>(text[limit]) & 0xC0) == 0x80) --limit;
  return absl::StrCat(text.substr(0, limit), "...");
}

google::rpc::ErrorInfo InfoOf(const absl::Status& status) {
  google::rpc::ErrorInfo info;
  if (const auto payload = status.GetPayload(TypeUrl<google::rpc::ErrorInfo>())) {
    info.ParseFromString(std::string(*payload));
  }
  return info;
}

}  // namespace

absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       const std::map<std::string, std::string>& metadata) {
  absl::Status status(code, message);
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(std::string(kDomain));
  for (const auto& [key, value] : metadata) (*info.mutable_metadata())[key] = value;
  SetDetail(status, info);
  return status;
}

absl::Status BadRequestError(absl::string_view reason,
                             const std::vector<FieldViolation>& violations) {
  std::vector<std::string> lines;
  google::rpc::BadRequest request;
  for (size_t i = 0; i < std::min(violations.size(), kMaxViolations); ++i) {
    lines.push_back(absl::StrCat(violations[i].field, ": ", violations[i].description));
    auto* violation = request.add_field_violations();
    violation->set_field(violations[i].field);
    violation->set_description(Cut(violations[i].description, kMaxMessageBytes));
  }
  if (violations.size() > kMaxViolations) {
    lines.push_back(absl::StrCat(violations.size() - kMaxViolations, " more"));
  }
  absl::Status status =
      MakeError(absl::StatusCode::kInvalidArgument, reason, absl::StrJoin(lines, "; "));
  SetDetail(status, request);
  return status;
}

absl::Status MissingError(absl::string_view reason, const std::vector<std::string>& subjects,
                          absl::string_view description) {
  google::rpc::PreconditionFailure failure;
  for (size_t i = 0; i < std::min(subjects.size(), kMaxViolations); ++i) {
    auto* violation = failure.add_violations();
    violation->set_type("MISSING");
    violation->set_subject(subjects[i]);
    violation->set_description(std::string(description));
  }
  absl::Status status = MakeError(
      absl::StatusCode::kFailedPrecondition, reason,
      absl::StrCat(subjects.front(), " ", description,
                   subjects.size() > 1 ? absl::StrCat("; ", subjects.size() - 1, " more") : ""),
      {{"count", absl::StrCat(subjects.size())}});
  SetDetail(status, failure);
  return status;
}

absl::Status WithRetry(absl::Status status, absl::Duration delay) {
  google::rpc::RetryInfo retry;
  const int64_t nanos = absl::ToInt64Nanoseconds(delay);
  retry.mutable_retry_delay()->set_seconds(nanos / 1'000'000'000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
  SetDetail(status, retry);
  return status;
}

std::string ReasonOf(const absl::Status& status) { return InfoOf(status).reason(); }

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  absl::Status full = status;
  if (ReasonOf(full).empty()) {
    full = MakeError(full.code(), absl::StatusCodeToString(full.code()), full.message());
  }
  google::rpc::Status details;
  details.set_code(full.raw_code());
  details.set_message(Cut(full.message(), kMaxMessageBytes));
  size_t bytes = 0;
  const auto add = [&](absl::string_view url, const absl::Cord& payload) {
    if (bytes + payload.size() > kMaxDetailsBytes) return;
    bytes += payload.size();
    auto* detail = details.add_details();
    detail->set_type_url(std::string(url));
    detail->set_value(std::string(payload));
  };
  // ErrorInfo first: it is what programs need most.
  const std::string info_url = TypeUrl<google::rpc::ErrorInfo>();
  add(info_url, *full.GetPayload(info_url));
  full.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    if (url != info_url) add(url, payload);
  });
  return grpc::Status(static_cast<grpc::StatusCode>(full.raw_code()), details.message(),
                      details.SerializeAsString());
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& detail : details.details()) {
      result.SetPayload(detail.type_url(), absl::Cord(detail.value()));
    }
  }
  return result;
}

}  // namespace pewter::server
