// The address that the server listens on.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pewter::server {

struct ListenAddress {
  std::string host;  // without brackets
  int port = 0;      // 0: any that is free

  bool IsLoopback() const;       // nobody outside this machine can connect
  std::string ToString() const;  // "127.0.0.1:7480", "[::1]:7480"
  // Where a process on this machine connects to.
  std::string LocalTarget() const;
};

// "HOST:PORT", "[IPV6]:PORT". InvalidArgument for others.
absl::StatusOr<ListenAddress> ParseListenAddress(absl::string_view text);

}  // namespace pewter::server
