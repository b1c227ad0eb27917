// What every ObjectStore must do. A store's test instantiates ObjectStoreReading, and
// ObjectStoreWriting too unless it is read-only:
//
//   INSTANTIATE_TEST_SUITE_P(File, ObjectStoreReading, ::testing::Values(&MakeFileFixture));
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "store/object_store.h"
#include "tests/support/matchers.h"

namespace pewter::testing {

class ObjectStoreFixture {
 public:
  virtual ~ObjectStoreFixture() = default;
  // Why there is no store here; its tests are skipped. Empty: there is one.
  virtual std::string missing() const { return ""; }
  virtual ObjectStore& store() = 0;
  // Puts an object there by other means than the store's writer.
  virtual void Put(const std::string& key, const std::string& content) = 0;
};

using ObjectStoreFactory = std::unique_ptr<ObjectStoreFixture> (*)();

inline absl::Span<const std::byte> AsBytes(absl::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

inline absl::StatusOr<std::string> ReadRange(ObjectStore& store, absl::string_view key,
                                             int64_t offset, size_t size) {
  std::string out(size, '?');
  const absl::Status read =
      store.ReadInto(key, offset, {reinterpret_cast<std::byte*>(out.data()), out.size()});
  if (!read.ok()) return read;
  return out;
}

inline std::vector<std::string> Keys(ObjectStore& store, absl::string_view prefix) {
  const absl::StatusOr<std::vector<ObjectEntry>> entries = store.List(prefix);
  EXPECT_THAT(entries, IsOk());
  std::vector<std::string> keys;
  if (entries.ok()) {
    for (const ObjectEntry& entry : *entries) keys.push_back(entry.key);
  }
  return keys;
}

class ObjectStoreContract : public ::testing::TestWithParam<ObjectStoreFactory> {
 protected:
  void SetUp() override {
    if (const std::string missing = fixture_->missing(); !missing.empty()) GTEST_SKIP() << missing;
  }
  ObjectStore& store() { return fixture_->store(); }
  void Put(const std::string& key, const std::string& content) { fixture_->Put(key, content); }

 private:
  std::unique_ptr<ObjectStoreFixture> fixture_ = GetParam()();
};

class ObjectStoreReading : public ObjectStoreContract {};
class ObjectStoreWriting : public ObjectStoreContract {};

TEST_P(ObjectStoreReading, StatGivesTheSize) {
  Put("a.txt", "hello");
  Put("empty", "");
  const absl::StatusOr<ObjectStat> stat = store().Stat("a.txt");
  ASSERT_THAT(stat, IsOk());
  EXPECT_EQ(stat->size, 5);
  EXPECT_EQ(store().Stat("empty")->size, 0);
}

TEST_P(ObjectStoreReading, MissingObjectIsNotFoundAndNamed) {
  Put("a.txt", "hello");
  using ::testing::HasSubstr;
  EXPECT_THAT(store().Stat("no/such"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no/such")));
  EXPECT_THAT(ReadRange(store(), "no/such", 0, 1),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no/such")));
  EXPECT_THAT(store().Stat("a.txt/below"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("a.txt")));
}

TEST_P(ObjectStoreReading, AFolderIsNoObject) {
  Put("folder/a.txt", "hello");
  EXPECT_THAT(store().Stat("folder"), StatusIs(absl::StatusCode::kNotFound, ::testing::_));
  EXPECT_FALSE(ReadRange(store(), "folder", 0, 1).ok());
}

TEST_P(ObjectStoreReading, ReadsAnyRange) {
  Put("folder/a.txt", "0123456789");
  EXPECT_EQ(*ReadRange(store(), "folder/a.txt", 0, 10), "0123456789");
  EXPECT_EQ(*ReadRange(store(), "folder/a.txt", 3, 4), "3456");
  EXPECT_EQ(*ReadRange(store(), "folder/a.txt", 9, 1), "9");
  EXPECT_EQ(*ReadRange(store(), "folder/a.txt", 10, 0), "");
}

TEST_P(ObjectStoreReading, ReadingPastTheEndIsDataLossAndNamed) {
  Put("a.txt", "0123456789");
  EXPECT_THAT(ReadRange(store(), "a.txt", 8, 3),
              StatusIs(absl::StatusCode::kDataLoss, ::testing::HasSubstr("a.txt")));
  EXPECT_THAT(ReadRange(store(), "a.txt", 100, 1),
              StatusIs(absl::StatusCode::kDataLoss, ::testing::HasSubstr("a.txt")));
}

TEST_P(ObjectStoreReading, BadKeysAndOffsetsAreRefused) {
  Put("a.txt", "hello");
  for (const char* key :
       {"", "/a.txt", "../a.txt", "x/../a.txt", "x/..", "./a.txt", "x//y", "x/"}) {
    EXPECT_THAT(store().Stat(key), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_))
        << key;
    EXPECT_THAT(ReadRange(store(), key, 0, 1),
                StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_))
        << key;
  }
  EXPECT_THAT(store().Stat(absl::string_view("a\0b", 3)),
              StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_));
  EXPECT_THAT(ReadRange(store(), "a.txt", -1, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_));
}

TEST_P(ObjectStoreReading, ListsByPrefixInOrder) {
  Put("b.txt", "1");
  Put("a/y.txt", "22");
  Put("a/x.txt", "333");
  Put("ab", "4444");
  EXPECT_EQ(Keys(store(), ""), (std::vector<std::string>{"a/x.txt", "a/y.txt", "ab", "b.txt"}));
  EXPECT_EQ(Keys(store(), "a/"), (std::vector<std::string>{"a/x.txt", "a/y.txt"}));
  EXPECT_EQ(Keys(store(), "a"), (std::vector<std::string>{"a/x.txt", "a/y.txt", "ab"}));
  EXPECT_EQ(Keys(store(), "a/x"), (std::vector<std::string>{"a/x.txt"}));
  EXPECT_TRUE(Keys(store(), "nothing/").empty());
  EXPECT_EQ(store().List("")->front().stat.size, 3);
}

TEST_P(ObjectStoreReading, DescribesObjectsInFull) {
  const std::string name = store().Describe("a/x.txt");
  EXPECT_THAT(name, ::testing::EndsWith("/a/x.txt"));
  EXPECT_GT(name.size(), 9u);
}

TEST_P(ObjectStoreReading, ManyThreadsReadManyObjects) {
  constexpr int kObjects = 100;
  for (int i = 0; i < kObjects; ++i) Put(absl::StrCat("o", i), absl::StrCat("content of ", i));
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 5 * kObjects; ++i) {
        const int object = (i * 7 + t * 31) % kObjects;
        const std::string expected = absl::StrCat("content of ", object);
        const absl::StatusOr<std::string> got =
            ReadRange(store(), absl::StrCat("o", object), 0, expected.size());
        if (!got.ok() || *got != expected) ++wrong[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}

TEST_P(ObjectStoreReading, ReadTextHasALimit) {
  Put("a.txt", "hello");
  EXPECT_EQ(*ReadText(store(), "a.txt", 5), "hello");
  EXPECT_THAT(ReadText(store(), "a.txt", 4),
              StatusIs(absl::StatusCode::kFailedPrecondition, ::testing::HasSubstr("a.txt")));
}

TEST_P(ObjectStoreWriting, NothingIsVisibleBeforeCommit) {
  absl::StatusOr<std::unique_ptr<ObjectWriter>> writer = store().Create("sub/a.txt");
  ASSERT_THAT(writer, IsOk());
  ASSERT_THAT((*writer)->Append(AsBytes("hello ")), IsOk());
  ASSERT_THAT((*writer)->Append(AsBytes("world")), IsOk());
  EXPECT_THAT(store().Stat("sub/a.txt"), StatusIs(absl::StatusCode::kNotFound, ::testing::_));
  EXPECT_TRUE(Keys(store(), "").empty());
  ASSERT_THAT((*writer)->Commit(), IsOk());
  EXPECT_EQ(*ReadText(store(), "sub/a.txt", 100), "hello world");
  EXPECT_EQ(Keys(store(), ""), (std::vector<std::string>{"sub/a.txt"}));
}

TEST_P(ObjectStoreWriting, DroppingAWriterAborts) {
  Put("a.txt", "old");
  {
    absl::StatusOr<std::unique_ptr<ObjectWriter>> writer = store().Create("a.txt");
    ASSERT_THAT(writer, IsOk());
    ASSERT_THAT((*writer)->Append(AsBytes("new")), IsOk());
  }
  EXPECT_EQ(*ReadText(store(), "a.txt", 100), "old");
  EXPECT_EQ(Keys(store(), ""), (std::vector<std::string>{"a.txt"}));
}

TEST_P(ObjectStoreWriting, CommitReplacesAndReadersSeeTheNewBytes) {
  ASSERT_THAT(WriteText(store(), "a.txt", "old and longer"), IsOk());
  EXPECT_EQ(*ReadText(store(), "a.txt", 100), "old and longer");
  ASSERT_THAT(WriteText(store(), "a.txt", "new"), IsOk());
  EXPECT_EQ(*ReadText(store(), "a.txt", 100), "new");
}

TEST_P(ObjectStoreWriting, AnEmptyObjectIsAnObject) {
  ASSERT_THAT(WriteText(store(), "empty", ""), IsOk());
  EXPECT_EQ(store().Stat("empty")->size, 0);
}

TEST_P(ObjectStoreWriting, CommitsOnce) {
  absl::StatusOr<std::unique_ptr<ObjectWriter>> writer = store().Create("a.txt");
  ASSERT_THAT(writer, IsOk());
  ASSERT_THAT((*writer)->Commit(), IsOk());
  EXPECT_FALSE((*writer)->Commit().ok());
  EXPECT_FALSE((*writer)->Append(AsBytes("x")).ok());
  EXPECT_EQ(store().Stat("a.txt")->size, 0);
}

TEST_P(ObjectStoreWriting, CreateNewWritesWhatIsNotThere) {
  ASSERT_THAT(WriteNewText(store(), "sub/a.txt", "first"), IsOk());
  EXPECT_EQ(*ReadText(store(), "sub/a.txt", 100), "first");
  EXPECT_THAT(WriteNewText(store(), "sub/a.txt", "second"),
              StatusIs(absl::StatusCode::kAlreadyExists, ::testing::HasSubstr("sub/a.txt")));
  EXPECT_EQ(*ReadText(store(), "sub/a.txt", 100), "first");
  ASSERT_THAT(WriteText(store(), "sub/a.txt", "third"), IsOk());
  ASSERT_THAT(store().Remove("sub/a.txt"), IsOk());
  ASSERT_THAT(WriteNewText(store(), "sub/a.txt", "fourth"), IsOk());
  EXPECT_EQ(*ReadText(store(), "sub/a.txt", 100), "fourth");
  EXPECT_EQ(Keys(store(), ""), (std::vector<std::string>{"sub/a.txt"}));
}

TEST_P(ObjectStoreWriting, OneOfManyCreatesNew) {
  constexpr int kWriters = 8;
  std::vector<std::unique_ptr<ObjectWriter>> writers;
  for (int i = 0; i < kWriters; ++i) {
    writers.push_back(store().CreateNew("a.txt").value());
    ASSERT_THAT(writers.back()->Append(AsBytes(absl::StrCat("writer ", i))), IsOk());
  }
  std::vector<absl::Status> committed(kWriters);
  {
    std::vector<std::thread> threads;
    for (int i = 0; i < kWriters; ++i) {
      threads.emplace_back([&, i] { committed[i] = writers[i]->Commit(); });
    }
    for (std::thread& thread : threads) thread.join();
  }
  std::string won;
  for (int i = 0; i < kWriters; ++i) {
    if (committed[i].ok()) {
      EXPECT_EQ(won, "");
      won = absl::StrCat("writer ", i);
    } else {
      EXPECT_THAT(committed[i], StatusIs(absl::StatusCode::kAlreadyExists, ::testing::_));
    }
  }
  EXPECT_EQ(*ReadText(store(), "a.txt", 100), won);
}

TEST_P(ObjectStoreWriting, LargeObjectsArriveWhole) {
  std::string run(1 << 20, '\0');
  for (size_t i = 0; i < run.size(); ++i) run[i] = static_cast<char>(i * 31 + (i >> 8));
  absl::StatusOr<std::unique_ptr<ObjectWriter>> writer = store().Create("large");
  ASSERT_THAT(writer, IsOk());
  for (int i = 0; i < 20; ++i) {
    run[0] = static_cast<char>(i);
    ASSERT_THAT((*writer)->Append(AsBytes(run)), IsOk());
  }
  ASSERT_THAT((*writer)->Commit(), IsOk());
  ASSERT_EQ(store().Stat("large")->size, 20 << 20);
  for (int i = 0; i < 20; ++i) {
    run[0] = static_cast<char>(i);
    EXPECT_TRUE(*ReadRange(store(), "large", int64_t{i} << 20, 1 << 20) == run) << i;
  }
}

TEST_P(ObjectStoreWriting, RemovesWhatIsThereAndWhatIsNot) {
  ASSERT_THAT(WriteText(store(), "a/b.txt", "x"), IsOk());
  EXPECT_EQ(*ReadText(store(), "a/b.txt", 100), "x");
  EXPECT_THAT(store().Remove("a/b.txt"), IsOk());
  EXPECT_THAT(ReadRange(store(), "a/b.txt", 0, 1),
              StatusIs(absl::StatusCode::kNotFound, ::testing::_));
  EXPECT_THAT(store().Remove("a/b.txt"), IsOk());
  EXPECT_THAT(store().Remove("never/there"), IsOk());
}

TEST_P(ObjectStoreWriting, BadKeysAreRefused) {
  for (const char* key : {"", "/a", "../a", "a/../../b", "a//b"}) {
    EXPECT_THAT(store().Create(key), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_))
        << key;
    EXPECT_THAT(store().CreateNew(key), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_))
        << key;
    EXPECT_THAT(store().Remove(key), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_))
        << key;
  }
}

TEST_P(ObjectStoreWriting, ManyWritersAtOnce) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) {
        EXPECT_THAT(WriteText(store(), absl::StrCat("own", t), absl::StrCat("thread ", t)), IsOk());
        EXPECT_THAT(WriteText(store(), "shared", absl::StrCat("thread ", t)), IsOk());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Keys(store(), "").size(), 9u);
  EXPECT_EQ(*ReadText(store(), "own3", 100), "thread 3");
  EXPECT_EQ(store().Stat("shared")->size, 8);
}

}  // namespace pewter::testing
