// The published examples: the S3 API reference's "Signature Calculations for the Authorization
// Header" (sig-v4-header-based-auth.html), and AWS's Signature Version 4 test suite.
#include "store/aws_signature.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/digest.h"

namespace pewter {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kEmpty[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

absl::Time At(const char* text) {
  absl::Time time;
  EXPECT_TRUE(absl::ParseTime(absl::RFC3339_sec, text, &time, nullptr));
  return time;
}

// The S3 API reference's.
std::string SignS3(AwsRequest request) {
  request.headers.emplace_back("Host", "examplebucket.s3.amazonaws.com");
  request.headers.emplace_back("x-amz-date", "20130524T000000Z");
  request.headers.emplace_back("x-amz-content-sha256", request.payload_hash);
  return AwsAuthorization(
      request,
      {.access_key = "AKIAIOSFODNN7EXAMPLE",
       .secret_key = Secret("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")},
      {.region = "us-east-1", .service = "s3", .time = At("2013-05-24T00:00:00Z")});
}

// The test suite's.
std::string SignSuite(AwsRequest request) {
  request.headers.emplace_back("Host", "example.amazonaws.com");
  request.headers.emplace_back("X-Amz-Date", "20150830T123600Z");
  request.payload_hash = kEmpty;
  return AwsAuthorization(
      request,
      {.access_key = "AKIDEXAMPLE",
       .secret_key = Secret("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")},
      {.region = "us-east-1", .service = "service", .time = At("2015-08-30T12:36:00Z")});
}

TEST(AwsSignatureTest, S3GetObject) {
  EXPECT_EQ(SignS3({.method = "GET",
                    .path = "/test.txt",
                    .headers = {{"Range", "bytes=0-9"}},
                    .payload_hash = kEmpty}),
            "AWS4-HMAC-SHA256 "
            "Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
            "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
            "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
}

TEST(AwsSignatureTest, S3PutObject) {
  EXPECT_THAT(SignS3({.method = "PUT",
                      .path = "/test%24file.text",
                      .headers = {{"Date", "Fri, 24 May 2013 00:00:00 GMT"},
                                  {"x-amz-storage-class", "REDUCED_REDUNDANCY"}},
                      .payload_hash = Sha256::Of("Welcome to Amazon S3.")}),
              EndsWith("98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"));
}

TEST(AwsSignatureTest, S3GetBucketLifecycle) {
  EXPECT_THAT(
      SignS3({.method = "GET", .path = "/", .query = {{"lifecycle", ""}}, .payload_hash = kEmpty}),
      EndsWith("fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"));
}

TEST(AwsSignatureTest, S3ListObjects) {
  const AwsRequest request{.method = "GET",
                           .path = "/",
                           .query = {{"prefix", "J"}, {"max-keys", "2"}},
                           .payload_hash = kEmpty};
  EXPECT_THAT(SignS3(request),
              EndsWith("34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"));
}

TEST(AwsSignatureTest, SuiteVanilla) {
  EXPECT_THAT(SignSuite({.method = "GET", .path = "/"}),
              EndsWith("SignedHeaders=host;x-amz-date, Signature="
                       "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"));
  EXPECT_THAT(SignSuite({.method = "POST", .path = "/"}),
              EndsWith("5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"));
}

TEST(AwsSignatureTest, SuiteQueryOrder) {
  EXPECT_THAT(
      SignSuite(
          {.method = "GET", .path = "/", .query = {{"Param2", "value2"}, {"Param1", "value1"}}}),
      EndsWith("b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"));
}

TEST(AwsSignatureTest, SuiteHeaderValues) {
  EXPECT_THAT(SignSuite({.method = "GET",
                         .path = "/",
                         .headers = {{"My-Header1", "value2"},
                                     {"My-Header1", "value2"},
                                     {"My-Header1", "value1"}}}),
              EndsWith("c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea"));
  EXPECT_THAT(SignSuite({.method = "GET",
                         .path = "/",
                         .headers = {{"My-Header1", " value1"}, {"My-Header2", " \"a   b   c\""}}}),
              EndsWith("acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"));
}

TEST(AwsSignatureTest, SuiteEncodedPath) {
  EXPECT_THAT(SignSuite({.method = "GET", .path = "/%E1%88%B4"}),
              EndsWith("8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"));
}

TEST(AwsSignatureTest, CanonicalRequestIsAsPublished) {
  EXPECT_EQ(AwsCanonicalRequest({.method = "GET",
                                 .path = "/",
                                 .query = {{"prefix", "J"}, {"max-keys", "2"}},
                                 .headers = {{"x-amz-date", "20130524T000000Z"},
                                             {"Host", "examplebucket.s3.amazonaws.com"},
                                             {"x-amz-content-sha256", kEmpty}},
                                 .payload_hash = kEmpty}),
            "GET\n/\nmax-keys=2&prefix=J\nhost:examplebucket.s3.amazonaws.com\n"
            "x-amz-content-sha256:"
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"
            "x-amz-date:20130524T000000Z\n\nhost;x-amz-content-sha256;x-amz-date\n"
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST(AwsSignatureTest, QueriesAreSortedAfterEncoding) {
  EXPECT_EQ(AwsQuery({{"b", "2"}, {"a/", "x y"}, {"a", "\xc3\xa9&="}, {"uploads", ""}}),
            "a=%C3%A9%26%3D&a%2F=x%20y&b=2&uploads=");
}

TEST(AwsSignatureTest, DoesNotShowTheSecret) {
  const std::string authorization = SignS3({.method = "GET", .path = "/", .payload_hash = kEmpty});
  EXPECT_THAT(authorization, Not(HasSubstr("wJalrXUtnFEMI")));
}

}  // namespace
}  // namespace pewter
