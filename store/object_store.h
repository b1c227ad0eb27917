// ObjectStore: a few verbs over objects below one root (a folder, a bucket prefix, a hub snapshot).
//
// Keys are relative paths with '/' ("tokenizer/vocab.txt"); a key that is empty, absolute, or has a
// ".." part is InvalidArgument. Every method may be called from any thread. Errors: NotFound,
// PermissionDenied, DataLoss (fewer bytes than asked for), ResourceExhausted (disk full),
// Unavailable (try again), Unimplemented (read-only store). The message names the object in full.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace pewter {

struct ObjectStat {
  int64_t size = 0;
  int64_t mtime_ns = 0;  // 0 where the store has none
  std::string
      etag;  // content identity where the store has one (hub blob name, S3 ETag), else empty
};

struct ObjectEntry {
  std::string key;
  ObjectStat stat;
};

// One object being written. Bytes become visible at Commit, all or none; destruction without Commit
// aborts.
class ObjectWriter {
 public:
  virtual ~ObjectWriter() = default;
  virtual absl::Status Append(absl::Span<const std::byte> bytes) = 0;
  // Durable when it returns OK. Replaces an object of the same key.
  virtual absl::Status Commit() = 0;
};

class ObjectStore {
 public:
  virtual ~ObjectStore() = default;
  virtual absl::StatusOr<ObjectStat> Stat(absl::string_view key) = 0;
  // Fills `out` with the bytes from `offset` on; DataLoss when the object ends earlier.
  virtual absl::Status ReadInto(absl::string_view key, int64_t offset,
                                absl::Span<std::byte> out) = 0;
  // A hint: these bytes will be read soon, front to back. A distant store fetches ahead what its
  // share of memory takes (see ReadAhead) as long as the returned object lives, which needs the
  // store. Null where that brings nothing.
  virtual std::shared_ptr<void> WillRead(absl::string_view key, int64_t offset, int64_t bytes) {
    return nullptr;
  }
  // Every object whose key starts with `prefix`, sorted by key. Temporary objects are not listed.
  virtual absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) = 0;
  // OK when the object was not there.
  virtual absl::Status Remove(absl::string_view key) = 0;
  virtual absl::StatusOr<std::unique_ptr<ObjectWriter>> Create(absl::string_view key) = 0;
  // Commit is AlreadyExists when there is an object of that key by then: of all writers that were
  // made so, one commits. For small objects: they may be held in memory.
  virtual absl::StatusOr<std::unique_ptr<ObjectWriter>> CreateNew(absl::string_view key) = 0;
  // Whether reading and writing take memory of their own: a network is between. See LimitWriters.
  virtual bool distant() const { return false; }
  // Writers that are made from now on take at most so much memory each, or the least they can.
  virtual void LimitWriters(int64_t bytes) {}
  // Full name of an object, for messages: "/models/a/config.json".
  virtual std::string Describe(absl::string_view key) const = 0;
};

// A store that is not written to: the three verbs that would are Unimplemented.
class ReadOnlyStore : public ObjectStore {
 public:
  absl::Status Remove(absl::string_view key) final { return ReadOnly(); }
  absl::StatusOr<std::unique_ptr<ObjectWriter>> Create(absl::string_view key) final {
    return ReadOnly();
  }
  absl::StatusOr<std::unique_ptr<ObjectWriter>> CreateNew(absl::string_view key) final {
    return ReadOnly();
  }

 private:
  // Says what is read-only, and why.
  virtual absl::Status ReadOnly() const = 0;
};

// Whole object as text; FailedPrecondition when it is larger than `limit`.
absl::StatusOr<std::string> ReadText(ObjectStore& store, absl::string_view key, int64_t limit);
absl::Status WriteText(ObjectStore& store, absl::string_view key, absl::string_view text);
// As an object that is not there yet, else AlreadyExists.
absl::Status WriteNewText(ObjectStore& store, absl::string_view key, absl::string_view text);

// Opens the store at `uri`: a path, file:///path, s3://bucket/prefix (see S3OptionsFrom for what
// the environment says of it), hf://org/model[@revision] (an existing hub cache, offline), or
// artifact://sha256/DIGEST or artifact://NAME (where PEWTER_ARTIFACTS says).
// NotFound for an hf snapshot that is not in the cache. A file path need not exist yet.
absl::StatusOr<std::shared_ptr<ObjectStore>> OpenStore(absl::string_view uri);

}  // namespace pewter
