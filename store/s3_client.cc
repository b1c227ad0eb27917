#include "store/s3_client.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "base/status.h"
#include "store/http_range.h"

namespace pewter {
namespace {

// Requests are refused beyond a quarter of an hour.
constexpr absl::Duration kClockTolerance = absl::Minutes(5);
// Where nobody has ever answered, a name or a port is wrong.
constexpr int kAttemptsWithoutAnswer = 3;
constexpr char kUnsigned[] = "UNSIGNED-PAYLOAD";

std::string NameOf(const S3Request& request) {
  return absl::StrCat("s3://", request.bucket, request.key.empty() ? "" : "/", request.key);
}

std::string Endpoint(const S3Options& options, const std::string& region) {
  if (!options.endpoint.empty()) return options.endpoint;
  return absl::StrCat("https://s3.", region, ".amazonaws.com",
                      absl::StartsWith(region, "cn-") ? ".cn" : "");
}

bool IsThrottle(int status, absl::string_view code) {
  return status == 429 || status == 503 || code == "SlowDown" || code == "RequestLimitExceeded" ||
         code == "BandwidthLimitExceeded" || absl::StrContains(code, "Throttl") ||
         code == "TooManyRequests" || code == "TooManyRequestsException";
}

bool IsTransient(int status, absl::string_view code) {
  return status == 500 || status == 502 || status == 504 || status == 408 || status == 509 ||
         code == "BadDigest" || code == "XAmzContentSHA256Mismatch" ||  // damaged on the way
         code == "InternalError" || code == "RequestTimeout" || code == "ServiceUnavailable" ||
         code == "ConditionalRequestConflict" || code == "OperationAborted";
}

Failure Classify(const absl::Status& sent, const S3Reply& reply) {
  if (!sent.ok()) return absl::IsUnavailable(sent) ? Failure::kTransient : Failure::kFinal;
  if (IsThrottle(reply.http.status, reply.error.code)) return Failure::kThrottled;
  return IsTransient(reply.http.status, reply.error.code) ? Failure::kTransient : Failure::kFinal;
}

// An answer to HEAD has no body that would say so.
bool MayBeExpired(const S3Request& request, const AwsCredentials& credentials,
                  const S3Reply& reply) {
  const absl::string_view code = reply.error.code;
  if (code == "ExpiredToken" || code == "ExpiredTokenException" || code == "TokenRefreshRequired") {
    return true;
  }
  return request.method == "HEAD" && !credentials.session_token.empty() &&
         (reply.http.status == 400 || reply.http.status == 403);
}

absl::Duration RetryAfter(const HttpResponse& response) {
  int seconds = 0;
  return absl::SimpleAtoi(response.Header("retry-after"), &seconds) && seconds > 0
             ? absl::Seconds(seconds)
             : absl::ZeroDuration();
}

// The store's words, as far as they are fit for a message.
std::string Printable(absl::string_view text) {
  std::string clean(text.substr(0, 200));
  std::replace_if(
      clean.begin(), clean.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return clean;
}

absl::StatusCode CodeOf(const S3Reply& reply, Failure failure) {
  if (failure != Failure::kFinal) return absl::StatusCode::kUnavailable;
  switch (reply.http.status) {
    case 401:
      return absl::StatusCode::kUnauthenticated;
    case 403:
      return absl::StatusCode::kPermissionDenied;
    case 404:
      return absl::StatusCode::kNotFound;
    case 409:
      return absl::StatusCode::kAborted;
    case 412:
      return absl::StatusCode::kFailedPrecondition;
    case 416:
      return absl::StatusCode::kDataLoss;
    case 405:
    case 501:
      return absl::StatusCode::kUnimplemented;
    case 507:
      return absl::StatusCode::kResourceExhausted;
    default:
      if (reply.error.code == "QuotaExceeded") return absl::StatusCode::kResourceExhausted;
      return absl::StatusCode::kFailedPrecondition;
  }
}

absl::Status RefusedStatus(const S3Request& request, const S3Reply& reply, Failure failure) {
  std::string message =
      absl::StrCat(NameOf(request), ": ", request.method, ": HTTP ", reply.http.status);
  if (!reply.error.code.empty()) absl::StrAppend(&message, " ", Printable(reply.error.code));
  if (!reply.error.message.empty()) absl::StrAppend(&message, ": ", Printable(reply.error.message));
  if (reply.attempts > 1) absl::StrAppend(&message, " (", reply.attempts, " attempts)");
  return absl::Status(CodeOf(reply, failure), message);
}

}  // namespace

absl::StatusOr<S3Options> S3OptionsFrom(const Environment& environment) {
  const AwsProfile profile = ReadAwsProfile(environment, "");
  const auto first = [&](std::initializer_list<const char*> names, const char* setting) {
    for (const char* name : names) {
      if (std::string value = environment(name); !value.empty()) return value;
    }
    const auto found = profile.find(setting);
    return found == profile.end() ? std::string() : found->second;
  };
  S3Options options{.environment = environment};
  options.endpoint = first({"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"}, "endpoint_url");
  while (absl::EndsWith(options.endpoint, "/")) options.endpoint.pop_back();
  if (!options.endpoint.empty() && SplitUrl(options.endpoint).host.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the endpoint of S3 is \"", options.endpoint,
                     "\"; AWS_ENDPOINT_URL_S3 must be a URL like https://host:9000"));
  }
  if (std::string region = first({"AWS_REGION", "AWS_DEFAULT_REGION"}, "region"); !region.empty()) {
    options.region = std::move(region);
  }
  options.checksums = first({"AWS_REQUEST_CHECKSUM_CALCULATION"}, "request_checksum_calculation") !=
                      "when_required";
  const std::string addressing = environment("PEWTER_S3_ADDRESSING");
  options.path_style = addressing == "path" || (addressing.empty() && !options.endpoint.empty());
  return options;
}

S3Client::S3Client(S3Options options)
    : options_(std::move(options)),
      http_(options_.http),
      credentials_(options_.environment, options_.region, options_.http) {}

std::string S3Client::RegionOf(const std::string& bucket) {
  std::lock_guard lock(mutex_);
  const auto found = regions_.find(bucket);
  return found == regions_.end() ? options_.region : found->second;
}

bool S3Client::LearnRegion(const std::string& bucket, const HttpResponse& response) {
  const std::string region(response.Header("x-amz-bucket-region"));
  if (region.empty() || response.status / 100 == 2 || region == RegionOf(bucket)) return false;
  std::lock_guard lock(mutex_);
  regions_[bucket] = region;
  return true;
}

bool S3Client::LearnTime(const HttpResponse& response) {
  absl::Time theirs;
  if (response.status != 403 ||
      !absl::ParseTime("%a, %d %b %Y %H:%M:%S GMT", std::string(response.Header("date")), &theirs,
                       nullptr)) {
    return false;
  }
  std::lock_guard lock(mutex_);
  const absl::Duration offset = theirs - absl::Now();
  if (absl::AbsDuration(offset - clock_offset_) < kClockTolerance) return false;
  clock_offset_ = offset;
  return true;
}

absl::Status S3Client::SendOnce(const S3Request& request, const AwsCredentials& credentials,
                                S3Reply& reply) {
  const std::string region = RegionOf(request.bucket);
  const UrlParts url = SplitUrl(Endpoint(options_, region));
  // A bucket with dots matches no certificate of a host above it.
  const bool path_style =
      options_.path_style || (options_.endpoint.empty() && absl::StrContains(request.bucket, '.'));
  const std::string host =
      path_style ? url.authority : absl::StrCat(request.bucket, ".", url.authority);
  const std::string path =
      absl::StrCat(url.path, path_style ? absl::StrCat("/", request.bucket) : "", "/",
                   PercentEncode(request.key, /*keep_slash=*/true));
  absl::Time now = absl::Now();
  {
    std::lock_guard lock(mutex_);
    now += clock_offset_;
  }
  AwsRequest to_sign{.method = request.method, .path = path, .query = request.query};
  // What TLS protects need not be hashed; the store checks a CRC32C.
  to_sign.payload_hash =
      url.scheme == "https" && !request.body.empty() && options_.checksums
          ? kUnsigned
          : Sha256::Of({reinterpret_cast<const char*>(request.body.data()), request.body.size()});
  to_sign.headers = {
      {"host", host}, {"x-amz-content-sha256", to_sign.payload_hash}, {"x-amz-date", AwsDate(now)}};
  if (!credentials.session_token.empty()) {
    to_sign.headers.emplace_back("x-amz-security-token", credentials.session_token.Reveal());
  }
  for (const auto& header : request.headers) {
    if (absl::StartsWith(header.first, "x-amz-")) to_sign.headers.push_back(header);
  }
  HttpRequest http{.method = request.method,
                   .url = absl::StrCat(url.scheme, "://", host, path),
                   .headers = to_sign.headers,
                   .body = request.body,
                   .into = request.into,
                   .patient = request.patient};
  if (!request.query.empty()) absl::StrAppend(&http.url, "?", AwsQuery(request.query));
  http.headers.emplace_back(
      "Authorization",
      AwsAuthorization(to_sign, credentials, {.region = region, .service = "s3", .time = now}));
  for (const auto& header : request.headers) {
    if (!absl::StartsWith(header.first, "x-amz-")) http.headers.push_back(header);
  }
  if (!request.into.empty()) {
    http.headers.emplace_back(
        "Range", RangeHeader(request.offset, static_cast<int64_t>(request.into.size())));
    if (!request.if_match.empty()) {
      http.headers.emplace_back("If-Match", absl::StrCat("\"", request.if_match, "\""));
    }
  }
  absl::Status sent = http_.Send(http, reply.http);
  // The answer to a POST may begin as a success and turn out to be an error.
  const bool may_be_error = reply.http.status / 100 != 2 || request.method == "POST";
  reply.error = may_be_error ? ParseS3Error(reply.http.body) : S3Error{};
  if (!request.into.empty() && reply.http.status / 100 == 2) {
    // Before `sent`: of a wrong range not even its beginning may be used.
    absl::Status right =
        CheckRange(request.offset, static_cast<int64_t>(request.into.size()), reply.http);
    const absl::string_view etag = reply.http.Header("etag");
    if (!request.if_match.empty() && !etag.empty() && BareEtag(etag) != request.if_match) {
      right = absl::FailedPreconditionError("changed while it was being read");
    }
    if (!right.ok()) {
      reply.http.received = 0;
      return right;
    }
    if (sent.ok() && reply.http.received < static_cast<int64_t>(request.into.size())) {
      return absl::UnavailableError("the body ends too early");
    }
  }
  return sent;
}

absl::Status S3Client::Send(S3Request request, S3Reply& reply) {
  Retry retry(options_.retry, budget_);
  // Each is learnt once a request.
  bool knows_region = false, knows_time = false, has_new_credentials = false;
  while (true) {
    auto credentials = credentials_.Get();
    if (!credentials.ok()) return Annotate(credentials.status(), NameOf(request));
    AdaptiveLimit* const limit = !request.into.empty()   ? &reads_
                                 : !request.body.empty() ? &writes_
                                                         : nullptr;
    if (limit != nullptr) limit->Acquire();
    const absl::Status sent = SendOnce(request, *credentials, reply);
    reply.attempts = retry.attempts();
    if (reply.http.status != 0) answered_ = true;
    const bool nobody_there = !answered_ && reply.attempts >= kAttemptsWithoutAnswer;
    const bool wanted = request.once && reply.http.status / 100 == 4;
    const Failure failure = nobody_there || wanted ? Failure::kFinal : Classify(sent, reply);
    if (limit != nullptr) {
      limit->Release(std::max(reply.http.received, static_cast<int64_t>(request.body.size())),
                     failure == Failure::kThrottled);
    }
    if (sent.ok() && reply.http.status / 100 == 2 && reply.error.code.empty()) {
      retry.Succeeded();
      return absl::OkStatus();
    }
    if (sent.ok()) {
      if (!std::exchange(knows_region, true) && LearnRegion(request.bucket, reply.http)) continue;
      if (!std::exchange(knows_time, true) && LearnTime(reply.http)) continue;
      if (!has_new_credentials && MayBeExpired(request, *credentials, reply)) {
        has_new_credentials = true;
        credentials_.Expired(*credentials);
        continue;
      }
    } else if (absl::IsUnavailable(sent) && reply.http.received > 0) {
      request.offset += reply.http.received;
      request.into.remove_prefix(reply.http.received);
      retry.Progressed();
      if (request.into.empty()) {
        retry.Succeeded();
        return absl::OkStatus();
      }
    }
    if (retry.Again(failure, RetryAfter(reply.http))) continue;
    if (sent.ok()) return RefusedStatus(request, reply, failure);
    return Annotate(
        sent,
        absl::StrCat(NameOf(request), ": ", request.method,
                     reply.attempts > 1 ? absl::StrCat(" (", reply.attempts, " attempts)") : ""));
  }
}

}  // namespace pewter
