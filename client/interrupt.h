// Interrupt: turns Ctrl-C (SIGINT) and SIGTERM into a std::stop_token while it exists, so that a
// merge can keep its state. A second signal ends the process at once with exit code 130.
#pragma once

#include <functional>
#include <stop_token>
#include <thread>

namespace pewter::client {

// One at a time. `on_first` runs in a thread of its own, before the token is stopped.
class Interrupt {
 public:
  explicit Interrupt(std::function<void()> on_first);
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  std::stop_token token() const { return source_.get_token(); }

 private:
  std::stop_source source_;
  std::jthread watcher_;
};

}  // namespace pewter::client
