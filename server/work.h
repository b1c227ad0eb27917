// `pewterd work`: runs one job for the server that started it.
//
// Claims the job, plans and runs it with the merge library, and tells the server how far it is four
// times a second on a thread of its own; the replies say whether to stop. It stops by itself, and
// publishes nothing, when the server has not answered for a lease. SIGTERM and SIGINT: stops in
// order and leaves the job to be resumed.
#pragma once

#include <sys/types.h>

#include <string>

namespace pewter::server {

struct WorkOptions {
  std::string job_id;
  std::string server;    // HOST:PORT
  pid_t parent_pid = 0;  // the server; the worker dies with it. 0: it lives on its own
};

// The token is in the environment (kTokenVariable). Returns the exit code: 0 when the server knows
// how the attempt ended; else 1, and the reason is on stderr.
int Work(const WorkOptions& options);

}  // namespace pewter::server
