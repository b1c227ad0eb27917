// S3Store: objects below s3://bucket/prefix, on any store that speaks S3.
//
// An object is read in the version that this S3Store has first seen, or that Stat has last seen:
// every ranged GET carries If-Match, so that versions never mix; FailedPrecondition when it was
// replaced. Large reads go out as several GETs at once, into the caller's memory.
//
// A writer sends parts of 16 MiB while it is filled, with CRC32Cs for the store to check, and
// completes the upload at Commit; an object of less than one part is one PUT. So nothing is visible
// before Commit. A reply that is lost is found out by a random mark that the object carries as
// metadata. A dropped writer aborts its upload; one that a killed process has left is aborted by
// the next writer of the same key, which so also fences off a writer that still lives.
// CreateNew keeps the object in memory and commits by one PUT with If-None-Match: *.
//
// Errors are those of S3Client. Thread-safe.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "store/object_store.h"
#include "store/s3_client.h"

namespace pewter {

class S3Store final : public ObjectStore {
 public:
  // Where a URI points to; InvalidArgument when it is not s3://bucket[/prefix].
  struct Place {
    std::string bucket, prefix;  // prefix: empty, or with '/' at its end
  };
  static absl::StatusOr<Place> Parse(absl::string_view uri);
  // The client that the process's environment describes; all who ask share it.
  static absl::StatusOr<std::shared_ptr<S3Client>> Client();
  // With that client.
  static absl::StatusOr<std::shared_ptr<ObjectStore>> Open(absl::string_view uri);

  S3Store(std::shared_ptr<S3Client> client, Place place);
  ~S3Store() override;

  absl::StatusOr<ObjectStat> Stat(absl::string_view key) override;
  absl::Status ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) override;
  std::shared_ptr<void> WillRead(absl::string_view key, int64_t offset, int64_t bytes) override;
  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) override;
  absl::Status Remove(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> Create(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> CreateNew(absl::string_view key) override;
  bool distant() const override { return true; }
  void LimitWriters(int64_t bytes) override;
  std::string Describe(absl::string_view key) const override;

  // Aborts the uploads below the prefix that began before `before`. Their number.
  absl::StatusOr<int64_t> AbortUploads(absl::Time before);

  static constexpr int64_t kPartBytes = int64_t{16} << 20;
  static constexpr int kMostParts = 10'000;  // of one object, as S3 has it

 private:
  class Versions;
  class Writer;
  class NewWriter;

  S3Request Request(absl::string_view method, absl::string_view key) const;
  // What the ranges of a version of an object are announced by.
  std::string VersionName(absl::string_view key, absl::string_view version) const;

  const std::shared_ptr<S3Client> client_;
  const Place place_;
  const std::shared_ptr<Versions> versions_;  // writers may outlive the store
  std::atomic<int> parts_in_flight_;          // of each writer
};

}  // namespace pewter
