#include "kernels/cpu/blas.h"

namespace pewter::kernels::cpu {
namespace {

std::mutex& TheMutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

}  // namespace

LibraryCall::LibraryCall() : lock_(TheMutex(), std::defer_lock) {
  static const bool take_turns = openblas_get_parallel() == OPENBLAS_SEQUENTIAL;
  if (take_turns) lock_.lock();
}

void UseOneThread() {
  static const bool once = [] {
    openblas_set_num_threads(1);
    return true;
  }();
  (void)once;
}

}  // namespace pewter::kernels::cpu
