#include "tests/support/faulty_store.h"

#include <gtest/gtest.h>

#include "store/file_store.h"
#include "tests/contract/object_store_contract.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

// Without faults it is the store that it decorates.
class PlainFixture final : public ObjectStoreFixture {
 public:
  ObjectStore& store() override { return store_; }
  void Put(const std::string& key, const std::string& content) override {
    folder_.Write(key, content);
  }

 private:
  TempFolder folder_;
  FaultyStore store_{std::make_shared<FileStore>(folder_.path()), {}};
};

std::unique_ptr<ObjectStoreFixture> MakePlain() { return std::make_unique<PlainFixture>(); }
INSTANTIATE_TEST_SUITE_P(Faulty, ObjectStoreReading, ::testing::Values(&MakePlain));
INSTANTIATE_TEST_SUITE_P(Faulty, ObjectStoreWriting, ::testing::Values(&MakePlain));

TEST(FaultyStore, InjectsReadFaults) {
  TempFolder folder;
  folder.Write("a", "hello");
  FaultyStore store(std::make_shared<FileStore>(folder.path()), {.fail_read = 2, .short_read = 3});
  EXPECT_THAT(ReadRange(store, "a", 0, 5), IsOk());
  EXPECT_THAT(ReadRange(store, "a", 0, 5),
              StatusIs(absl::StatusCode::kUnavailable, ::testing::HasSubstr("injected")));
  EXPECT_THAT(ReadRange(store, "a", 0, 5),
              StatusIs(absl::StatusCode::kDataLoss, ::testing::HasSubstr("injected")));
  EXPECT_THAT(ReadRange(store, "a", 0, 5), IsOk());
  EXPECT_EQ(store.reads(), 4);
}

TEST(FaultyStore, InjectsAFullDiskAndAFailedCommit) {
  TempFolder folder;
  FaultyStore store(std::make_shared<FileStore>(folder.path()),
                    {.disk_bytes = 10, .fail_commit = 2});
  EXPECT_THAT(WriteText(store, "a", "12345"), IsOk());
  EXPECT_THAT(WriteText(store, "b", "12345"),
              StatusIs(absl::StatusCode::kDataLoss, ::testing::HasSubstr("fsync")));
  EXPECT_THAT(WriteText(store, "c", "12345"),
              StatusIs(absl::StatusCode::kResourceExhausted, ::testing::HasSubstr("full")));
  EXPECT_EQ(Keys(store, ""), std::vector<std::string>{"a"});
}

}  // namespace
}  // namespace pewter::testing
