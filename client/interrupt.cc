#include "client/interrupt.h"

#include <semaphore.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <utility>

#include "client/exit_code.h"

namespace pewter::client {

namespace {

// What a signal handler may touch: lock-free atomics and sem_post.
std::atomic<int> received{0};
sem_t wake;
struct sigaction old_interrupt, old_terminate;

void HandleSignal(int) {
  const int saved = errno;
  if (received.fetch_add(1) > 0) _exit(kExitInterrupted);
  sem_post(&wake);
  errno = saved;
}

}  // namespace

Interrupt::Interrupt(std::function<void()> on_first) {
  received = 0;
  sem_init(&wake, 0, 0);
  watcher_ = std::jthread([this, on_first = std::move(on_first)] {
    while (sem_wait(&wake) != 0) {
    }
    if (received == 0) return;  // woken by the destructor
    on_first();
    source_.request_stop();
  });
  struct sigaction action {};
  action.sa_handler = HandleSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, &old_interrupt);
  sigaction(SIGTERM, &action, &old_terminate);
}

Interrupt::~Interrupt() {
  sigaction(SIGINT, &old_interrupt, nullptr);
  sigaction(SIGTERM, &old_terminate, nullptr);
  sem_post(&wake);
  watcher_.join();
  sem_destroy(&wake);
}

}  // namespace pewter::client
