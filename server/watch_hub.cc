#include "server/watch_hub.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/errors.h"

namespace pewter::server {

WatchHub::Watch::Watch(Watch&& other) noexcept
    : hub_(other.hub_),
      job_id_(std::move(other.job_id_)),
      topic_(std::exchange(other.topic_, nullptr)) {}

WatchHub::Watch::~Watch() {
  if (topic_ == nullptr) return;
  absl::MutexLock lock(&hub_->mutex_);
  --hub_->watches_;
  if (--topic_->watchers == 0) hub_->topics_.erase(job_id_);
}

WatchHub::Watch::News WatchHub::Watch::Wait(int64_t sequence, int64_t progress_version,
                                            absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&hub_->mutex_);
  while (!hub_->closed_ && !topic_->gone && topic_->sequence <= sequence &&
         topic_->progress_version <= progress_version) {
    if (topic_->changed.WaitWithDeadline(&hub_->mutex_, deadline)) break;
  }
  return {.gone = topic_->gone,
          .closed = hub_->closed_,
          .sequence = topic_->sequence,
          .progress_version = topic_->progress_version,
          .progress = topic_->progress};
}

absl::StatusOr<WatchHub::Watch> WatchHub::Subscribe(absl::string_view job_id) {
  absl::MutexLock lock(&mutex_);
  if (watches_ >= max_watches_) {
    return WithQuota(MakeError(absl::StatusCode::kResourceExhausted, "TOO_MANY_WATCHES",
                               absl::StrCat(watches_,
                                            " watches are open, as many as this server "
                                            "takes; try again later"),
                               {{"limit", absl::StrCat(max_watches_)}}),
                     "server", absl::Seconds(5));
  }
  std::unique_ptr<Topic>& topic = topics_[job_id];
  if (topic == nullptr) topic = std::make_unique<Topic>();
  ++topic->watchers;
  ++watches_;
  return Watch(this, std::string(job_id), topic.get());
}

template <typename Change>
void WatchHub::Publish(absl::string_view job_id, const Change& change) {
  absl::MutexLock lock(&mutex_);
  const auto it = topics_.find(job_id);
  if (it == topics_.end()) return;
  change(*it->second);
  it->second->changed.SignalAll();
}

void WatchHub::PublishEvent(absl::string_view job_id, int64_t sequence) {
  Publish(job_id, [&](Topic& topic) { topic.sequence = std::max(topic.sequence, sequence); });
}

void WatchHub::PublishProgress(absl::string_view job_id, const v1::Progress& progress) {
  Publish(job_id, [&](Topic& topic) {
    ++topic.progress_version;
    topic.progress = progress;
  });
}

void WatchHub::PublishGone(absl::string_view job_id) {
  Publish(job_id, [](Topic& topic) { topic.gone = true; });
}

bool WatchHub::IsWatched(absl::string_view job_id) {
  absl::MutexLock lock(&mutex_);
  return topics_.contains(job_id);
}

void WatchHub::Close() {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  for (auto& [id, topic] : topics_) topic->changed.SignalAll();
}

}  // namespace pewter::server
