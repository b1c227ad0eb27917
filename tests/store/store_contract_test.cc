// The contract of ObjectStore on every store.
#include <mutex>

#include "store/file_store.h"
#include "store/hub_cache_store.h"
#include "store/hub_store.h"
#include "store/s3_store.h"
#include "tests/contract/object_store_contract.h"
#include "tests/support/hub_cache.h"
#include "tests/support/hub_server.h"
#include "tests/support/s3_server.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

class FileFixture final : public ObjectStoreFixture {
 public:
  ObjectStore& store() override { return store_; }
  void Put(const std::string& key, const std::string& content) override {
    folder_.Write(absl::StrCat("root/", key), content);
  }

 private:
  TempFolder folder_;
  FileStore store_{folder_ / "root"};
};

std::unique_ptr<ObjectStoreFixture> MakeFile() { return std::make_unique<FileFixture>(); }

INSTANTIATE_TEST_SUITE_P(File, ObjectStoreReading, ::testing::Values(&MakeFile));
INSTANTIATE_TEST_SUITE_P(File, ObjectStoreWriting, ::testing::Values(&MakeFile));

class HubFixture final : public ObjectStoreFixture {
 public:
  HubFixture() {
    cache_.AddRef("org/model", "main", kCommit);
    std::filesystem::create_directories(
        absl::StrCat(cache_.path(), "/models--org--model/snapshots/", kCommit));
    store_ = OpenStore("hf://org/model").value();
  }
  ObjectStore& store() override { return *store_; }
  void Put(const std::string& key, const std::string& content) override {
    cache_.AddFile("org/model", kCommit, key, content);
  }

 private:
  static constexpr char kCommit[] = "0123456789abcdef0123456789abcdef01234567";
  HubCache cache_;
  std::shared_ptr<ObjectStore> store_;
};

std::unique_ptr<ObjectStoreFixture> MakeHub() { return std::make_unique<HubFixture>(); }

INSTANTIATE_TEST_SUITE_P(HubCache, ObjectStoreReading, ::testing::Values(&MakeHub));

class HubServerFixture final : public ObjectStoreFixture {
 public:
  ObjectStore& store() override {
    // A store lists the files when it is opened.
    std::call_once(opened_, [this] {
      store_ = HubStore::Open({.endpoint = server_.url()}, "org/model", "main").value();
    });
    return *store_;
  }
  void Put(const std::string& key, const std::string& content) override {
    server_.Put(key, content);
  }

 private:
  HubServer server_;
  std::once_flag opened_;
  std::shared_ptr<ObjectStore> store_;
};

std::unique_ptr<ObjectStoreFixture> MakeHubServer() { return std::make_unique<HubServerFixture>(); }

INSTANTIATE_TEST_SUITE_P(Hub, ObjectStoreReading, ::testing::Values(&MakeHubServer));

// A prefix of its own in a bucket of all.
class S3Fixture final : public ObjectStoreFixture {
 public:
  S3Fixture() {
    S3Server* const server = S3Server::Get(missing_);
    if (server == nullptr) return;
    static const std::string& bucket = *new std::string(server->MakeBucket());
    static int count = 0;
    place_ = {.bucket = bucket, .prefix = absl::StrCat("test ", ++count, "/")};
    client_ = std::make_shared<S3Client>(server->Options());
    store_ = std::make_unique<S3Store>(client_, place_);
  }
  std::string missing() const override { return missing_; }
  ObjectStore& store() override { return *store_; }
  void Put(const std::string& key, const std::string& content) override {
    S3Reply reply;
    ASSERT_THAT(client_->Send({.method = "PUT",
                               .bucket = place_.bucket,
                               .key = absl::StrCat(place_.prefix, key),
                               .body = AsBytes(content)},
                              reply),
                IsOk());
  }

 private:
  std::string missing_;
  S3Store::Place place_;
  std::shared_ptr<S3Client> client_;
  std::unique_ptr<S3Store> store_;
};

std::unique_ptr<ObjectStoreFixture> MakeS3() { return std::make_unique<S3Fixture>(); }

INSTANTIATE_TEST_SUITE_P(S3, ObjectStoreReading, ::testing::Values(&MakeS3));
INSTANTIATE_TEST_SUITE_P(S3, ObjectStoreWriting, ::testing::Values(&MakeS3));

}  // namespace
}  // namespace pewter::testing
