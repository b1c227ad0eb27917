#include "store/aws_credentials.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "store/s3_client.h"
#include "store/s3_store.h"
#include "tests/support/http_server.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class AwsCredentialsTest : public ::testing::Test {
 protected:
  AwsCredentialChain Chain() {
    return AwsCredentialChain(
        [this](const char* name) {
          const auto found = environment_.find(name);
          return found == environment_.end() ? std::string() : found->second;
        },
        "eu-west-3");
  }

  TempFolder folder_;
  std::map<std::string, std::string> environment_ = {{"HOME", folder_.path()}};
};

std::string Rfc3339(absl::Time time) {
  return absl::FormatTime(absl::RFC3339_sec, time, absl::UTCTimeZone());
}

TEST_F(AwsCredentialsTest, NothingConfiguredSaysWhatCouldBe) {
  EXPECT_THAT(Chain().Get(),
              StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("AWS_ACCESS_KEY_ID")));
}

TEST_F(AwsCredentialsTest, Environment) {
  environment_["AWS_ACCESS_KEY_ID"] = "key";
  EXPECT_THAT(Chain().Get(),
              StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("AWS_SECRET_ACCESS_KEY")));
  environment_["AWS_SECRET_ACCESS_KEY"] = "secret";
  environment_["AWS_SESSION_TOKEN"] = "token";
  const auto credentials = Chain().Get();
  ASSERT_THAT(credentials, IsOk());
  EXPECT_EQ(credentials->access_key, "key");
  EXPECT_EQ(credentials->secret_key.Reveal(), "secret");
  EXPECT_EQ(credentials->session_token.Reveal(), "token");
}

TEST_F(AwsCredentialsTest, ProfilesOfBothFiles) {
  folder_.Write(".aws/credentials",
                "# keys\n[default]\naws_access_key_id = of-default\n"
                "aws_secret_access_key = s1\n\n[team]\naws_access_key_id=of-team\n"
                "aws_secret_access_key=s2\naws_session_token=t2\n");
  folder_.Write(".aws/config",
                "[default]\nregion = eu-central-1\n[profile team]\nregion = us-west-2\n"
                "s3 =\n  addressing_style = path\n[profile other]\nregion = x\n");
  EXPECT_EQ(Chain().Get()->access_key, "of-default");
  environment_["AWS_PROFILE"] = "team";
  // A profile that is asked for is meant.
  environment_["AWS_ACCESS_KEY_ID"] = "of-environment";
  environment_["AWS_SECRET_ACCESS_KEY"] = "s0";
  EXPECT_EQ(Chain().Get()->access_key, "of-team");
  EXPECT_EQ(Chain().Get()->session_token.Reveal(), "t2");
  const auto get = [this](const char* name) {
    return environment_.count(name) > 0 ? environment_[name] : std::string();
  };
  EXPECT_EQ(S3OptionsFrom(get)->region, "us-west-2");
  environment_["AWS_PROFILE"] = "other";
  EXPECT_THAT(Chain().Get(),
              StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("AWS_PROFILE is other")));
}

TEST_F(AwsCredentialsTest, WhatIsNotSpokenIsNamed) {
  folder_.Write(".aws/config", "[default]\nsso_session = corporate\n");
  EXPECT_THAT(Chain().Get(),
              StatusIs(absl::StatusCode::kUnauthenticated,
                       AllOf(HasSubstr("sso_session"), HasSubstr("export-credentials"))));
}

// Row 22 of the fault table.
TEST_F(AwsCredentialsTest, WebIdentityIsExchangedAndRenewedFromTheFile) {
  std::vector<std::string> bodies;
  absl::Duration life = absl::Minutes(1);  // less than the five minutes before the end
  HttpServer sts([&](const ServedRequest& request) {
    bodies.push_back(request.body);
    return ServedReply{
        .body =
            absl::StrCat("<AssumeRoleWithWebIdentityResponse "
                         "xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">"
                         "<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIA",
                         bodies.size(), "</AccessKeyId><SecretAccessKey>s</SecretAccessKey>",
                         "<SessionToken>t</SessionToken><Expiration>", Rfc3339(absl::Now() + life),
                         "</Expiration></Credentials></AssumeRoleWithWebIdentityResult>",
                         "</AssumeRoleWithWebIdentityResponse>")};
  });
  environment_["AWS_WEB_IDENTITY_TOKEN_FILE"] = folder_.Write("token", "first/token\n");
  environment_["AWS_ENDPOINT_URL_STS"] = sts.url();
  EXPECT_THAT(Chain().Get(), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("ROLE_ARN")));
  environment_["AWS_ROLE_ARN"] = "arn:aws:iam::1:role/merger";
  AwsCredentialChain chain = Chain();
  EXPECT_EQ(chain.Get()->access_key, "ASIA1");
  EXPECT_THAT(bodies.back(), AllOf(HasSubstr("WebIdentityToken=first%2Ftoken"),
                                   HasSubstr("RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fmerger")));
  folder_.Write("token", "second");
  life = absl::Hours(1);
  EXPECT_EQ(chain.Get()->access_key, "ASIA2");
  EXPECT_THAT(bodies.back(), HasSubstr("WebIdentityToken=second"));
  EXPECT_EQ(chain.Get()->access_key, "ASIA2");
  // The store calls them expired.
  chain.Expired(*chain.Get());
  EXPECT_EQ(chain.Get()->access_key, "ASIA3");
}

TEST_F(AwsCredentialsTest, AFailureOfTheFirstSourceIsFinal) {
  std::atomic<int> asked = 0;
  HttpServer container([&](const ServedRequest&) {
    ++asked;
    return ServedReply{.body = R"({"AccessKeyId": "a", "SecretAccessKey": "b"})"};
  });
  HttpServer sts([&](const ServedRequest&) {
    return ServedReply{.status = 403,
                       .body =
                           "<ErrorResponse><Error><Code>ExpiredTokenException</Code><Message>"
                           "canary</Message></Error></ErrorResponse>"};
  });
  environment_["AWS_WEB_IDENTITY_TOKEN_FILE"] = folder_.Write("token", "canary");
  environment_["AWS_ROLE_ARN"] = "arn";
  environment_["AWS_ENDPOINT_URL_STS"] = sts.url();
  environment_["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = container.url();
  EXPECT_THAT(Chain().Get(), StatusIs(absl::StatusCode::kPermissionDenied,
                                      AllOf(HasSubstr("STS"), HasSubstr("ExpiredTokenException"),
                                            Not(HasSubstr("canary")))));
  EXPECT_EQ(asked, 0);
}

TEST_F(AwsCredentialsTest, ContainerEndpoint) {
  std::string authorization;
  HttpServer agent([&](const ServedRequest& request) {
    authorization = request.headers.at("authorization");
    return ServedReply{
        .body = absl::StrCat(R"({"AccessKeyId": "ASIA", "SecretAccessKey": "s", "Token": "t",)",
                             R"( "Expiration": ")", Rfc3339(absl::Now() + absl::Hours(1)), "\"}")};
  });
  environment_["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = agent.url() + "/v1/credentials";
  environment_["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = folder_.Write("auth", "Bearer x\n");
  const auto credentials = Chain().Get();
  ASSERT_THAT(credentials, IsOk());
  EXPECT_EQ(credentials->access_key, "ASIA");
  EXPECT_EQ(authorization, "Bearer x");
  EXPECT_LT(credentials->expires, absl::Now() + absl::Hours(2));
}

TEST_F(AwsCredentialsTest, AContainerEndpointElsewhereIsNotTrusted) {
  for (const char* url :
       {"http://evil.example/", "http://10.0.0.1/", "http://169.254.169.254/",
        "http://localhost.evil.example/", "http://user@127.0.0.1/", "file:///x"}) {
    environment_["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = url;
    EXPECT_THAT(Chain().Get(),
                StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("neither https")))
        << url;
  }
}

TEST_F(AwsCredentialsTest, AStoreThatCallsThemExpiredGetsNewOnes) {
  std::atomic<int> given = 0;
  HttpServer agent([&](const ServedRequest&) {
    return ServedReply{.body = absl::StrCat(R"({"AccessKeyId": "ASIA)", ++given,
                                            R"(", "SecretAccessKey": "s", "Token": "t"})")};
  });
  HttpServer store_server([&](const ServedRequest& request) {
    if (absl::StrContains(request.headers.at("authorization"), "ASIA2/")) return ServedReply{};
    return ServedReply{.status = 400,
                       .body = "<Error><Code>ExpiredToken</Code><Message>m</Message></Error>"};
  });
  environment_["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = agent.url();
  const S3Options options{
      .endpoint = store_server.url(), .path_style = true, .environment = [this](const char* name) {
        return environment_.count(name) > 0 ? environment_[name] : "";
      }};
  S3Store store(std::make_shared<S3Client>(options), {.bucket = "bucket", .prefix = ""});
  EXPECT_THAT(store.Stat("a"), IsOk());
  EXPECT_THAT(store.Remove("a"), IsOk());
  EXPECT_EQ(given, 2);
}

TEST(S3OptionsTest, FromTheEnvironment) {
  std::map<std::string, std::string> environment;
  const auto get = [&](const char* name) {
    return environment.count(name) > 0 ? environment[name] : std::string();
  };
  S3Options options = *S3OptionsFrom(get);
  EXPECT_EQ(options.endpoint, "");
  EXPECT_EQ(options.region, "us-east-1");
  EXPECT_FALSE(options.path_style);
  environment = {{"AWS_ENDPOINT_URL", "http://a:1"},
                 {"AWS_ENDPOINT_URL_S3", "https://b:2/base/"},
                 {"AWS_DEFAULT_REGION", "r1"},
                 {"AWS_REGION", "r2"},
                 {"AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"}};
  options = *S3OptionsFrom(get);
  EXPECT_EQ(options.endpoint, "https://b:2/base");
  EXPECT_EQ(options.region, "r2");
  EXPECT_TRUE(options.path_style);
  EXPECT_FALSE(options.checksums);
  environment["PEWTER_S3_ADDRESSING"] = "virtual";
  EXPECT_FALSE(S3OptionsFrom(get)->path_style);
  for (const char* bad : {"ftp://x", "localhost:9000", "http://key:secret@host"}) {
    environment["AWS_ENDPOINT_URL_S3"] = bad;
    EXPECT_THAT(S3OptionsFrom(get), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_));
  }
}

}  // namespace
}  // namespace pewter::testing
