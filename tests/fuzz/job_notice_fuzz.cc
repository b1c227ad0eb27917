// What anybody who may use the job database can send to its servers, on any bytes: no crash, and
// what is accepted is written as it was read.
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "server/jobs/job_rules.h"
#include "tests/fuzz/memory_store.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using pewter::fuzz::Require;
  using pewter::server::JobNotice;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const JobNotice notice = pewter::server::ParseNotice(text);
  if (notice.kind == JobNotice::Kind::kMissed) {
    Require(notice.job_id.empty());
  } else {
    const JobNotice again = pewter::server::ParseNotice(pewter::server::FormatNotice(notice));
    Require(again.kind == notice.kind && again.job_id == notice.job_id &&
            again.sequence == notice.sequence && !notice.job_id.empty() && notice.sequence >= 0);
  }
  // Rows, as another version may have written them.
  const auto job = pewter::server::ParseJob(text.substr(0, size / 2), text.substr(size / 2));
  Require(job.ok() || absl::IsDataLoss(job.status()));
  const auto event = pewter::server::ParseEvent(text);
  Require(event.ok() || absl::IsDataLoss(event.status()));
  return 0;
}
