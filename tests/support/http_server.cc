#include "tests/support/http_server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "store/http.h"

namespace pewter::testing {
namespace {

bool WriteAll(int connection, absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(connection, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(sent);
  }
  return true;
}

// Appends what comes; false at the end.
bool ReadMore(int connection, std::string& buffer) {
  char chunk[64 << 10];
  const ssize_t got = recv(connection, chunk, sizeof(chunk), 0);
  if (got <= 0) return false;
  buffer.append(chunk, got);
  return true;
}

// Takes one request from the connection; bytes of the next one stay in `buffer`.
bool ReadRequest(int connection, std::string& buffer, ServedRequest& request) {
  size_t end;
  while ((end = buffer.find("\r\n\r\n")) == std::string::npos) {
    if (!ReadMore(connection, buffer)) return false;
    if (buffer[0] == '\x16') {  // a TLS handshake
      WriteAll(connection, "HTTP/1.1 400 No TLS\r\n\r\n");
      return false;
    }
  }
  const std::vector<std::string> lines = absl::StrSplit(buffer.substr(0, end), "\r\n");
  const std::vector<std::string> words = absl::StrSplit(lines[0], ' ');
  if (words.size() != 3) return false;
  request.method = words[0];
  request.target = words[1];
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::pair<std::string, std::string> header =
        absl::StrSplit(lines[i], absl::MaxSplits(':', 1));
    request.headers[absl::AsciiStrToLower(header.first)] =
        std::string(absl::StripAsciiWhitespace(header.second));
  }
  size_t length = 0;
  if (const auto found = request.headers.find("content-length"); found != request.headers.end()) {
    if (!absl::SimpleAtoi(found->second, &length)) return false;
  }
  buffer.erase(0, end + 4);
  while (buffer.size() < length) {
    if (!ReadMore(connection, buffer)) return false;
  }
  request.body = buffer.substr(0, length);
  buffer.erase(0, length);
  return true;
}

// False when the connection is to end.
bool WriteReply(int connection, const ServedRequest& request, const ServedReply& reply,
                const std::atomic<bool>& closing) {
  if (reply.drop) return false;
  std::string head = absl::StrCat("HTTP/1.1 ", reply.status, " X\r\n");
  for (const auto& [name, value] : reply.headers) absl::StrAppend(&head, name, ": ", value, "\r\n");
  absl::StrAppend(
      &head, "Content-Length: ",
      reply.content_length >= 0 ? reply.content_length : static_cast<int64_t>(reply.body.size()),
      "\r\n\r\n");
  if (!WriteAll(connection, head)) return false;
  if (request.method == "HEAD") return true;
  absl::string_view body = reply.body;
  if (reply.cut_after >= 0) body = body.substr(0, reply.cut_after);
  while (reply.bytes_per_second > 0 && !body.empty() && !closing) {
    const size_t step = std::max<int64_t>(1, reply.bytes_per_second / 10);
    if (!WriteAll(connection, body.substr(0, step))) return false;
    body.remove_prefix(std::min(step, body.size()));
    absl::SleepFor(absl::Milliseconds(100));
  }
  return WriteAll(connection, body) && reply.cut_after < 0;
}

}  // namespace

HttpServer::HttpServer(Handler handler) : handler_(std::move(handler)) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(listen(listener_, 128), 0);
  EXPECT_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), 0);
  port_ = ntohs(address.sin_port);
  acceptor_ = std::jthread([this] { Accept(); });
}

HttpServer::~HttpServer() {
  closing_ = true;
  shutdown(listener_, SHUT_RDWR);
  acceptor_.join();
  close(listener_);
  {
    std::lock_guard lock(mutex_);
    for (const int connection : connections_) shutdown(connection, SHUT_RDWR);
  }
  threads_.clear();
}

std::string HttpServer::url() const { return absl::StrCat("http://127.0.0.1:", port_); }

void HttpServer::Accept() {
  while (true) {
    const int connection = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (connection < 0) return;
    const int on = 1;
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    std::lock_guard lock(mutex_);
    connections_.insert(connection);
    threads_.emplace_back([this, connection] { Serve(connection); });
  }
}

void HttpServer::Serve(int connection) {
  std::string buffer;
  while (!closing_) {
    ServedRequest request;
    if (!ReadRequest(connection, buffer, request)) break;
    request.number = ++requests_;
    if (!WriteReply(connection, request, handler_(request), closing_)) break;
  }
  std::lock_guard lock(mutex_);
  connections_.erase(connection);
  close(connection);
}

ServedReply Forward(absl::string_view url, const ServedRequest& request) {
  static HttpClient& client = *new HttpClient;
  HttpRequest forwarded{
      .method = request.method,
      .url = absl::StrCat(url, request.target),
      .body = {reinterpret_cast<const std::byte*>(request.body.data()), request.body.size()},
      .patient = true};
  for (const auto& [name, value] : request.headers) {
    if (name != "content-length" && name != "expect") forwarded.headers.emplace_back(name, value);
  }
  HttpResponse response;
  const absl::Status sent = client.Send(forwarded, response);
  EXPECT_TRUE(sent.ok()) << sent;
  ServedReply reply{.status = response.status, .body = std::move(response.body)};
  for (const auto& [name, value] : response.headers) {
    if (name == "content-length") {
      if (request.method == "HEAD") (void)absl::SimpleAtoi(value, &reply.content_length);
    } else if (name != "transfer-encoding" && name != "connection") {
      reply.headers.emplace_back(name, value);
    }
  }
  return reply;
}

}  // namespace pewter::testing
