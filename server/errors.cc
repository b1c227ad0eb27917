#include "server/errors.h"

#include <algorithm>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/reason.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace pewter::server {
namespace {

constexpr absl::string_view kDomain = "pewter.dev";
constexpr absl::string_view kTypePrefix = "type.googleapis.com/";
// gRPC's default limit on a call's metadata is 8 KiB, and the message is in it twice: as such,
// where each byte beyond ASCII takes three, and in the details.
constexpr size_t kMaxMessageBytes = 1024;
constexpr size_t kMaxDetailsBytes = 4096;
constexpr size_t kMaxListBytes = 2048;        // of violations
constexpr size_t kMaxDescriptionBytes = 400;  // of one detail, or one value of ErrorInfo
constexpr int kMaxViolations = 100;

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

// Whether a list of so many violations may be sent, with room for the words "n more".
bool Fits(const google::protobuf::Message& list, int violations) {
  return violations <= kMaxViolations && list.ByteSizeLong() <= kMaxListBytes;
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
  for (const auto& [key, value] : metadata) {
    (*info.mutable_metadata())[key] = Cut(value, kMaxDescriptionBytes);
  }
  SetDetail(status, info);
  return status;
}

absl::Status BadRequestError(absl::string_view reason,
                             const std::vector<FieldViolation>& violations) {
  std::vector<std::string> lines;
  google::rpc::BadRequest request;
  for (const FieldViolation& violation : violations) {
    // A problem of the recipe's text begins with its place there.
    lines.push_back(violation.line > 0
                        ? violation.description
                        : absl::StrCat(violation.field, ": ", violation.description));
    auto* detail = request.add_field_violations();
    detail->set_field(violation.field);
    detail->set_description(Cut(violation.description, kMaxDescriptionBytes));
    if (Fits(request, request.field_violations_size())) continue;
    const std::string more = absl::StrCat(violations.size() - lines.size() + 1, " more");
    detail->clear_field();
    detail->set_description(more);
    lines.back() = more;
    break;
  }
  const FieldViolation& first = violations.front();
  std::map<std::string, std::string> metadata = {{"field", first.field}};
  if (first.line > 0) {
    metadata["line"] = absl::StrCat(first.line);
    metadata["column"] = absl::StrCat(first.column);
  }
  absl::Status status =
      MakeError(absl::StatusCode::kInvalidArgument, reason, absl::StrJoin(lines, "; "), metadata);
  SetDetail(status, request);
  return status;
}

absl::Status MissingError(absl::string_view reason, const std::vector<std::string>& subjects,
                          absl::string_view description) {
  google::rpc::PreconditionFailure failure;
  for (const std::string& subject : subjects) {
    auto* violation = failure.add_violations();
    violation->set_type("MISSING");
    violation->set_subject(subject);
    violation->set_description(std::string(description));
    if (Fits(failure, failure.violations_size())) continue;
    violation->clear_subject();
    violation->set_description(
        absl::StrCat(subjects.size() - failure.violations_size() + 1, " more"));
    break;
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

absl::Status WithQuota(absl::Status status, absl::string_view subject, absl::Duration delay) {
  google::rpc::QuotaFailure failure;
  auto* violation = failure.add_violations();
  violation->set_subject(std::string(subject));
  violation->set_description(Cut(status.message(), kMaxDescriptionBytes));
  SetDetail(status, failure);
  return WithRetry(std::move(status), delay);
}

absl::Status WithPrecondition(absl::Status status, absl::string_view type,
                              absl::string_view subject) {
  google::rpc::PreconditionFailure failure;
  auto* violation = failure.add_violations();
  violation->set_type(std::string(type));
  violation->set_subject(Cut(subject, kMaxDescriptionBytes));
  violation->set_description(Cut(status.message(), kMaxDescriptionBytes));
  SetDetail(status, failure);
  return status;
}

absl::Status WithResource(absl::Status status, absl::string_view type, absl::string_view name) {
  google::rpc::ResourceInfo resource;
  resource.set_resource_type(std::string(type));
  resource.set_resource_name(Cut(name, kMaxDescriptionBytes));
  resource.set_description(Cut(status.message(), kMaxDescriptionBytes));
  SetDetail(status, resource);
  return status;
}

std::string ReasonOf(const absl::Status& status) { return InfoOf(status).reason(); }

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  absl::Status full = status;
  if (ReasonOf(full).empty()) {
    const std::string attached = AttachedReason(full);
    full =
        MakeError(full.code(), attached.empty() ? absl::StatusCodeToString(full.code()) : attached,
                  full.message());
  }
  google::rpc::Status details;
  details.set_code(full.raw_code());
  details.set_message(Cut(full.message(), kMaxMessageBytes));
  size_t bytes = details.ByteSizeLong();
  const auto add = [&](absl::string_view url, const absl::Cord& payload) {
    const size_t size = url.size() + payload.size();
    if (bytes + size > kMaxDetailsBytes) return;
    bytes += size;
    auto* detail = details.add_details();
    detail->set_type_url(std::string(url));
    detail->set_value(std::string(payload));
  };
  // ErrorInfo first: it is what programs need most.
  const std::string info_url = TypeUrl<google::rpc::ErrorInfo>();
  add(info_url, *full.GetPayload(info_url));
  full.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    if (url != info_url && absl::StartsWith(url, kTypePrefix)) add(url, payload);
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
