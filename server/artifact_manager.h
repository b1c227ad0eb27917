// ArtifactManager: the models that the server keeps for its clients (layout:
// store/artifact_store.h).
//
//   client --Write--> PARTIAL/DIGEST-UUID --Finish: digest checked--> blobs/ --Create--> sets/
//
// What has come of a blob is in a file of a local folder, PARTIAL, whose size is the committed
// size: so it survives lost connections and restarts. It becomes a blob whole or not at all. Where
// the root is a folder, PARTIAL is in it and a blob moves by a rename; else it is copied to the
// root.
//
// A thread sweeps every hour: partial uploads that nobody went on with, and blobs that no set has
// named, both for `retention`. Another server on the same root may remove a blob that this one has
// just told a client to be there; Create looks again, after it has written the set.
//
// Errors are those of pewter/v1/artifact_service.proto. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "pewter/v1/artifact_service.pb.h"
#include "pewter/v1/job.pb.h"
#include "store/object_store.h"
#include "store/resource_name.h"

namespace pewter::server {

struct ArtifactOptions {
  std::string root;                           // a folder or s3:// URI
  std::string partial;                        // a folder, for a root that is none; made when absent
  int64_t quota_bytes = 0;                    // of all blobs; 0: no limit
  int64_t min_free_bytes = int64_t{1} << 30;  // of the disk of PARTIAL, uploads leave so much
  absl::Duration retention = absl::Hours(24);
};

class ArtifactManager {
 public:
  class Upload;

  static absl::StatusOr<std::unique_ptr<ArtifactManager>> Open(ArtifactOptions options);
  // No upload may be left.
  ~ArtifactManager();

  absl::StatusOr<v1::FindMissingBlobsResponse> FindMissing(
      const v1::FindMissingBlobsRequest& request);
  absl::StatusOr<v1::Artifact> Create(const v1::CreateArtifactRequest& request);
  absl::StatusOr<v1::Artifact> Get(absl::string_view uri);
  absl::StatusOr<v1::ListArtifactsResponse> List(const v1::ListArtifactsRequest& request);
  absl::Status Delete(absl::string_view uri);

  // A file to be read.
  struct Object {
    std::shared_ptr<ObjectStore> store;
    std::string key;
    int64_t size = 0;
  };
  // Of a blob or an output.
  absl::StatusOr<Object> Find(const ResourceName& name);

  // Goes on with an upload, or begins it. A stream that has it is told by its `cancel`, which does
  // not block, and waited for. The upload must not outlive the manager.
  absl::StatusOr<std::unique_ptr<Upload>> Begin(const ResourceName& name,
                                                std::function<void()> cancel);
  struct UploadStatus {
    int64_t committed = 0;
    bool complete = false;
  };
  absl::StatusOr<UploadStatus> Status(const ResourceName& name);

  // What the thread does, as of `now`.
  absl::Status Sweep(absl::Time now);

 private:
  // Of a stream that writes.
  struct Active {
    std::function<void()> cancel;
    int64_t missing_bytes = 0;  // that it will take of disk and quota
  };

  ArtifactManager(ArtifactOptions options, std::shared_ptr<ObjectStore> root);
  std::string PartialPath(const ResourceName& name) const;
  absl::StatusOr<bool> HasBlob(absl::string_view sha256, int64_t size);
  // Its blob is in use: the time until it may go begins anew.
  void Touch(absl::string_view sha256);
  absl::Status CheckSpace(int64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The checked file becomes a blob.
  absl::Status Publish(int fd, const std::string& partial, const ResourceName& name);
  void Release(const std::string& partial);
  absl::StatusOr<v1::Artifact> DescribeOutput(const std::string& name);
  absl::Status SweepPartial(absl::Time now);
  absl::Status SweepBlobs(absl::Time now);

  const ArtifactOptions options_;
  const std::shared_ptr<ObjectStore> root_;
  const std::string folder_;  // of the root; empty when it is none

  // Held shared while a set is made, exclusively while blobs are removed.
  absl::Mutex sets_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  absl::Mutex mutex_;
  absl::CondVar released_;
  absl::CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t blob_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::flat_hash_map<std::string, Active> active_ ABSL_GUARDED_BY(mutex_);  // by partial file
  // Since when blobs were seen without a set, by digest.
  absl::flat_hash_map<std::string, absl::Time> unnamed_ ABSL_GUARDED_BY(mutex_);
  std::thread sweeper_;
};

// One stream's hold on an upload. What has come stays when it goes. Not thread-safe.
class ArtifactManager::Upload {
 public:
  ~Upload();
  Upload(const Upload&) = delete;

  // The blob is there; nothing is to be written.
  bool complete() const { return complete_; }
  int64_t committed() const { return committed_; }
  absl::Status Append(int64_t offset, absl::string_view bytes);
  absl::Status Finish();

 private:
  friend class ArtifactManager;
  struct Hash;
  Upload(ArtifactManager* manager, ResourceName name);
  // Takes what has come before.
  absl::Status Open();

  ArtifactManager& manager_;
  const ResourceName name_;
  const std::string partial_;
  bool held_ = false;  // is in manager_.active_
  bool complete_ = false;
  int fd_ = -1;
  int64_t committed_ = 0;
  std::unique_ptr<Hash> hash_;
};

// Removes the model that a job has left at its destination, unless another one is there by now:
// FailedPrecondition (OUTPUT_CHANGED). Nothing happens when it is gone.
absl::Status DeleteJobOutput(const v1::Job& job);

// The files of what a job has left at its destination, and one of them.
absl::StatusOr<v1::Artifact> DescribeJobOutput(const v1::Job& job);
absl::StatusOr<ArtifactManager::Object> FindJobFile(const v1::Job& job, absl::string_view path);

}  // namespace pewter::server
