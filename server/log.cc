#include "server/log.h"

#include <google/protobuf/util/json_util.h>
#include <google/protobuf/wrappers.pb.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace pewter::server {
namespace {

constexpr std::pair<absl::string_view, spdlog::level::level_enum> kLevels[] = {
    {"debug", spdlog::level::debug},  {"info", spdlog::level::info},
    {"warning", spdlog::level::warn}, {"error", spdlog::level::err},
    {"off", spdlog::level::off},
};

spdlog::logger& Logger() {
  static spdlog::logger* const logger = [] {
    auto* made = new spdlog::logger("pewterd", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->flush_on(spdlog::level::debug);
    return made;
  }();
  return *logger;
}

std::string Quoted(absl::string_view text) {
  google::protobuf::StringValue value;
  value.set_value(std::string(text));
  std::string json;
  // Text that is not UTF-8 is not JSON either.
  return google::protobuf::util::MessageToJsonString(value, &json).ok() ? json : "\"?\"";
}

}  // namespace

absl::Status SetLogLevel(absl::string_view name) {
  for (const auto& [known, level] : kLevels) {
    if (known == name) {
      Logger().set_level(level);
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("log level \"", name, "\": write debug, info, warning, error or off"));
}

void Log(LogLevel level, absl::string_view message, LogFields fields) {
  const auto& [name, spdlog_level] = kLevels[static_cast<int>(level)];
  if (!Logger().should_log(spdlog_level)) return;
  std::string line = absl::StrCat(
      "{\"time\":\"", absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", absl::Now(), absl::UTCTimeZone()),
      "\",\"level\":\"", name, "\",\"message\":", Quoted(message));
  for (const auto& [key, value] : fields) {
    absl::StrAppend(&line, ",", Quoted(key), ":", Quoted(value));
  }
  line += "}";
  Logger().log(spdlog_level, line);
}

}  // namespace pewter::server
