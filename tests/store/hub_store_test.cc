#include "store/hub_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "tests/contract/object_store_contract.h"
#include "tests/support/hub_cache.h"
#include "tests/support/hub_server.h"
#include "tests/support/matchers.h"

namespace pewter::testing {

// Only their helpers are used here.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ObjectStoreReading);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ObjectStoreWriting);

namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kToken[] = "hf_canary";

absl::StatusOr<std::shared_ptr<ObjectStore>> Open(HubServer& server, absl::string_view revision,
                                                  const std::string& token = "") {
  return HubStore::Open({.endpoint = server.url(), .token = Secret(token)}, "org/model", revision);
}

TEST(HubStoreTest, ABranchIsPinnedToItsCommit) {
  HubServer server;
  server.Put("config.json", "{}");
  const auto store = Open(server, "");
  ASSERT_THAT(store, IsOk());
  EXPECT_EQ((*store)->Describe("config.json"),
            absl::StrCat("hf://org/model@", HubServer::kCommit, "/config.json"));
  EXPECT_EQ(*ReadText(**store, "config.json", 100), "{}");
  // What is pushed later is another commit.
  server.Put("later.json", "{}");
  EXPECT_THAT((*store)->Stat("later.json"), StatusIs(absl::StatusCode::kNotFound, ::testing::_));
}

TEST(HubStoreTest, LargeFilesAreReadInRangesWhereTheHubSendsTo) {
  HubServer server(kToken);
  std::string content(1000, 'x');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>('a' + i % 26);
  server.Put("sub/model.safetensors", content);
  const auto store = Open(server, "main", kToken);
  ASSERT_THAT(store, IsOk());
  const auto stat = (*store)->Stat("sub/model.safetensors");
  ASSERT_THAT(stat, IsOk());
  EXPECT_EQ(stat->size, 1000);
  EXPECT_EQ(stat->etag, Sha256::Of(content));  // what a cache would name it
  EXPECT_EQ(*ReadRange(**store, "sub/model.safetensors", 100, 30), content.substr(100, 30));
  const std::vector<ServedRequest> requests = server.large_requests();
  ASSERT_EQ(requests.size(), 1u);
  EXPECT_EQ(requests[0].headers.at("range"), "bytes=100-129");
  EXPECT_EQ(requests[0].headers.count("authorization"), 0u);
}

TEST(HubStoreTest, ReadsAhead) {
  HubServer server;
  const std::string content(5000, 'y');
  server.Put("model.safetensors", content);
  const auto store = Open(server, "main");
  ASSERT_THAT(store, IsOk());
  const auto intent = (*store)->WillRead("model.safetensors", 0, 5000);
  for (int64_t at = 0; at < 5000; at += 100) {
    EXPECT_EQ(*ReadRange(**store, "model.safetensors", at, 100), std::string(100, 'y'));
  }
  EXPECT_EQ(server.large_requests().size(), 1u);
}

TEST(HubStoreTest, FilesOfTheSameCommitInTheCacheAreNotFetched) {
  HubCache cache;
  HubServer server;
  const std::string content(1000, 'z');
  server.Put("model.safetensors", content);
  server.Put("config.json", "{}");
  cache.AddFile("org/model", HubServer::kCommit, "model.safetensors", content);
  const auto store = Open(server, "main");
  ASSERT_THAT(store, IsOk());
  const int64_t before = server.requests();
  EXPECT_EQ(*ReadText(**store, "model.safetensors", 5000), content);
  EXPECT_EQ(server.requests(), before);
  EXPECT_EQ(*ReadText(**store, "config.json", 5000), "{}");
  EXPECT_EQ(server.requests(), before + 1);
}

TEST(HubStoreTest, WhatIsNotThereIsNamed) {
  HubServer server;
  EXPECT_THAT(Open(server, "v9"),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr("hf://org/model@v9"), HasSubstr("RevisionNotFound"))));
  EXPECT_THAT(HubStore::Open({.endpoint = server.url()}, "org/other", ""),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("hf://org/other")));
  EXPECT_THAT(HubStore::Open({.endpoint = server.url()}, "../etc", ""),
              StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_));
  EXPECT_THAT(HubStore::Open({.endpoint = "hub.example"}, "org/model", ""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("HF_ENDPOINT")));
}

TEST(HubStoreTest, AGatedModelAsksForAToken) {
  HubServer server(kToken);
  EXPECT_THAT(Open(server, "", "hf_wrong-canary"),
              StatusIs(absl::StatusCode::kUnauthenticated,
                       AllOf(HasSubstr("HF_TOKEN"), Not(HasSubstr("canary")))));
}

TEST(HubStoreTest, TheEnvironmentChoosesHubOrCache) {
  HubCache cache;
  HubServer server(kToken);
  server.Put("config.json", "from the hub");
  cache.AddRef("org/model", "main", HubServer::kOldCommit);
  cache.AddFile("org/model", HubServer::kOldCommit, "config.json", "from the cache");
  EXPECT_EQ(*ReadText(**OpenStore("hf://org/model"), "config.json", 100), "from the cache");
  setenv("HF_ENDPOINT", server.url().c_str(), 1);
  setenv("HF_TOKEN", kToken, 1);
  EXPECT_EQ(*ReadText(**OpenStore("hf://org/model"), "config.json", 100), "from the hub");
  setenv("HF_HUB_OFFLINE", "1", 1);
  EXPECT_EQ(*ReadText(**OpenStore("hf://org/model"), "config.json", 100), "from the cache");
  unsetenv("HF_HUB_OFFLINE");
  unsetenv("HF_TOKEN");
  unsetenv("HF_ENDPOINT");
}

TEST(HubStoreTest, FailuresAreRetriedAndCutBodiesGoneOnWith) {
  const std::string content(1000, 'x');
  int requests = 0;
  HttpServer server([&](const ServedRequest& request) -> ServedReply {
    if (++requests % 2 == 1) return {.status = 503};
    if (absl::StrContains(request.target, "/revision/")) {
      return {.body = absl::StrCat(R"({"sha": ")", HubServer::kCommit, "\"}")};
    }
    if (absl::StrContains(request.target, "/tree/")) {
      return {.body = absl::StrCat(R"([{"type": "file", "path": "a", "size": 1000, "oid": ")",
                                   std::string(40, 'a'), "\"}]")};
    }
    size_t first = 0;
    EXPECT_TRUE(absl::SimpleAtoi(
        request.headers.at("range").substr(6, request.headers.at("range").find('-') - 6), &first));
    return {.status = 206,
            .headers = {{"Content-Range", absl::StrCat("bytes ", first, "-999/1000")}},
            .body = content.substr(first),
            .cut_after = 400};
  });
  const auto store = HubStore::Open(
      {.endpoint = server.url(),
       .retry = {.first = absl::Milliseconds(1), .first_throttled = absl::Milliseconds(1)}},
      "org/model", "");
  ASSERT_THAT(store, IsOk());
  EXPECT_EQ(*ReadRange(**store, "a", 0, 1000), content);
}

TEST(HubJsonTest, OtherTextsAreRefused) {
  EXPECT_EQ(*ParseHubCommit(absl::StrCat(R"({"sha": ")", HubServer::kCommit, "\"}")),
            HubServer::kCommit);
  for (const char* text : {"", "{}", "[]", R"({"sha": "main"})", R"({"sha": 1})", "<html>"}) {
    EXPECT_THAT(ParseHubCommit(text), StatusIs(absl::StatusCode::kDataLoss, ::testing::_)) << text;
  }
  const std::string oid(40, 'a');
  for (const std::string& text :
       {std::string("{}"), std::string("[1]"), std::string(R"([{"type": "file"}])"),
        absl::StrCat(R"([{"type":"file","path":"../x","size":1,"oid":")", oid, "\"}]"),
        absl::StrCat(R"([{"type":"file","path":"x","size":-1,"oid":")", oid, "\"}]"),
        std::string(R"([{"type":"file","path":"x","size":1,"oid":"../../x"}])"),
        std::string(1000, '[')}) {
    EXPECT_THAT(ParseHubTree(text), StatusIs(absl::StatusCode::kDataLoss, ::testing::_)) << text;
  }
  EXPECT_EQ(NextPage("<https://h/a?cursor=b>; rel=\"next\""), "https://h/a?cursor=b");
  EXPECT_EQ(NextPage("<https://h/a>; rel=\"prev\", <https://h/b>; rel=\"next\""), "https://h/b");
  EXPECT_EQ(NextPage("<https://h/a>; rel=\"prev\""), "");
  EXPECT_EQ(NextPage(">x<"), "");
}

}  // namespace
}  // namespace pewter::testing
