#include "store/hub_cache_store.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "base/digest.h"
#include "tests/support/hub_cache.h"
#include "tests/support/matchers.h"

namespace pewter::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kCommit[] = "aaaa456789abcdef0123456789abcdef01234567";
constexpr char kOther[] = "aaaa99999abcdef0123456789abcdef012345678";

TEST(HubCacheStore, ResolvesBranchesTagsCommitsAndTheirBeginnings) {
  HubCache cache;
  cache.AddRef("org/model", "main", kCommit);
  cache.AddRef("org/model", "refs/pr/1", absl::StrCat(kOther, "\n"));
  cache.AddFile("org/model", kCommit, "config.json", "one");
  cache.AddFile("org/model", kOther, "config.json", "two");
  const auto read = [](const std::string& uri) {
    return ReadText(*OpenStore(uri).value(), "config.json", 100).value();
  };
  EXPECT_EQ(read("hf://org/model"), "one");
  EXPECT_EQ(read("hf://org/model@main"), "one");
  EXPECT_EQ(read("hf://org/model@refs/pr/1"), "two");
  EXPECT_EQ(read(absl::StrCat("hf://org/model@", kOther)), "two");
  EXPECT_EQ(read("hf://org/model@aaaa9"), "two");
  EXPECT_THAT(OpenStore("hf://org/model@aaaa"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("ambiguous"), HasSubstr(kCommit), HasSubstr(kOther))));
  EXPECT_THAT(OpenStore("hf://org/model@bbbb"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("--revision bbbb")));
}

TEST(HubCacheStore, ModelsWithoutAnOrganisation) {
  HubCache cache;
  cache.AddRef("gpt2", "main", kCommit);
  cache.AddFile("gpt2", kCommit, "config.json", "{}");
  EXPECT_EQ(*ReadText(**OpenStore("hf://gpt2"), "config.json", 100), "{}");
}

TEST(HubCacheStore, EtagIsTheBlobAndNamesSayTheCommit) {
  HubCache cache;
  cache.AddRef("org/model", "main", kCommit);
  cache.AddFile("org/model", kCommit, "config.json", "{}");
  const std::shared_ptr<ObjectStore> store = OpenStore("hf://org/model").value();
  EXPECT_EQ(store->Stat("config.json")->etag, Sha256::Of("{}"));
  EXPECT_EQ(store->List("")->front().stat.etag, Sha256::Of("{}"));
  EXPECT_EQ(store->Describe("config.json"),
            absl::StrCat("hf://org/model@", kCommit, "/config.json"));
}

TEST(HubCacheStore, MissingModelSaysWhereItLookedAndHowToDownload) {
  HubCache cache;
  EXPECT_THAT(OpenStore("hf://org/model"),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr(cache.path()), HasSubstr("hf download org/model"))));
  // A ref whose snapshot is gone is a missing model too.
  cache.AddRef("org/model", "main", kCommit);
  EXPECT_THAT(OpenStore("hf://org/model"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("org")));
}

TEST(HubCacheStore, DamagedRefIsDataLoss) {
  HubCache cache;
  cache.AddRef("org/model", "main", "../../../../etc");
  EXPECT_THAT(OpenStore("hf://org/model"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("refs/main")));
}

TEST(HubCacheStore, BadNamesAreRefused) {
  HubCache cache;
  for (const char* uri : {"hf://", "hf://../x", "hf://a/b/c", "hf:///a", "hf://a/", "hf://a b",
                          "hf://org/model@../x", "hf://org/model@/x"}) {
    EXPECT_THAT(OpenStore(uri), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_)) << uri;
  }
}

TEST(HubCacheStore, IsReadOnly) {
  HubCache cache;
  cache.AddRef("org/model", "main", kCommit);
  cache.AddFile("org/model", kCommit, "config.json", "{}");
  const std::shared_ptr<ObjectStore> store = OpenStore("hf://org/model").value();
  EXPECT_THAT(store->Create("x"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("read-only")));
  EXPECT_THAT(store->Remove("config.json"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("read-only")));
}

// Sets a variable, or unsets it when null, for the life of the object.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old, had_ = true;
    value != nullptr ? setenv(name, value, 1) : unsetenv(name);
  }
  ~ScopedVariable() { had_ ? setenv(name_, old_.c_str(), 1) : unsetenv(name_); }

 private:
  const char* name_;
  std::string old_;
  bool had_ = false;
};

TEST(HubCacheStore, CacheFolderFollowsTheEnvironment) {
  ScopedVariable home("HOME", "/home/me");
  ScopedVariable xdg("XDG_CACHE_HOME", nullptr);
  ScopedVariable hf_home("HF_HOME", nullptr);
  ScopedVariable hub("HF_HUB_CACHE", nullptr);
  EXPECT_EQ(HubCacheStore::CacheFolder(), "/home/me/.cache/huggingface/hub");
  setenv("XDG_CACHE_HOME", "/xdg", 1);
  EXPECT_EQ(HubCacheStore::CacheFolder(), "/xdg/huggingface/hub");
  setenv("HF_HOME", "~/hf", 1);
  EXPECT_EQ(HubCacheStore::CacheFolder(), "/home/me/hf/hub");
  setenv("HF_HUB_CACHE", "/hub", 1);
  EXPECT_EQ(HubCacheStore::CacheFolder(), "/hub");
}

}  // namespace
}  // namespace pewter::testing
