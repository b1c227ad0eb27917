// WatchHub: wakes those who watch a job when it has something new.
//
// Events themselves are in the JobStore; the hub holds, for each watched job, the number of its
// last event and the latest progress. Publishing never waits for a watcher: a slow one skips
// progress and reads missed events from the store. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "pewter/v1/job.pb.h"

namespace pewter::server {

class WatchHub {
 private:
  struct Topic {
    int64_t sequence = 0;
    int64_t progress_version = 0;
    v1::Progress progress;
    bool gone = false;
    int watchers = 0;
    absl::CondVar changed;
  };

 public:
  explicit WatchHub(int max_watches) : max_watches_(max_watches) {}

  class Watch {
   public:
    Watch(Watch&& other) noexcept;
    Watch& operator=(Watch&&) = delete;
    ~Watch();

    struct News {
      bool gone = false;     // the job was deleted
      bool closed = false;   // the hub was
      int64_t sequence = 0;  // of the last event that was published
      int64_t progress_version = 0;
      v1::Progress progress;
    };
    // Waits until the job has an event after `sequence`, newer progress than `progress_version`, is
    // gone, or the hub is closed; at most until `timeout`.
    News Wait(int64_t sequence, int64_t progress_version, absl::Duration timeout);

   private:
    friend class WatchHub;
    Watch(WatchHub* hub, std::string job_id, Topic* topic)
        : hub_(hub), job_id_(std::move(job_id)), topic_(topic) {}
    WatchHub* hub_;
    std::string job_id_;
    Topic* topic_;
  };

  // ResourceExhausted (TOO_MANY_WATCHES). What is published from now on is not missed. The hub
  // must outlive it.
  absl::StatusOr<Watch> Subscribe(absl::string_view job_id);

  void PublishEvent(absl::string_view job_id, int64_t sequence);
  void PublishProgress(absl::string_view job_id, const v1::Progress& progress);
  void PublishGone(absl::string_view job_id);
  bool IsWatched(absl::string_view job_id);
  // Every watch ends, and later ones do at once.
  void Close();

 private:
  template <typename Change>
  void Publish(absl::string_view job_id, const Change& change);

  const int max_watches_;
  absl::Mutex mutex_;
  int watches_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  absl::flat_hash_map<std::string, std::unique_ptr<Topic>> topics_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pewter::server
