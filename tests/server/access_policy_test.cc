#include "server/access_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "server/admission.h"
#include "server/errors.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::pewter::testing::IsOk;
using ::pewter::testing::TempFolder;
using ::testing::HasSubstr;

TEST(AccessPolicyTest, WithoutRulesEverythingIsAllowed) {
  const AccessPolicy policy;
  for (const char* uri : {"/a", "s3://bucket/a", "hf://org/model", "artifact://a"}) {
    EXPECT_THAT(policy.CheckRead(uri), IsOk());
    EXPECT_THAT(policy.CheckWrite(uri), IsOk());
  }
}

TEST(AccessPolicyTest, APrefixIsOfWholeParts) {
  const TempFolder folder;
  const auto policy = AccessPolicy::Make(
      {"s3://models", "s3://shared/team/", "hf://org", "hf://other/one", folder.path()}, {});
  ASSERT_THAT(policy, IsOk());
  for (const std::string& uri :
       {std::string("s3://models"), std::string("s3://models/"), std::string("s3://models/a/b"),
        std::string("s3://shared/team"), std::string("s3://shared/team/a"),
        std::string("hf://org/model"), std::string("hf://org/model@main"),
        std::string("hf://other/one@abc"), folder / "a", std::string("file://") + (folder / "a"),
        folder / "a/../b", std::string("artifact://sha256/x/y"), std::string("artifact://name")}) {
    EXPECT_THAT(policy->CheckRead(uri), IsOk()) << uri;
  }
  for (const std::string& uri : {std::string("s3://models-evil/a"),
                                 std::string("s3://model"),
                                 std::string("s3://other/a"),
                                 std::string("s3://shared/team-evil/a"),
                                 std::string("s3://shared/a"),
                                 std::string("s3://shared/team/../secret"),
                                 std::string("s3://shared/team%2f..%2fsecret"),
                                 std::string("s3://shared//team/a"),
                                 std::string("s3://shared/./team/a"),
                                 std::string("s3://shared/tеam/a"),  // a Cyrillic letter
                                 std::string("hf://org-evil/model"),
                                 std::string("hf://other/one-more"),
                                 std::string("hf://other/two@one"),
                                 std::string("hf://other/../org/model"),
                                 std::string("hf://Org/model"),
                                 folder / "../elsewhere",
                                 folder.path() + "-evil",
                                 std::string("/"),
                                 std::string("/etc/passwd"),
                                 std::string("https://org/model"),
                                 std::string("http://169.254.169.254/latest"),
                                 std::string("gopher://x"),
                                 std::string("")}) {
    const absl::Status status = policy->CheckRead(uri);
    EXPECT_TRUE(absl::IsPermissionDenied(status)) << uri;
    EXPECT_EQ(ReasonOf(status), "SOURCE_PREFIX_DENIED");
  }
  // Where links lead counts.
  std::filesystem::create_symlink("/etc", folder / "link");
  EXPECT_TRUE(absl::IsPermissionDenied(policy->CheckRead(folder / "link/passwd")));
  // Rules of one kind say nothing about the other.
  EXPECT_THAT(policy->CheckWrite("s3://elsewhere/a"), IsOk());
}

TEST(AccessPolicyTest, AKindAsAWhole) {
  const auto policy = AccessPolicy::Make({"hf://", "/"}, {"s3://"});
  ASSERT_THAT(policy, IsOk());
  EXPECT_THAT(policy->CheckRead("hf://any/thing"), IsOk());
  EXPECT_THAT(policy->CheckRead("/any/thing"), IsOk());
  EXPECT_FALSE(policy->CheckRead("s3://any/thing").ok());
  EXPECT_THAT(policy->CheckWrite("s3://any/thing"), IsOk());
  const absl::Status denied = policy->CheckWrite("/any/thing");
  EXPECT_EQ(ReasonOf(denied), "OUTPUT_PREFIX_DENIED");
  EXPECT_THAT(std::string(denied.message()), HasSubstr("allows s3://"));
}

TEST(AccessPolicyTest, ARuleNamesAPlace) {
  for (const char* rule : {"", "models", "./models", "https://host/", "s3://a", "hf://org/../x"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(AccessPolicy::Make({rule}, {}).status())) << rule;
    EXPECT_TRUE(absl::IsInvalidArgument(AccessPolicy::Make({}, {rule}).status())) << rule;
  }
}

TEST(AccessPolicyTest, IsAskedBeforeAJobIsTaken) {
  const auto policy = AccessPolicy::Make({"s3://models"}, {"s3://results"});
  ASSERT_THAT(policy, IsOk());
  v1::CreateJobRequest request;
  request.set_recipe(
      "models:\n  - model: s3://models/a\n  - model: s3://secrets/b\nmerge_method: linear\n");
  request.set_destination_uri("s3://results/a");
  const absl::Status source = Admit(request, *policy).status();
  EXPECT_EQ(ReasonOf(source), "SOURCE_PREFIX_DENIED");
  EXPECT_THAT(std::string(source.message()), HasSubstr("recipe:3:"));
  v1::PlanMergeRequest plan;
  plan.set_recipe(request.recipe());
  EXPECT_EQ(ReasonOf(CheckPlanMerge(plan, *policy)), "SOURCE_PREFIX_DENIED");

  // An adapter is read, too.
  request.set_recipe("models: [{model: s3://models/a+/secrets/adapter}]\nmerge_method: linear\n");
  EXPECT_EQ(ReasonOf(Admit(request, *policy).status()), "SOURCE_PREFIX_DENIED");

  request.set_recipe("models: [{model: s3://models/a}]\nmerge_method: passthrough\n");
  EXPECT_THAT(Admit(request, *policy), IsOk());
  request.set_destination_uri("s3://results-evil/a");
  EXPECT_EQ(ReasonOf(Admit(request, *policy).status()), "OUTPUT_PREFIX_DENIED");
  request.set_destination_uri("artifact://merged");
  EXPECT_THAT(Admit(request, *policy), IsOk());
}

}  // namespace
}  // namespace pewter::server
