// Time for leases and deadlines within this machine: CLOCK_BOOTTIME, which no one sets and which
// runs on while the machine sleeps.
#pragma once

#include <time.h>

#include "absl/time/time.h"

namespace pewter::server {

// Since the machine's start.
inline absl::Duration BootClock() {
  timespec now;
  clock_gettime(CLOCK_BOOTTIME, &now);
  return absl::DurationFromTimespec(now);
}

}  // namespace pewter::server
