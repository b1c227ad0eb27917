#include "store/read_ahead.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <set>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "tests/support/matchers.h"

namespace pewter::testing {
namespace {

constexpr int64_t kBlock = ReadAhead::kBlockBytes;

std::byte At(int64_t offset) { return static_cast<std::byte>(offset * 7 + (offset >> 13)); }

// An object whose bytes follow from their places, and which counts what is fetched of it.
struct Object {
  std::atomic<int64_t> fetches = 0;
  std::atomic<int64_t> bytes = 0;
  absl::Status status;

  ReadAhead::Fetch fetch() {
    return [this](int64_t offset, absl::Span<std::byte> out) {
      ++fetches;
      bytes += static_cast<int64_t>(out.size());
      for (size_t i = 0; i < out.size(); ++i) out[i] = At(offset + static_cast<int64_t>(i));
      return status;
    };
  }
};

bool Right(absl::Span<const std::byte> bytes, int64_t offset) {
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] != At(offset + static_cast<int64_t>(i))) return false;
  }
  return true;
}

void WaitFor(const std::function<bool()>& condition) {
  for (int i = 0; i < 2000 && !condition(); ++i) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_TRUE(condition());
}

TEST(ReadAheadTest, OnlyWhatIsAnnounced) {
  ReadAhead ahead(8 * kBlock, 4);
  Object object;
  std::vector<std::byte> out(100);
  EXPECT_FALSE(*ahead.Read("a", 0, absl::MakeSpan(out)));
  const auto intent = ahead.Announce("a", 1000, 3 * kBlock, object.fetch());
  EXPECT_NE(intent, nullptr);  // who gets null has nothing to keep
  EXPECT_EQ(ahead.Announce("a", 0, 0, object.fetch()), nullptr);
  EXPECT_FALSE(*ahead.Read("a", 999, absl::MakeSpan(out)));
  EXPECT_FALSE(*ahead.Read("b", 1000, absl::MakeSpan(out)));
  EXPECT_FALSE(*ahead.Read("a", 1000 + 3 * kBlock - 99, absl::MakeSpan(out)));
  EXPECT_TRUE(*ahead.Read("a", 1000 + 3 * kBlock - 100, absl::MakeSpan(out)));
  EXPECT_TRUE(Right(out, 1000 + 3 * kBlock - 100));
}

TEST(ReadAheadTest, TilesAcrossBlocksCostOneFetchABlock) {
  ReadAhead ahead(8 * kBlock, 4);
  Object object;
  const int64_t size = 3 * kBlock + 12345;
  const auto intent = ahead.Announce("a", 17, size, object.fetch());
  std::vector<std::byte> tile(100'000);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t at = 0; at < size; at += static_cast<int64_t>(tile.size())) {
      const auto out = absl::MakeSpan(tile).subspan(0, size - at);
      ASSERT_TRUE(*ahead.Read("a", 17 + at, out));
      ASSERT_TRUE(Right(out, 17 + at)) << at;
    }
  }
  EXPECT_EQ(object.fetches, 4);
  EXPECT_EQ(object.bytes, size);
}

TEST(ReadAheadTest, FetchesBeforeItIsAskedAsFarAsTheMemoryGoes) {
  ReadAhead ahead(3 * kBlock, 4);
  Object first, second;
  const auto one = ahead.Announce("a", 0, 2 * kBlock, first.fetch());
  const auto two = ahead.Announce("b", 0, 10 * kBlock, second.fetch());
  WaitFor([&] { return first.fetches + second.fetches == 3; });
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(first.fetches + second.fetches, 3);
  EXPECT_LE(ahead.used(), 3 * kBlock);
  std::vector<std::byte> block(kBlock);
  for (int64_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(*ahead.Read("b", i * kBlock, absl::MakeSpan(block)));
    ASSERT_TRUE(Right(block, i * kBlock));
    EXPECT_LE(ahead.used(), 3 * kBlock);
  }
}

TEST(ReadAheadTest, MemoryComesBack) {
  ReadAhead ahead(4 * kBlock, 4);
  Object object;
  auto intent = ahead.Announce("a", 0, 4 * kBlock, object.fetch());
  WaitFor([&] { return object.fetches == 4; });
  intent.reset();
  EXPECT_EQ(ahead.used(), 0);
}

TEST(ReadAheadTest, WithoutMemoryReadsGoThrough) {
  ReadAhead ahead(0, 4);
  Object object;
  const auto intent = ahead.Announce("a", 0, kBlock, object.fetch());
  std::vector<std::byte> out(100);
  EXPECT_TRUE(*ahead.Read("a", 500, absl::MakeSpan(out)));
  EXPECT_TRUE(Right(out, 500));
  EXPECT_EQ(object.bytes, 100);
}

TEST(ReadAheadTest, ErrorsGoToTheReader) {
  ReadAhead ahead(4 * kBlock, 4);
  Object object;
  object.status = absl::UnavailableError("no store");
  const auto intent = ahead.Announce("a", 0, 4 * kBlock, object.fetch());
  std::vector<std::byte> out(100);
  EXPECT_THAT(ahead.Read("a", 0, absl::MakeSpan(out)),
              StatusIs(absl::StatusCode::kUnavailable, "no store"));
  WaitFor([&] { return ahead.used() == 0; });
  object.status = absl::OkStatus();
  EXPECT_TRUE(*ahead.Read("a", 0, absl::MakeSpan(out)));
}

TEST(ReadAheadTest, ManyReadersAndRanges) {
  ReadAhead ahead(6 * kBlock, 8);
  Object object;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 4; ++round) {
        const int64_t offset = (t + round) * kBlock / 2;
        const int64_t size = 2 * kBlock + 100 * t;
        const auto intent = ahead.Announce(std::to_string(t % 3), offset, size, object.fetch());
        std::vector<std::byte> tile(300'000);
        for (int64_t at = 0; at < size; at += static_cast<int64_t>(tile.size())) {
          const auto out = absl::MakeSpan(tile).subspan(0, size - at);
          const auto read = ahead.Read(std::to_string(t % 3), offset + at, out);
          if (!read.ok() || !*read || !Right(out, offset + at)) ++wrong;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(ahead.used(), 0);
}

}  // namespace
}  // namespace pewter::testing
