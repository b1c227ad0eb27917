#include "server/access_policy.h"

#include <algorithm>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "server/errors.h"
#include "store/artifact_store.h"
#include "store/object_key.h"
#include "store/s3_store.h"

namespace pewter::server {
namespace {

constexpr absl::string_view kHub = "hf://";
constexpr absl::string_view kS3 = "s3://";

bool IsBelow(absl::string_view key, absl::string_view rule) {
  if (rule == kHub || rule == kS3) return absl::StartsWith(key, rule);
  if (rule == "/") return absl::StartsWith(key, "/");
  return absl::ConsumePrefix(&key, rule) && (key.empty() || key[0] == '/');
}

absl::StatusOr<std::vector<std::string>> KeysOf(const std::vector<std::string>& rules) {
  std::vector<std::string> keys;
  for (const std::string& rule : rules) {
    const std::optional<std::string> key =
        rule == kHub || rule == kS3 ? rule : PlaceKey(absl::StripSuffix(rule, "/"));
    if (!key.has_value() && rule != "/") {
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", rule,
          "\" is no place that can be allowed: write s3://BUCKET[/PREFIX], hf://ORG[/MODEL], an "
          "absolute path, or s3:// or hf:// for all of a kind"));
    }
    keys.push_back(key.value_or("/"));
  }
  return keys;
}

absl::Status Check(absl::string_view uri, const std::vector<std::string>& rules,
                   absl::string_view reason, absl::string_view verb) {
  if (rules.empty() || absl::StartsWith(uri, kArtifactScheme)) return absl::OkStatus();
  const std::optional<std::string> key = PlaceKey(uri);
  const bool allowed =
      key.has_value() && std::any_of(rules.begin(), rules.end(),
                                     [&](const std::string& rule) { return IsBelow(*key, rule); });
  if (allowed) return absl::OkStatus();
  return MakeError(absl::StatusCode::kPermissionDenied, reason,
                   absl::StrCat("this server may not ", verb, " ", uri, "; its operator allows ",
                                absl::StrJoin(rules, ", "), " and artifact://"),
                   {{"uri", std::string(uri)}});
}

}  // namespace

std::optional<std::string> PlaceKey(absl::string_view uri) {
  if (absl::StrContains(uri, absl::string_view("\0", 1))) return std::nullopt;
  if (absl::StartsWith(uri, kArtifactScheme)) {
    const absl::StatusOr<ArtifactUri> artifact = ParseArtifactUri(uri);
    if (!artifact.ok()) return std::nullopt;
    return artifact->ToString();
  }
  if (absl::StartsWith(uri, kS3)) {
    const absl::StatusOr<S3Store::Place> place = S3Store::Parse(uri);
    if (!place.ok()) return std::nullopt;
    const absl::string_view prefix = absl::StripSuffix(place->prefix, "/");
    return absl::StrCat(kS3, place->bucket, prefix.empty() ? "" : "/", prefix);
  }
  if (absl::ConsumePrefix(&uri, kHub)) {
    const absl::string_view model = uri.substr(0, uri.find('@'));
    if (!ValidateKey(model).ok()) return std::nullopt;
    return absl::StrCat(kHub, model);
  }
  absl::ConsumePrefix(&uri, "file://");
  if (!absl::StartsWith(uri, "/")) return std::nullopt;
  const std::filesystem::path path{std::string(uri)};
  std::error_code error;
  std::filesystem::path key = std::filesystem::weakly_canonical(path, error);
  if (error) key = path.lexically_normal();
  // "/a/" has an empty last part.
  if (!key.has_filename()) key = key.parent_path();
  return key.string();
}

absl::StatusOr<AccessPolicy> AccessPolicy::Make(const std::vector<std::string>& read,
                                                const std::vector<std::string>& write) {
  AccessPolicy policy;
  ASSIGN_OR_RETURN(policy.read_, KeysOf(read));
  ASSIGN_OR_RETURN(policy.write_, KeysOf(write));
  return policy;
}

absl::Status AccessPolicy::CheckRead(absl::string_view uri) const {
  return Check(uri, read_, "SOURCE_PREFIX_DENIED", "read");
}

absl::Status AccessPolicy::CheckWrite(absl::string_view uri) const {
  return Check(uri, write_, "OUTPUT_PREFIX_DENIED", "write");
}

}  // namespace pewter::server
