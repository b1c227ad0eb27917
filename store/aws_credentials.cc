#include "store/aws_credentials.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "nlohmann/json.hpp"
#include "store/retry.h"
#include "store/s3_xml.h"

namespace pewter {
namespace {

constexpr absl::Duration kRenewBefore = absl::Minutes(5);
constexpr int64_t kMostFileBytes = 1 << 20;

absl::StatusOr<std::string> ReadSmallFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  std::string text(kMostFileBytes, '\0');
  file.read(text.data(), kMostFileBytes);
  text.resize(file.gcount());
  return text;
}

std::string HomeFile(const Environment& environment, const char* variable,
                     absl::string_view standard) {
  if (std::string path = environment(variable); !path.empty()) return path;
  const std::string home = environment("HOME");
  return home.empty() ? "" : absl::StrCat(home, "/.aws/", standard);
}

// Where an agent that gives out credentials may be: elsewhere the token would go to a stranger in
// the clear.
bool IsTrustedAgent(const UrlParts& url) {
  if (url.scheme == "https") return true;
  return url.host == "localhost" || absl::StartsWith(url.host, "127.") || url.host == "[::1]" ||
         url.host == "169.254.170.2" || url.host == "169.254.170.23" ||
         url.host == "[fd00:ec2::23]";
}

absl::Status SourceFailed(absl::string_view source, const HttpResponse& response) {
  const S3Error error = ParseS3Error(response.body);
  const std::string message = absl::StrCat(source, " answers HTTP ", response.status,
                                           error.code.empty() ? "" : " ", error.code);
  return response.status >= 500 ? absl::UnavailableError(message)
                                : absl::PermissionDeniedError(message);
}

// A few attempts: an agent that is starting is asked again, a token that is refused is not.
absl::Status Ask(HttpClient& http, const HttpRequest& request, absl::string_view source,
                 HttpResponse& response) {
  constexpr RetryPolicy kPolicy{.attempts = 4, .longest = absl::Seconds(3)};
  RetryBudget budget;
  Retry retry(kPolicy, budget);
  while (true) {
    absl::Status status = Annotate(http.Send(request, response), source);
    if (status.ok() && response.status != 200) status = SourceFailed(source, response);
    if (!absl::IsUnavailable(status) || !retry.Again(Failure::kTransient, absl::ZeroDuration())) {
      return status;
    }
  }
}

}  // namespace

Environment ProcessEnvironment() {
  return [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
}

AwsProfile ParseAwsProfile(absl::string_view text, absl::string_view section) {
  AwsProfile profile;
  bool inside = false;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    // Indented lines belong to a nested setting.
    const bool nested = absl::StartsWith(line, " ") || absl::StartsWith(line, "\t");
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#' || line[0] == ';') continue;
    if (line.front() == '[') {
      inside = absl::StripAsciiWhitespace(line.substr(1, line.find(']') - 1)) == section;
      continue;
    }
    const size_t equals = line.find('=');
    if (!inside || nested || equals == absl::string_view::npos) continue;
    const absl::string_view name = absl::StripAsciiWhitespace(line.substr(0, equals));
    profile[absl::AsciiStrToLower(name)] =
        std::string(absl::StripAsciiWhitespace(line.substr(equals + 1)));
  }
  return profile;
}

AwsProfile ReadAwsProfile(const Environment& environment, std::string name) {
  if (name.empty()) name = environment("AWS_PROFILE");
  if (name.empty()) name = "default";
  AwsProfile profile;
  const auto credentials =
      ReadSmallFile(HomeFile(environment, "AWS_SHARED_CREDENTIALS_FILE", "credentials"));
  if (credentials.ok()) profile = ParseAwsProfile(*credentials, name);
  const auto config = ReadSmallFile(HomeFile(environment, "AWS_CONFIG_FILE", "config"));
  if (config.ok()) {
    profile.merge(
        ParseAwsProfile(*config, name == "default" ? name : absl::StrCat("profile ", name)));
  }
  return profile;
}

absl::StatusOr<AwsCredentials> ParseContainerCredentials(absl::string_view json) {
  const auto parsed = nlohmann::json::parse(json.begin(), json.end(), nullptr, false);
  const auto text = [&](const char* name) -> std::string {
    if (!parsed.is_object()) return "";
    const auto found = parsed.find(name);
    return found != parsed.end() && found->is_string() ? found->get<std::string>() : "";
  };
  AwsCredentials credentials{.access_key = text("AccessKeyId"),
                             .secret_key = Secret(text("SecretAccessKey")),
                             .session_token = Secret(text("Token"))};
  if (credentials.access_key.empty() || credentials.secret_key.empty()) {
    return absl::DataLossError("the answer has no complete credentials");
  }
  const std::string expires = text("Expiration");
  if (!expires.empty() &&
      !absl::ParseTime(absl::RFC3339_full, expires, &credentials.expires, nullptr)) {
    return absl::DataLossError("the answer has a bad Expiration");
  }
  return credentials;
}

AwsCredentialChain::AwsCredentialChain(Environment environment, std::string region,
                                       HttpOptions http)
    : environment_(std::move(environment)), region_(std::move(region)), http_(http) {}

absl::StatusOr<AwsCredentials> AwsCredentialChain::Get() {
  std::lock_guard lock(mutex_);
  if (!credentials_ || absl::Now() + kRenewBefore >= credentials_->expires) {
    absl::StatusOr<AwsCredentials> asked = Ask();
    // Keys that have minutes left are better than none.
    const bool still_good = credentials_ && absl::Now() < credentials_->expires;
    if (!asked.ok() && !(still_good && absl::IsUnavailable(asked.status()))) {
      return asked.status();
    }
    if (asked.ok()) credentials_ = *std::move(asked);
  }
  return *credentials_;
}

void AwsCredentialChain::Expired(const AwsCredentials& credentials) {
  std::lock_guard lock(mutex_);
  if (credentials_ && credentials_->access_key == credentials.access_key &&
      credentials_->session_token == credentials.session_token) {
    credentials_.reset();
  }
}

absl::StatusOr<AwsCredentials> AwsCredentialChain::Ask() {
  const std::string profile_name = environment_("AWS_PROFILE");
  const std::string access_key = environment_("AWS_ACCESS_KEY_ID");
  if (profile_name.empty() && !access_key.empty()) {
    AwsCredentials credentials{.access_key = access_key,
                               .secret_key = Secret(environment_("AWS_SECRET_ACCESS_KEY")),
                               .session_token = Secret(environment_("AWS_SESSION_TOKEN"))};
    if (credentials.secret_key.empty()) {
      return absl::UnauthenticatedError(
          "AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not");
    }
    return credentials;
  }
  const AwsProfile profile = ReadAwsProfile(environment_, profile_name);
  const auto setting = [&](const char* name) {
    const auto found = profile.find(name);
    return found == profile.end() ? std::string() : found->second;
  };
  const std::string of_profile =
      absl::StrCat("profile ", profile_name.empty() ? "default" : profile_name);
  if (profile.count("aws_access_key_id") > 0) {
    AwsCredentials credentials{.access_key = setting("aws_access_key_id"),
                               .secret_key = Secret(setting("aws_secret_access_key")),
                               .session_token = Secret(setting("aws_session_token"))};
    if (credentials.secret_key.empty()) {
      return absl::UnauthenticatedError(absl::StrCat(of_profile, " has no aws_secret_access_key"));
    }
    return credentials;
  }
  if (profile.count("web_identity_token_file") > 0) {
    return FromWebIdentity(setting("web_identity_token_file"), setting("role_arn"),
                           setting("role_session_name"));
  }
  for (const char* other : {"source_profile", "credential_source", "credential_process",
                            "sso_session", "sso_start_url"}) {
    if (profile.count(other) > 0) {
      return absl::UnauthenticatedError(
          absl::StrCat(of_profile, " uses ", other, ", which pewter does not; give it keys with: ",
                       "eval \"$(aws configure export-credentials --format env)\""));
    }
  }
  if (!profile_name.empty()) {
    return absl::UnauthenticatedError(
        absl::StrCat("AWS_PROFILE is ", profile_name, ", and no profile of that name has keys"));
  }
  if (const std::string file = environment_("AWS_WEB_IDENTITY_TOKEN_FILE"); !file.empty()) {
    return FromWebIdentity(file, environment_("AWS_ROLE_ARN"),
                           environment_("AWS_ROLE_SESSION_NAME"));
  }
  if (const std::string url = environment_("AWS_CONTAINER_CREDENTIALS_FULL_URI"); !url.empty()) {
    return FromContainer(url);
  }
  if (const std::string path = environment_("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI");
      !path.empty()) {
    return FromContainer(absl::StrCat("http://169.254.170.2", path));
  }
  return absl::UnauthenticatedError(
      "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
      "AWS_WEB_IDENTITY_TOKEN_FILE or AWS_CONTAINER_CREDENTIALS_FULL_URI");
}

absl::StatusOr<AwsCredentials> AwsCredentialChain::FromWebIdentity(const std::string& token_file,
                                                                   const std::string& role,
                                                                   const std::string& session) {
  if (role.empty()) {
    return absl::UnauthenticatedError("a web-identity token file is given, and no AWS_ROLE_ARN");
  }
  ASSIGN_OR_RETURN(const std::string token, ReadSmallFile(token_file));
  std::string endpoint = environment_("AWS_ENDPOINT_URL_STS");
  if (endpoint.empty()) endpoint = absl::StrCat("https://sts.", region_, ".amazonaws.com");
  const std::string body =
      AwsQuery({{"Action", "AssumeRoleWithWebIdentity"},
                {"Version", "2011-06-15"},
                {"RoleArn", role},
                {"RoleSessionName", session.empty() ? absl::StrCat("pewter-", getpid()) : session},
                {"WebIdentityToken", std::string(absl::StripAsciiWhitespace(token))}});
  HttpRequest request{.method = "POST",
                      .url = absl::StrCat(absl::StripSuffix(endpoint, "/"), "/"),
                      .headers = {{"Content-Type", "application/x-www-form-urlencoded"}},
                      .body = {reinterpret_cast<const std::byte*>(body.data()), body.size()}};
  HttpResponse response;
  RETURN_IF_ERROR(pewter::Ask(http_, request, "STS", response));
  absl::StatusOr<AwsCredentials> credentials = ParseAssumedRole(response.body);
  return credentials.ok() ? credentials : Annotate(credentials.status(), "STS");
}

absl::StatusOr<AwsCredentials> AwsCredentialChain::FromContainer(const std::string& url) {
  constexpr char kSource[] = "the container's credential endpoint";
  if (!IsTrustedAgent(SplitUrl(url))) {
    return absl::PermissionDeniedError(
        absl::StrCat(kSource, " is neither https nor this machine nor an agent of ECS or EKS"));
  }
  std::string token = environment_("AWS_CONTAINER_AUTHORIZATION_TOKEN");
  if (const std::string file = environment_("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE");
      !file.empty()) {
    ASSIGN_OR_RETURN(token, ReadSmallFile(file));
  }
  HttpRequest request{.url = url};
  if (!token.empty()) {
    request.headers.emplace_back("Authorization", absl::StripAsciiWhitespace(token));
  }
  HttpResponse response;
  RETURN_IF_ERROR(pewter::Ask(http_, request, kSource, response));
  absl::StatusOr<AwsCredentials> credentials = ParseContainerCredentials(response.body);
  return credentials.ok() ? credentials : Annotate(credentials.status(), kSource);
}

}  // namespace pewter
