#include "store/hub_json.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "store/object_key.h"

namespace pewter {
namespace {

using nlohmann::json;

// Deep nesting would cost stack; the hub's answers are flat.
json Parse(absl::string_view text) {
  constexpr int kMostDepth = 16;
  return json::parse(
      text.begin(), text.end(),
      [](int depth, json::parse_event_t, json&) {
        if (depth > kMostDepth) throw json::other_error::create(501, "too deep", nullptr);
        return true;
      },
      /*allow_exceptions=*/true);
}

bool IsHash(absl::string_view text, size_t digits) {
  return text.size() == digits &&
         text.find_first_not_of("0123456789abcdef") == absl::string_view::npos;
}

}  // namespace

absl::StatusOr<std::string> ParseHubCommit(absl::string_view text) {
  try {
    std::string commit = Parse(text).at("sha").get<std::string>();
    if (IsHash(commit, 40)) return commit;
  } catch (const json::exception&) {
  }
  return absl::DataLossError("the hub's answer names no commit");
}

absl::StatusOr<std::vector<HubFile>> ParseHubTree(absl::string_view text) {
  const absl::Status bad = absl::DataLossError("the hub's answer is no list of files");
  try {
    const json entries = Parse(text);
    if (!entries.is_array()) return bad;
    std::vector<HubFile> files;
    for (const json& entry : entries) {
      if (entry.at("type").get<std::string>() != "file") continue;
      HubFile file{.path = entry.at("path").get<std::string>(),
                   .size = entry.at("size").get<int64_t>(),
                   .etag = entry.at("oid").get<std::string>()};
      if (const auto large = entry.find("lfs"); large != entry.end() && large->is_object()) {
        file.etag = large->at("oid").get<std::string>();
        file.size = large->at("size").get<int64_t>();
      }
      if (file.size < 0 || !(IsHash(file.etag, 40) || IsHash(file.etag, 64)) ||
          !ValidateKey(file.path).ok()) {
        return bad;
      }
      files.push_back(std::move(file));
    }
    return files;
  } catch (const json::exception&) {
    return bad;
  }
}

std::string NextPage(absl::string_view link) {
  for (absl::string_view part : absl::StrSplit(link, ',')) {
    const size_t open = part.find('<'), close = part.find('>');
    if (open == absl::string_view::npos || close == absl::string_view::npos || close < open) {
      continue;
    }
    if (absl::StrContains(part.substr(close), "rel=\"next\"")) {
      return std::string(part.substr(open + 1, close - open - 1));
    }
  }
  return "";
}

}  // namespace pewter
