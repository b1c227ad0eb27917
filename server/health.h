// `pewterd health`: asks a server how it is, as grpc.health.v1 has it.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace pewter::server {

// What may be asked for, besides "" (the server as a whole): whether the server takes jobs.
inline constexpr char kHealthOfJobs[] = "jobs";

// OK: it serves. Unavailable: it does not, or is not there. NotFound: no such service.
absl::Status CheckHealth(const std::string& address, const std::string& service);

}  // namespace pewter::server
