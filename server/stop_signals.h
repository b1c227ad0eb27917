// The signals that ask a process to stop: SIGTERM and SIGINT.
#pragma once

#include <signal.h>

namespace pewter::server {

// `handler` may be SIG_DFL. It runs on whichever thread the signal reaches: libraries start threads
// before main, which block none.
inline void HandleStopSignals(void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
}

}  // namespace pewter::server
