#include "server/digest.h"

#include <gtest/gtest.h>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "pewter/v1/merge_service.pb.h"
#include "server/errors.h"

namespace pewter::server {
namespace {

TEST(DigestOf, DoesNotDependOnTheOrderOfMaps) {
  v1::CreateJobRequest a, b;
  for (int i = 0; i < 50; ++i) a.mutable_labels()->insert({absl::StrCat(i), "v"});
  for (int i = 49; i >= 0; --i) b.mutable_labels()->insert({absl::StrCat(i), "v"});
  EXPECT_EQ(DigestOf(a), DigestOf(b));
  b.set_priority(1);
  EXPECT_NE(DigestOf(a), DigestOf(b));
}

TEST(PageToken, ComesBack) {
  const std::string digest = DigestOf(v1::ListJobsRequest());
  const auto token =
      ParsePageToken(FormatPageToken({.position = 12, .version = "abc"}, digest), digest);
  ASSERT_TRUE(token.ok()) << token.status();
  EXPECT_EQ(token->position, 12);
  EXPECT_EQ(token->version, "abc");
}

TEST(PageToken, EmptyIsTheFirstPage) {
  const auto token = ParsePageToken("", "digest");
  ASSERT_TRUE(token.ok());
  EXPECT_EQ(token->position, 0);
}

TEST(PageToken, RefusesWhatIsNotOurs) {
  const std::string digest = DigestOf(v1::ListJobsRequest());
  const std::string other = FormatPageToken({.position = 1, .version = ""}, std::string(64, '0'));
  for (const std::string& text : {other, std::string("nonsense!"), absl::WebSafeBase64Escape("1.2"),
                                  FormatPageToken({.position = -1, .version = ""}, digest)}) {
    const auto token = ParsePageToken(text, digest);
    EXPECT_EQ(token.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_EQ(ReasonOf(token.status()), "PAGE_TOKEN_INVALID");
  }
}

}  // namespace
}  // namespace pewter::server
