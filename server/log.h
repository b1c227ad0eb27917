// JSON lines on stderr: {"time":...,"level":...,"message":...,...}. Thread-safe. Never given
// recipes or secrets.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace pewter::server {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

// "debug", "info", "warning", "error", "off". InvalidArgument for others.
absl::Status SetLogLevel(absl::string_view name);

using LogFields = std::initializer_list<std::pair<absl::string_view, std::string>>;
void Log(LogLevel level, absl::string_view message, LogFields fields = {});

}  // namespace pewter::server
