// `pewterd serve`: the server from its start to SIGTERM.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace pewter::server {

struct ServeOptions {
  std::string listen = "127.0.0.1:7480";
  std::string data;      // folder of the server's id, lock and address files; made when absent
  std::string database;  // empty: $PEWTER_DATABASE, else sqlite:DATA/jobs.db. Holds no password
  // Where models are kept for clients: a folder or an s3:// URI. Empty: $PEWTER_ARTIFACTS, or
  // DATA/artifacts.
  std::string artifacts;
  int64_t artifact_quota = 0;  // bytes of what clients have uploaded; 0: no limit
  // Below so much free space on the disks of data and artifacts, uploads are refused and no jobs
  // are taken.
  int64_t min_free_disk = int64_t{1} << 30;
  // After which time what nobody goes on with is removed: uploads, blobs without an artifact, and
  // what killed workers have left.
  absl::Duration retention = absl::Hours(24);
  int workers = 1;
  int lease_seconds = 15;
  int max_watches = 256;       // at the same time; further ones are refused
  std::string worker_program;  // started as `pewterd work` is; empty: this program
  // Places that jobs may read and write, as AccessPolicy has them; none: all.
  std::vector<std::string> allow_read, allow_write;
  std::vector<std::string> projects;  // rules of ProjectPolicy
  bool insecure = false;              // other machines may connect, without TLS
};

// Blocks until SIGTERM or SIGINT, then lets workers stop in order. Call it from the main thread
// before there are others: it blocks these signals. A second signal kills the server.
absl::Status Serve(const ServeOptions& options);

// $XDG_STATE_HOME/pewter, or ~/.local/state/pewter.
std::string DefaultDataFolder();

}  // namespace pewter::server
