// What an S3 store does when the network or the server misbehaves: a real server (SeaweedFS) behind
// a proxy that breaks answers, and a server of the test's own where no real one is needed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "store/s3_store.h"
#include "tests/contract/object_store_contract.h"
#include "tests/support/http_server.h"
#include "tests/support/matchers.h"
#include "tests/support/s3_server.h"

namespace pewter::testing {

// Only their helpers are used here.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ObjectStoreReading);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ObjectStoreWriting);

namespace {

using ::testing::_;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string SlowDown() {
  return "<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>Please reduce your request "
         "rate.</Message></Error>";
}

std::string Bytes(size_t size) {
  std::string text(size, '\0');
  for (size_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 31 + (i >> 8) + (i >> 16));
  return text;
}

// A store behind a proxy. `fault` may answer itself (true), or change what the server has answered.
class S3FaultTest : public ::testing::Test {
 protected:
  using Fault = std::function<bool(const ServedRequest&, ServedReply&)>;

  void SetUp() override {
    std::string missing;
    server_ = S3Server::Get(missing);
    if (server_ == nullptr) GTEST_SKIP() << missing;
    proxy_ = std::make_unique<HttpServer>([this](const ServedRequest& request) {
      ServedReply reply;
      if (before_ && before_(request, reply)) return reply;
      reply = Forward(server_->url(), request);
      if (after_) after_(request, reply);
      return reply;
    });
    // The server gives each bucket volumes of its own.
    static const std::string& bucket = *new std::string(server_->MakeBucket());
    static int count = 0;
    bucket_ = bucket;
    prefix_ = absl::StrCat("p", ++count, "/");
    Connect();
  }

  void Connect() {
    S3Options options = server_->Options(proxy_->url());
    options.retry = {.attempts = 6,
                     .first = absl::Milliseconds(5),
                     .first_throttled = absl::Milliseconds(20),
                     .longest = absl::Milliseconds(100)};
    options.http.stall_timeout = stall_timeout_;
    store_ = std::make_unique<S3Store>(std::make_shared<S3Client>(options),
                                       S3Store::Place{.bucket = bucket_, .prefix = prefix_});
  }

  // What is there, asked without the proxy.
  std::string Content(const std::string& key) {
    S3Store direct(std::make_shared<S3Client>(server_->Options()),
                   {.bucket = bucket_, .prefix = prefix_});
    return ReadText(direct, key, int64_t{1} << 30).value_or("(nothing)");
  }
  int64_t Uploads() {
    S3Client client(server_->Options());
    S3Reply reply;
    EXPECT_THAT(
        client.Send({.bucket = bucket_, .query = {{"uploads", ""}, {"prefix", prefix_}}}, reply),
        IsOk());
    return static_cast<int64_t>(ParseListUploads(reply.http.body)->uploads.size());
  }

  S3Server* server_ = nullptr;
  std::unique_ptr<HttpServer> proxy_;
  Fault before_, after_;
  std::string bucket_, prefix_;
  absl::Duration stall_timeout_ = absl::Seconds(15);
  std::unique_ptr<S3Store> store_;
};

// Row 16 of the fault table.
TEST_F(S3FaultTest, ScatteredErrorsAreRetried) {
  const std::string content = Bytes(40 << 20);
  for (const int status : {500, 502, 503, 429}) {
    std::atomic<int> faults = 0;
    before_ = [&](const ServedRequest& request, ServedReply& reply) {
      if (request.number % 5 != 0) return false;
      reply.status = status;
      if (status == 503) reply.body = SlowDown();
      ++faults;
      return true;
    };
    const std::string key = absl::StrCat("status ", status);
    ASSERT_THAT(WriteText(*store_, key, content), IsOk()) << status;
    EXPECT_TRUE(*ReadText(*store_, key, 1 << 30) == content) << status;
    EXPECT_GT(faults, 1) << status;
  }
}

TEST_F(S3FaultTest, AnOutageEndsWithUnavailableAndWithoutAStorm) {
  ASSERT_THAT(WriteText(*store_, "a", "content"), IsOk());
  before_ = [&](const ServedRequest&, ServedReply& reply) {
    reply.status = 503;
    reply.body = SlowDown();
    return true;
  };
  const int64_t before = proxy_->requests();
  EXPECT_THAT(store_->Stat("a"),
              StatusIs(absl::StatusCode::kUnavailable, AllOf(HasSubstr("/a"), HasSubstr("503"))));
  EXPECT_EQ(proxy_->requests() - before, 6);
  // All requests share a budget, so the later ones are hardly retried.
  constexpr int kRequests = 100;
  for (int i = 0; i < kRequests; ++i) EXPECT_FALSE(store_->Stat("a").ok());
  EXPECT_LT(proxy_->requests() - before, kRequests + 120);
}

// Row 17.
TEST_F(S3FaultTest, ABodyThatIsCutShortIsGoneOnWithWhereItEnded) {
  const std::string content = Bytes(1 << 20);
  ASSERT_THAT(WriteText(*store_, "a", content), IsOk());
  std::set<std::string> ranges;
  std::set<std::string> versions;
  std::mutex mutex;
  after_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method != "GET") return false;
    std::lock_guard lock(mutex);
    ranges.insert(request.headers.at("range"));
    versions.insert(request.headers.at("if-match"));
    if (reply.body.size() > 300000) {
      reply.content_length = static_cast<int64_t>(reply.body.size());
      reply.cut_after = 300000;
    }
    return false;
  };
  EXPECT_TRUE(*ReadText(*store_, "a", 1 << 30) == content);
  // What has come is not asked for again.
  EXPECT_EQ(ranges, (std::set<std::string>{"bytes=0-1048575", "bytes=300000-1048575",
                                           "bytes=600000-1048575", "bytes=900000-1048575"}));
  EXPECT_EQ(versions.size(), 1u);
}

TEST_F(S3FaultTest, ABodyThatNeverComesIsUnavailable) {
  ASSERT_THAT(WriteText(*store_, "a", Bytes(1000)), IsOk());
  after_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method == "GET") reply.drop = true;
    return false;
  };
  EXPECT_THAT(
      ReadRange(*store_, "a", 0, 1000),
      StatusIs(absl::StatusCode::kUnavailable, AllOf(HasSubstr("/a"), HasSubstr("6 attempts"))));
}

// Row 18, as far as writing goes: the store checks what it got.
TEST_F(S3FaultTest, WrongBytesAreNotStored) {
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method != "PUT") return false;
    ServedRequest damaged = request;
    damaged.body[damaged.body.size() / 2] ^= 1;
    reply = Forward(server_->url(), damaged);
    return true;
  };
  EXPECT_FALSE(WriteText(*store_, "a", Bytes(1000)).ok());
  EXPECT_FALSE(WriteText(*store_, "large", Bytes(40 << 20)).ok());
  EXPECT_EQ(Content("a"), "(nothing)");
  EXPECT_EQ(Content("large"), "(nothing)");
  EXPECT_EQ(Uploads(), 0);
}

// Row 19.
TEST_F(S3FaultTest, AStoreThatIgnoresRangesIsFoundOut) {
  ASSERT_THAT(WriteText(*store_, "a", Bytes(1000)), IsOk());
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method != "GET") return false;
    ServedRequest whole = request;
    whole.headers.erase("range");
    reply = Forward(server_->url(), whole);
    return true;
  };
  // The whole object is what a read of all of it wants.
  EXPECT_TRUE(*ReadRange(*store_, "a", 0, 1000) == Bytes(1000));
  EXPECT_THAT(ReadRange(*store_, "a", 100, 50),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("/a")));
  EXPECT_THAT(ReadRange(*store_, "a", 0, 999),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("/a")));
}

TEST_F(S3FaultTest, AnotherRangeThanTheOneAskedForIsFoundOut) {
  ASSERT_THAT(WriteText(*store_, "a", Bytes(1000)), IsOk());
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method != "GET") return false;
    ServedRequest shifted = request;
    shifted.headers["range"] = "bytes=1-100";
    reply = Forward(server_->url(), shifted);
    return true;
  };
  EXPECT_THAT(ReadRange(*store_, "a", 0, 100),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("another range")));
}

// Row 20.
TEST_F(S3FaultTest, AnObjectThatIsReplacedIsNotMixed) {
  ASSERT_THAT(WriteText(*store_, "a", Bytes(1000)), IsOk());
  ASSERT_THAT(store_->Stat("a"), IsOk());
  EXPECT_TRUE(*ReadRange(*store_, "a", 0, 10) == Bytes(10));
  S3Store other(std::make_shared<S3Client>(server_->Options()),
                {.bucket = bucket_, .prefix = prefix_});
  ASSERT_THAT(WriteText(other, "a", std::string(1000, 'x')), IsOk());
  EXPECT_THAT(ReadRange(*store_, "a", 10, 10),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("/a"), HasSubstr("changed while"))));
  ASSERT_THAT(other.Remove("a"), IsOk());
  EXPECT_THAT(ReadRange(*store_, "a", 10, 10),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("changed while")));
}

TEST_F(S3FaultTest, AStoreThatIgnoresIfMatchIsFoundOut) {
  ASSERT_THAT(WriteText(*store_, "a", Bytes(1000)), IsOk());
  ASSERT_THAT(store_->Stat("a"), IsOk());
  S3Store other(std::make_shared<S3Client>(server_->Options()),
                {.bucket = bucket_, .prefix = prefix_});
  ASSERT_THAT(WriteText(other, "a", std::string(1000, 'x')), IsOk());
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    ServedRequest any = request;
    any.headers.erase("if-match");
    reply = Forward(server_->url(), any);
    return true;
  };
  EXPECT_THAT(ReadRange(*store_, "a", 10, 10),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("changed while")));
}

// Row 21.
bool IsComplete(const ServedRequest& request) {
  return request.method == "POST" && absl::StrContains(request.target, "uploadId=");
}

TEST_F(S3FaultTest, ACompleteThatAnswersAnErrorWith200IsRetried) {
  std::atomic<int> faults = 0;
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (!IsComplete(request) || ++faults > 2) return false;
    reply.body = "<Error><Code>InternalError</Code><Message>Try again.</Message></Error>";
    return true;
  };
  const std::string content = Bytes(20 << 20);
  ASSERT_THAT(WriteText(*store_, "a", content), IsOk());
  EXPECT_EQ(faults, 3);
  EXPECT_TRUE(Content("a") == content);
}

TEST_F(S3FaultTest, ACompleteThatAnswersAFinalErrorWith200Fails) {
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (!IsComplete(request)) return false;
    reply.body = "<Error><Code>InvalidPart</Code><Message>No such part.</Message></Error>";
    return true;
  };
  EXPECT_THAT(WriteText(*store_, "a", Bytes(20 << 20)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("InvalidPart")));
  EXPECT_EQ(Content("a"), "(nothing)");
  EXPECT_EQ(Uploads(), 0);
}

TEST_F(S3FaultTest, TheLostReplyOfACompleteIsFoundOut) {
  std::atomic<int> faults = 0;
  after_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (IsComplete(request)) reply.drop = ++faults == 1;
    return false;
  };
  const std::string content = Bytes(20 << 20);
  ASSERT_THAT(WriteText(*store_, "a", content), IsOk());
  EXPECT_GE(faults, 1);
  EXPECT_TRUE(Content("a") == content);
  EXPECT_EQ(Uploads(), 0);
}

TEST_F(S3FaultTest, TheLostReplyOfAConditionalCreateIsFoundOut) {
  std::atomic<int> puts = 0;
  after_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method == "PUT") reply.drop = ++puts == 1;
    return false;
  };
  // The second attempt meets what the first has made.
  ASSERT_THAT(WriteNewText(*store_, "a", "mine"), IsOk());
  EXPECT_EQ(puts, 2);
  EXPECT_EQ(Content("a"), "mine");
  EXPECT_THAT(WriteNewText(*store_, "a", "yours"),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("/a")));
}

TEST_F(S3FaultTest, AConflictOfConditionalCreatesIsRetried) {
  std::atomic<int> puts = 0;
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method != "PUT" || ++puts > 1) return false;
    reply.status = 409;
    reply.body = "<Error><Code>ConditionalRequestConflict</Code></Error>";
    return true;
  };
  ASSERT_THAT(WriteNewText(*store_, "a", "mine"), IsOk());
  EXPECT_EQ(puts, 2);
}

TEST_F(S3FaultTest, AStoreWithoutConditionalCreateSaysSo) {
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.headers.count("if-none-match") == 0) return false;
    reply.status = 501;
    reply.body = "<Error><Code>NotImplemented</Code><Message>A header.</Message></Error>";
    return true;
  };
  EXPECT_THAT(WriteNewText(*store_, "a", "mine"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("pewter store check")));
}

// Row 4, as far as the store goes.
TEST_F(S3FaultTest, WhatAKilledWriterLeftIsAbortedByTheNext) {
  S3Client client(server_->Options());
  S3Reply reply;
  for (const std::string& key : {prefix_ + "a", prefix_ + "a2"}) {
    ASSERT_THAT(
        client.Send({.method = "POST", .bucket = bucket_, .key = key, .query = {{"uploads", ""}}},
                    reply),
        IsOk());
  }
  EXPECT_EQ(Uploads(), 2);
  ASSERT_THAT(WriteText(*store_, "a", Bytes(20 << 20)), IsOk());
  EXPECT_EQ(Uploads(), 1);  // that of another key
  EXPECT_EQ(*store_->AbortUploads(absl::Now() - absl::Hours(1)), 0);
  EXPECT_EQ(*store_->AbortUploads(absl::Now() + absl::Hours(1)), 1);
  EXPECT_EQ(Uploads(), 0);
}

TEST_F(S3FaultTest, AWriterWhoseUploadWasAbortedFails) {
  auto writer = store_->Create("a").value();
  ASSERT_THAT(writer->Append(AsBytes(Bytes(20 << 20))), IsOk());
  EXPECT_EQ(*store_->AbortUploads(absl::InfiniteFuture()), 1);
  absl::Status status = writer->Append(AsBytes(Bytes(20 << 20)));
  if (status.ok()) status = writer->Commit();
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(Content("a"), "(nothing)");
}

// Row 25.
TEST_F(S3FaultTest, ADripIsGivenUpAndGoneOnWith) {
  stall_timeout_ = absl::Seconds(2);
  Connect();
  const std::string content = Bytes(64 << 10);
  ASSERT_THAT(WriteText(*store_, "a", content), IsOk());
  std::atomic<int> gets = 0;
  after_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method == "GET" && ++gets == 1) reply.bytes_per_second = 1000;
    return false;
  };
  const absl::Time start = absl::Now();
  EXPECT_TRUE(*ReadText(*store_, "a", 1 << 30) == content);
  EXPECT_LT(absl::Now() - start, absl::Seconds(40));  // of 65 at that pace
  EXPECT_EQ(gets, 2);
}

// Row 11.
TEST_F(S3FaultTest, AStoreWhoseClockDiffersIsFollowed) {
  std::atomic<int> skewed = 0;
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    const absl::Time theirs = absl::Now() + absl::Hours(1);
    if (request.headers.at("x-amz-date").substr(0, 11) == AwsDate(theirs).substr(0, 11)) {
      reply.status = 200;
      return true;
    }
    ++skewed;
    reply.status = 403;
    reply.headers = {
        {"Date", absl::FormatTime("%a, %d %b %Y %H:%M:%S GMT", theirs, absl::UTCTimeZone())}};
    reply.body = "<Error><Code>RequestTimeTooSkewed</Code></Error>";
    return true;
  };
  EXPECT_THAT(store_->Stat("a"), IsOk());
  EXPECT_THAT(store_->Stat("b"), IsOk());
  EXPECT_EQ(skewed, 1);
}

TEST_F(S3FaultTest, WrongKeysAreDeniedAndNotShown) {
  S3Options options = server_->Options();
  options.environment = KeysEnvironment(server_->access_key(), "canary-of-a-secret");
  S3Store store(std::make_shared<S3Client>(options), {.bucket = bucket_, .prefix = ""});
  for (const absl::Status& status :
       {store.Stat("a").status(), store.List("").status(), WriteText(store, "a", "x")}) {
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kPermissionDenied,
                                 AllOf(HasSubstr(bucket_), Not(HasSubstr("canary")))));
  }
}

// Row 23.
TEST_F(S3FaultTest, ADeniedWriteIsFinalAndSaidOnce) {
  const std::string content = Bytes(40 << 20);
  ASSERT_THAT(WriteText(*store_, "shard", content), IsOk());
  std::atomic<int> denied = 0;
  before_ = [&](const ServedRequest& request, ServedReply& reply) {
    if (request.method == "GET" || request.method == "HEAD") return false;
    reply.status = 403;
    reply.body = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>";
    ++denied;
    return true;
  };
  EXPECT_THAT(WriteNewText(*store_, "manifest", "{}"),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("manifest")));
  EXPECT_EQ(denied, 1);
  // What was there is kept.
  EXPECT_TRUE(Content("shard") == content);
  EXPECT_EQ(Content("manifest"), "(nothing)");
}

// Row 24.
TEST(S3ConnectionTest, NobodyThere) {
  S3Options options{.endpoint = "http://127.0.0.1:1",
                    .path_style = true,
                    .environment = KeysEnvironment("k", "canary")};
  S3Store store(std::make_shared<S3Client>(options), {.bucket = "bucket", .prefix = ""});
  // Said soon, not after all the waits that an outage of a known store is worth.
  const absl::Time start = absl::Now();
  EXPECT_THAT(store.Stat("a"), StatusIs(absl::StatusCode::kUnavailable,
                                        AllOf(HasSubstr("s3://bucket/a"), HasSubstr("3 attempts"),
                                              HasSubstr("127.0.0.1:1"), Not(HasSubstr("canary")))));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

TEST(S3ConnectionTest, ANameThatNobodyHas) {
  S3Options options{.endpoint = "http://store.invalid",
                    .path_style = true,
                    .environment = KeysEnvironment("k", "canary")};
  S3Store store(std::make_shared<S3Client>(options), {.bucket = "bucket", .prefix = ""});
  const absl::Time start = absl::Now();
  const absl::Status status = store.Stat("a").status();
  EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("store.invalid"), Not(HasSubstr("canary"))));
  EXPECT_LT(absl::Now() - start, absl::Seconds(30));
}

// Row 43: other protocols than the web's are not spoken.
TEST(S3ConnectionTest, AnEndpointIsOfTheWeb) {
  for (const char* endpoint : {"file:///etc/passwd", "gopher://127.0.0.1:70", "ftp://127.0.0.1",
                               "dict://127.0.0.1:11211"}) {
    S3Options options{
        .endpoint = endpoint, .path_style = true, .environment = KeysEnvironment("k", "s")};
    options.retry.attempts = 1;
    S3Store store(std::make_shared<S3Client>(options), {.bucket = "bucket", .prefix = ""});
    const absl::Status status = store.Stat("a").status();
    EXPECT_FALSE(status.ok() || absl::IsNotFound(status)) << endpoint << ": " << status;
  }
}

TEST(S3ConnectionTest, ATlsErrorIsFinal) {
  std::atomic<int> connections = 0;
  HttpServer plain([&](const ServedRequest&) {
    ++connections;
    return ServedReply{};
  });
  S3Options options{.endpoint = absl::StrCat("https://", plain.url().substr(7)),
                    .path_style = true,
                    .environment = KeysEnvironment("k", "s")};
  S3Store store(std::make_shared<S3Client>(options), {.bucket = "bucket", .prefix = ""});
  const absl::Time start = absl::Now();
  EXPECT_THAT(store.Stat("a"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("TLS")));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

TEST(S3ConnectionTest, RedirectsAreNotFollowed) {
  std::atomic<int> reached = 0;
  HttpServer elsewhere([&](const ServedRequest&) {
    ++reached;
    return ServedReply{};
  });
  HttpServer server([&](const ServedRequest&) {
    return ServedReply{.status = 307, .headers = {{"Location", elsewhere.url() + "/x"}}};
  });
  S3Options options{
      .endpoint = server.url(), .path_style = true, .environment = KeysEnvironment("k", "s")};
  S3Store store(std::make_shared<S3Client>(options), {.bucket = "bucket", .prefix = ""});
  EXPECT_FALSE(store.Stat("a").ok());
  EXPECT_EQ(reached, 0);
}

TEST(S3ConnectionTest, TheRegionOfABucketIsLearnt) {
  std::atomic<int> wrong = 0;
  HttpServer server([&](const ServedRequest& request) {
    if (absl::StrContains(request.headers.at("authorization"), "/eu-west-3/s3/")) {
      return ServedReply{};
    }
    ++wrong;
    return ServedReply{.status = 400, .headers = {{"x-amz-bucket-region", "eu-west-3"}}};
  });
  S3Options options{
      .endpoint = server.url(), .path_style = true, .environment = KeysEnvironment("k", "s")};
  S3Store store(std::make_shared<S3Client>(options), {.bucket = "bucket", .prefix = ""});
  EXPECT_THAT(store.Stat("a"), IsOk());
  EXPECT_THAT(store.Stat("b"), IsOk());
  EXPECT_EQ(wrong, 1);
}

TEST(S3PlaceTest, UrisAreCheckedAndMadeOne) {
  for (const char* uri : {"s3://bucket/a/b", "s3://bucket/a/b/"}) {
    const auto place = S3Store::Parse(uri);
    ASSERT_THAT(place, IsOk());
    EXPECT_EQ(place->bucket, "bucket");
    EXPECT_EQ(place->prefix, "a/b/");
  }
  EXPECT_EQ(S3Store::Parse("s3://bucket")->prefix, "");
  EXPECT_EQ(S3Store::Parse("s3://bucket/")->prefix, "");
  for (const char* uri :
       {"s3://", "s3:///a", "s3://b", "s3://bucket//a", "s3://bucket/../a", "s3://bucket/a/./b",
        "s3://user:key@bucket/a", "s3://bucket:80/a", "s3://bu cket/a"}) {
    EXPECT_THAT(S3Store::Parse(uri), StatusIs(absl::StatusCode::kInvalidArgument, _)) << uri;
  }
}

}  // namespace
}  // namespace pewter::testing
