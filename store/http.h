// HttpClient: one request, one answer, over connections that are kept open.
//
// Only http and https are spoken, no redirect is followed, certificates are always verified
// (AWS_CA_BUNDLE names other authorities than the system's). Retrying is the caller's: Unavailable
// is what may pass (a refused or reset connection, a body that ends early, a stalled transfer),
// everything else stays wrong (a certificate, a URL). Messages name the host and never the query,
// which may hold a signature. Thread-safe; a call blocks its thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace pewter {

struct HttpRequest {
  std::string method = "GET";
  std::string url;
  std::vector<std::pair<std::string, std::string>> headers;
  absl::Span<const std::byte> body;  // of PUT and POST
  // Where the body of a 2xx answer goes; without it, and for other answers, HttpResponse::body.
  absl::Span<std::byte> into;
  // The server may work for minutes before it answers.
  bool patient = false;
};

struct HttpResponse {
  int status = 0;                                         // 0: no answer
  absl::flat_hash_map<std::string, std::string> headers;  // names in lower case
  std::string body;
  int64_t received = 0;  // bytes put into HttpRequest::into, also of a body that ended early

  // Empty when there is none.
  absl::string_view Header(absl::string_view name) const;
};

struct HttpOptions {
  absl::Duration connect_timeout = absl::Seconds(5);
  // A transfer slower than this for so long is given up.
  int64_t least_bytes_per_second = 8 << 10;
  absl::Duration stall_timeout = absl::Seconds(15);
  absl::Duration patience = absl::Minutes(10);  // of patient requests
  int64_t most_body_bytes = int64_t{64} << 20;  // of HttpResponse::body
};

class HttpClient {
 public:
  explicit HttpClient(HttpOptions options = {});
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  // OK whatever the answer's status is. After an error `response` holds what came before it.
  // DataLoss: more bytes than `into` takes.
  absl::Status Send(const HttpRequest& request, HttpResponse& response);

 private:
  class Handles;
  const HttpOptions options_;
  const std::unique_ptr<Handles> handles_;
};

// "https://host:9000/a?b" in parts; empty `host` when it is no http(s) URL. `authority` is what the
// Host header holds: without the scheme's own port.
struct UrlParts {
  std::string scheme, host, authority, path;  // path: from the first '/', query included
};
UrlParts SplitUrl(absl::string_view url);

// Everything but unreserved characters as %XX, '/' too unless it is kept.
std::string PercentEncode(absl::string_view text, bool keep_slash);
// Leaves what is no %XX as it is.
std::string PercentDecode(absl::string_view text);

}  // namespace pewter
