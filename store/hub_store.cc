#include "store/hub_store.h"

#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status.h"
#include "store/aws_credentials.h"
#include "store/http_range.h"
#include "store/hub_cache_store.h"
#include "store/object_key.h"
#include "store/read_ahead.h"

namespace pewter {
namespace {

constexpr int kMostRedirects = 5;
constexpr int kMostPages = 1000;
constexpr int kAttemptsWithoutAnswer = 3;

bool IsTrue(absl::string_view value) {
  const std::string lower = absl::AsciiStrToLower(value);
  return lower == "1" || lower == "true" || lower == "yes" || lower == "on";
}

Secret ReadToken(const Environment& environment) {
  std::string token = environment("HF_TOKEN");
  if (token.empty()) {
    std::string path = environment("HF_TOKEN_PATH");
    if (path.empty()) {
      const std::string cache = HubCacheStore::CacheFolder();  // HF_HOME/hub
      path = absl::StrCat(cache.substr(0, cache.rfind('/')), "/token");
    }
    std::ifstream file(path);
    std::getline(file, token);
  }
  return Secret(std::string(absl::StripAsciiWhitespace(token)));
}

bool IsRedirect(int status) {
  return status == 301 || status == 302 || status == 303 || status == 307 || status == 308;
}

Failure Classify(const absl::Status& sent, const HttpResponse& response) {
  if (!sent.ok()) return absl::IsUnavailable(sent) ? Failure::kTransient : Failure::kFinal;
  if (response.status == 429 || response.status == 503) return Failure::kThrottled;
  return response.status >= 500 || response.status == 408 ? Failure::kTransient : Failure::kFinal;
}

absl::Status Refused(const HttpResponse& response) {
  const absl::string_view code = response.Header("x-error-code");
  const std::string message =
      absl::StrCat("the hub answers HTTP ", response.status, code.empty() ? "" : " ", code);
  switch (response.status) {
    case 401:
      return absl::UnauthenticatedError(
          absl::StrCat(message, "; there is no such model, or it is private: set HF_TOKEN"));
    case 403:
      return absl::PermissionDeniedError(
          absl::StrCat(message, "; accept the model's terms on the hub, and set HF_TOKEN"));
    case 404:
      return absl::NotFoundError(message);
    default:
      return response.status >= 500 || response.status == 429
                 ? absl::UnavailableError(message)
                 : absl::FailedPreconditionError(message);
  }
}

}  // namespace

absl::StatusOr<std::shared_ptr<ObjectStore>> OpenHub(absl::string_view model,
                                                     absl::string_view revision) {
  const Environment environment = ProcessEnvironment();
  std::string endpoint = environment("HF_ENDPOINT");
  if (endpoint.empty() || IsTrue(environment("HF_HUB_OFFLINE"))) {
    return HubCacheStore::Open(model, revision);
  }
  return HubStore::Open({.endpoint = std::move(endpoint), .token = ReadToken(environment)}, model,
                        revision);
}

HubStore::HubStore(HubOptions options) : options_(std::move(options)), http_(options_.http) {}

absl::StatusOr<std::shared_ptr<ObjectStore>> HubStore::Open(HubOptions options,
                                                            absl::string_view model,
                                                            absl::string_view revision) {
  while (absl::EndsWith(options.endpoint, "/")) options.endpoint.pop_back();
  if (SplitUrl(options.endpoint).host.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "HF_ENDPOINT is \"", options.endpoint, "\"; it must be a URL like https://huggingface.co"));
  }
  if (!HubCacheStore::IsModelId(model)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "hf://", model, " is not a model on the hub; write hf://org/model[@revision]"));
  }
  if (revision.empty()) revision = "main";
  if (!ValidateKey(revision).ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("hf://", model, ": \"", revision, "\" is not a revision"));
  }
  std::shared_ptr<HubStore> store(new HubStore(std::move(options)));
  const absl::Status loaded = store->Load(model, revision);
  if (!loaded.ok()) return Annotate(loaded, absl::StrCat("hf://", model, "@", revision));
  return store;
}

absl::Status HubStore::Load(absl::string_view model, absl::string_view revision) {
  model_ = std::string(model);
  const std::string api = absl::StrCat(options_.endpoint, "/api/models/", model);
  HttpResponse response;
  // A branch may have slashes in its name, which are no path.
  RETURN_IF_ERROR(
      Get(absl::StrCat(api, "/revision/", PercentEncode(revision, /*keep_slash=*/false)), 0, {},
          response));
  ASSIGN_OR_RETURN(commit_, ParseHubCommit(response.body));
  name_ = absl::StrCat("hf://", model, "@", commit_);
  std::string url = absl::StrCat(api, "/tree/", commit_, "?recursive=true");
  for (int page = 0; !url.empty(); ++page) {
    if (page == kMostPages) return absl::DataLossError("the hub's list of files does not end");
    RETURN_IF_ERROR(Get(url, 0, {}, response));
    ASSIGN_OR_RETURN(std::vector<HubFile> files, ParseHubTree(response.body));
    for (HubFile& file : files) files_.insert_or_assign(file.path, file);
    url = NextPage(response.Header("link"));
    if (!url.empty() && SplitUrl(url).authority != SplitUrl(options_.endpoint).authority) {
      return absl::DataLossError("the hub's list of files goes on at another host");
    }
  }
  cache_ = std::make_unique<FileStore>(absl::StrCat(HubCacheStore::CacheFolder(), "/models--",
                                                    absl::StrReplaceAll(model, {{"/", "--"}}),
                                                    "/snapshots/", commit_));
  for (const auto& [path, file] : files_) {
    const absl::StatusOr<ObjectStat> stat = cache_->Stat(path);
    if (stat.ok() && stat->size == file.size) cached_.insert(path);
  }
  return absl::OkStatus();
}

absl::Status HubStore::Get(const std::string& url, int64_t offset, absl::Span<std::byte> into,
                           HttpResponse& response) {
  const UrlParts hub = SplitUrl(options_.endpoint);
  Retry retry(options_.retry, budget_);
  while (true) {
    HttpRequest request{.url = url, .into = into};
    absl::Status sent;
    for (int hops = 0;; ++hops) {
      const UrlParts parts = SplitUrl(request.url);
      request.headers.clear();
      if (!into.empty()) {
        request.headers.emplace_back("Range",
                                     RangeHeader(offset, static_cast<int64_t>(into.size())));
      }
      if (!options_.token.empty() && parts.scheme == hub.scheme &&
          parts.authority == hub.authority) {
        request.headers.emplace_back("Authorization",
                                     absl::StrCat("Bearer ", options_.token.Reveal()));
      }
      sent = http_.Send(request, response);
      if (!sent.ok() || !IsRedirect(response.status)) break;
      std::string location(response.Header("location"));
      if (absl::StartsWith(location, "/") && !absl::StartsWith(location, "//")) {
        location = absl::StrCat(parts.scheme, "://", parts.authority, location);
      }
      const UrlParts next = SplitUrl(location);
      if (hops == kMostRedirects || next.host.empty() ||
          (parts.scheme == "https" && next.scheme != "https")) {
        return absl::FailedPreconditionError("the hub redirects to a place that is not followed");
      }
      request.url = location;
    }
    if (!into.empty() && response.status / 100 == 2) {
      RETURN_IF_ERROR(CheckRange(offset, static_cast<int64_t>(into.size()), response));
      offset += response.received;
      into.remove_prefix(response.received);
      if (into.empty()) {
        retry.Succeeded();
        return absl::OkStatus();
      }
      if (response.received > 0) retry.Progressed();
      if (sent.ok()) sent = absl::UnavailableError("the body ends too early");
    } else if (sent.ok() && response.status / 100 == 2) {
      retry.Succeeded();
      return absl::OkStatus();
    }
    // Where nobody has answered yet, a name or a port is wrong.
    const bool nobody_there =
        commit_.empty() && response.status == 0 && retry.attempts() >= kAttemptsWithoutAnswer;
    int seconds = 0;
    const absl::Duration wait = absl::SimpleAtoi(response.Header("retry-after"), &seconds)
                                    ? absl::Seconds(seconds)
                                    : absl::ZeroDuration();
    if (nobody_there || !retry.Again(Classify(sent, response), wait))
      return sent.ok() ? Refused(response) : sent;
  }
}

std::string HubStore::Describe(absl::string_view key) const {
  return absl::StrCat(name_, "/", key);
}

absl::StatusOr<HubFile> HubStore::Find(absl::string_view key) const {
  RETURN_IF_ERROR(ValidateKey(key));
  const auto found = files_.find(key);
  if (found != files_.end()) return found->second;
  return absl::NotFoundError(absl::StrCat(Describe(key), " does not exist"));
}

absl::StatusOr<ObjectStat> HubStore::Stat(absl::string_view key) {
  ASSIGN_OR_RETURN(const HubFile file, Find(key));
  return ObjectStat{.size = file.size, .etag = file.etag};
}

absl::Status HubStore::ReadRange(const std::string& key, int64_t offset,
                                 absl::Span<std::byte> out) {
  HttpResponse response;
  return Annotate(Get(absl::StrCat(options_.endpoint, "/", model_, "/resolve/", commit_, "/",
                                   PercentEncode(key, /*keep_slash=*/true)),
                      offset, out, response),
                  Describe(key));
}

absl::Status HubStore::ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) {
  ASSIGN_OR_RETURN(const HubFile file, Find(key));
  if (offset < 0) {
    return absl::InvalidArgumentError(absl::StrCat("negative offset ", offset, " in ", key));
  }
  const auto size = static_cast<int64_t>(out.size());
  if (offset > file.size || size > file.size - offset) {
    return absl::DataLossError(absl::StrCat(Describe(key), " ends too early: ", size,
                                            " bytes at offset ", offset, " are needed, and it has ",
                                            file.size));
  }
  if (out.empty()) return absl::OkStatus();
  if (cached_.contains(file.path)) return cache_->ReadInto(key, offset, out);
  ASSIGN_OR_RETURN(const bool announced, ReadAhead::Shared().Read(Describe(key), offset, out));
  return announced ? absl::OkStatus() : ReadRange(file.path, offset, out);
}

std::shared_ptr<void> HubStore::WillRead(absl::string_view key, int64_t offset, int64_t bytes) {
  if (!files_.contains(key) || cached_.contains(key)) return nullptr;
  return ReadAhead::Shared().Announce(
      Describe(key), offset, bytes,
      [this, key = std::string(key)](int64_t at, absl::Span<std::byte> out) {
        return ReadRange(key, at, out);
      });
}

absl::StatusOr<std::vector<ObjectEntry>> HubStore::List(absl::string_view prefix) {
  if (!prefix.empty()) {
    RETURN_IF_ERROR(
        ValidateKey(absl::EndsWith(prefix, "/") ? prefix.substr(0, prefix.size() - 1) : prefix));
  }
  std::vector<ObjectEntry> entries;
  for (const auto& [path, file] : files_) {
    if (absl::StartsWith(path, prefix)) {
      entries.push_back({path, {.size = file.size, .etag = file.etag}});
    }
  }
  return entries;
}

absl::Status HubStore::ReadOnly() const {
  return absl::UnimplementedError(absl::StrCat(name_, " is read-only: a hub is not written to"));
}

}  // namespace pewter
