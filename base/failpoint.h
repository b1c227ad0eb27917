// Failpoints: named places where tests kill, stop, delay or fail a process.
//
// The places are those between two steps of which one may be durable and the next one is not. A
// build has them unless PEWTER_FAILPOINTS is OFF (docs/adr/0012-failpoints.md); without them Reach
// is nothing. In a build that has them they do nothing until $PEWTER_FAILPOINTS says so:
//
//   PEWTER_FAILPOINTS=before_commit=kill@2,shard_read=sleep(20)
//
//   kill         SIGKILL to this process
//   pause        until $PEWTER_FAILPOINTS_DIR/go.NAME is there
//   sleep(MS)
//   error(CODE)  Reach returns it: error(UNAVAILABLE)
//   ...@N        at the N-th hit only, else at each
//
// With $PEWTER_FAILPOINTS_DIR, a folder, hits are counted over all processes that share it (the
// size of DIR/hits.NAME), and the file DIR/armed, where it is, takes the place of the list, so that
// a test changes it while processes run. Reach may be called from any thread.
#pragma once

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace pewter {

// In the order of kFailpoints.
enum class Failpoint {
  kAfterClaim,
  kUnpublished,
  kAfterBegin,
  kShardRead,
  kTensorDone,
  kPartSent,
  kBeforeShard,
  kObjectSynced,
  kShardDone,
  kShardRecorded,
  kBeforePublish,
  kAuxWritten,
  kBeforeCommit,
  kAfterCommit,
  kBeforeFinish,
  kAfterFinish,
  kWorkerLaunched,
  kBeforeDatabaseCommit,
  kAfterDatabaseCommit,
  kBlobSynced,
  kBlobPublished,
  kSetWritten,
};

struct FailpointInfo {
  const char* name;
  const char* where;
};

// Empty in a build without.
absl::Span<const FailpointInfo> Failpoints();
// InvalidArgument when the list cannot be read, FailedPrecondition when there is one and the build
// has no failpoints: a test would wait for what never comes. Call it when the process starts.
absl::Status CheckFailpoints();
// Whether any may do something.
bool FailpointsArmed();
// Not OK: what the test asked for, or a list that cannot be read.
absl::Status Reach(Failpoint point);

}  // namespace pewter
