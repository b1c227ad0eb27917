// How OpenBLAS is called here: from the backend's threads, each call on one thread, because the
// number of threads in a call changes the bits.
#pragma once

#include <cblas.h>

#include <mutex>

namespace pewter::kernels::cpu {

// Lives as long as a call of the library: of its builds the one without threads may not be called
// by two threads at once, so there calls take turns.
class LibraryCall {
 public:
  LibraryCall();

 private:
  std::unique_lock<std::mutex> lock_;
};

// Once, before the first call.
void UseOneThread();

}  // namespace pewter::kernels::cpu
