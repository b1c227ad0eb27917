// HttpServer: a server on a port of the loopback whose answers a test writes, and which can break
// them: dropped, cut short, slowly dripped. Forward makes it a proxy in front of a real server.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace pewter::testing {

struct ServedRequest {
  int64_t number = 0;  // from 1, over the server's life
  std::string method;
  std::string target;                          // path and query
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
};

struct ServedReply {
  int status = 200;
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;
  int64_t content_length = -1;    // what the header says; < 0: the body's size
  bool drop = false;              // the connection ends without an answer
  int64_t cut_after = -1;         // the connection ends after so many bytes of the body
  int64_t bytes_per_second = -1;  // of the body
};

class HttpServer {
 public:
  // The handler is called from several threads.
  using Handler = std::function<ServedReply(const ServedRequest& request)>;
  explicit HttpServer(Handler handler);
  ~HttpServer();

  std::string url() const;  // "http://127.0.0.1:PORT"
  int64_t requests() const { return requests_; }

 private:
  void Accept();
  void Serve(int connection);

  const Handler handler_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<int64_t> requests_ = 0;
  std::atomic<bool> closing_ = false;
  std::mutex mutex_;
  std::set<int> connections_;          // guarded by mutex_
  std::vector<std::jthread> threads_;  // guarded by mutex_
  std::jthread acceptor_;
};

// The answer of the server at `url` (scheme, host and port) to the same request.
ServedReply Forward(absl::string_view url, const ServedRequest& request);

}  // namespace pewter::testing
