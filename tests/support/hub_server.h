// HubServer: a Hugging Face hub with one model, "org/model", on a port of the loopback. It speaks
// the paths that are read here: revisions, trees in pages, files in ranges. Large files are
// elsewhere, as on the real one: at another host, where the token does not belong.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "store/http.h"
#include "tests/support/http_server.h"

namespace pewter::testing {

class HubServer {
 public:
  static constexpr char kCommit[] = "0123456789abcdef0123456789abcdef01234567";
  static constexpr char kOldCommit[] = "fedcba9876543210fedcba9876543210fedcba98";
  static constexpr size_t kLarge = 100;

  // With a token, others are refused.
  explicit HubServer(std::string token = "") : token_(std::move(token)) {}

  std::string url() const { return hub_.url(); }
  void Put(const std::string& path, const std::string& content) {
    std::lock_guard lock(mutex_);
    files_[path] = content;
  }
  // Of all requests to the host of large files.
  std::vector<ServedRequest> large_requests() {
    std::lock_guard lock(mutex_);
    return large_requests_;
  }
  int64_t requests() const { return hub_.requests(); }

 private:
  ServedReply Hub(const ServedRequest& request) {
    std::lock_guard lock(mutex_);
    const auto authorization = request.headers.find("authorization");
    if (!token_.empty() && (authorization == request.headers.end() ||
                            authorization->second != absl::StrCat("Bearer ", token_))) {
      return {.status = 401, .headers = {{"X-Error-Code", "GatedRepo"}}};
    }
    absl::string_view path = request.target;
    if (absl::ConsumePrefix(&path, "/api/models/org/model/revision/")) {
      const std::string commit = path == "main" || path == kCommit               ? kCommit
                                 : path == "refs%2Fpr%2F1" || path == kOldCommit ? kOldCommit
                                                                                 : "";
      if (commit.empty()) {
        return {.status = 404, .headers = {{"X-Error-Code", "RevisionNotFound"}}};
      }
      return {.body = absl::StrCat(R"({"id": "org/model", "sha": ")", commit, R"("})")};
    }
    if (absl::ConsumePrefix(&path, absl::StrCat("/api/models/org/model/tree/", kCommit, "?"))) {
      return Tree(path);
    }
    if (absl::ConsumePrefix(&path, absl::StrCat("/org/model/resolve/", kCommit, "/"))) {
      const auto file = files_.find(PercentDecode(path));
      if (file == files_.end()) {
        return {.status = 404, .headers = {{"X-Error-Code", "EntryNotFound"}}};
      }
      if (file->second.size() < kLarge) return Range(request, file->second);
      return {.status = 302,
              .headers = {{"Location", absl::StrCat(large_.url(), "/blob/", path,
                                                    "?signature=canary-of-a-signature")}}};
    }
    return {.status = 404, .headers = {{"X-Error-Code", "RepoNotFound"}}};
  }

  // Two entries a page.
  ServedReply Tree(absl::string_view query) {
    size_t first = 0;
    for (absl::string_view part : absl::StrSplit(query, '&')) {
      if (absl::ConsumePrefix(&part, "cursor=")) (void)absl::SimpleAtoi(part, &first);
    }
    std::vector<std::string> entries = {R"({"type": "directory", "path": "sub", "size": 0, )"
                                        R"("oid": "0123456789012345678901234567890123456789"})"};
    for (const auto& [path, content] : files_) {
      const std::string git(40, 'a');
      entries.push_back(absl::StrCat(
          R"({"type": "file", "path": ")", path, R"(", "oid": ")", git, R"(", "size": )",
          content.size() < kLarge ? content.size() : 134,
          content.size() < kLarge ? "}"
                                  : absl::StrCat(R"(, "lfs": {"oid": ")", Sha256::Of(content),
                                                 R"(", "size": )", content.size(), "}}")));
    }
    ServedReply reply{.body = "["};
    for (size_t i = first; i < first + 2 && i < entries.size(); ++i) {
      absl::StrAppend(&reply.body, i == first ? "" : ",", entries[i]);
    }
    reply.body += "]";
    if (first + 2 < entries.size()) {
      reply.headers = {
          {"Link", absl::StrCat("<", hub_.url(), "/api/models/org/model/tree/", kCommit,
                                "?recursive=true&cursor=", first + 2, ">; rel=\"next\"")}};
    }
    return reply;
  }

  ServedReply Large(const ServedRequest& request) {
    std::lock_guard lock(mutex_);
    large_requests_.push_back(request);
    const std::string path = PercentDecode(
        absl::StripPrefix(request.target.substr(0, request.target.find('?')), "/blob/"));
    return Range(request, files_.at(path));
  }

  static ServedReply Range(const ServedRequest& request, const std::string& content) {
    const auto range = request.headers.find("range");
    if (range == request.headers.end()) return {.body = content};
    const std::pair<std::string, std::string> ends =
        absl::StrSplit(absl::StripPrefix(range->second, "bytes="), '-');
    size_t first = 0, last = 0;
    if (!absl::SimpleAtoi(ends.first, &first) || !absl::SimpleAtoi(ends.second, &last) ||
        first >= content.size()) {
      return {.status = 416};
    }
    last = std::min(last, content.size() - 1);
    return {.status = 206,
            .headers = {{"Content-Range",
                         absl::StrCat("bytes ", first, "-", last, "/", content.size())}},
            .body = content.substr(first, last - first + 1)};
  }

  const std::string token_;
  std::mutex mutex_;
  std::map<std::string, std::string> files_;   // guarded by mutex_
  std::vector<ServedRequest> large_requests_;  // guarded by mutex_
  HttpServer large_{[this](const ServedRequest& request) { return Large(request); }};
  HttpServer hub_{[this](const ServedRequest& request) { return Hub(request); }};
};

}  // namespace pewter::testing
