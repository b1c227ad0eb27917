#include "server/listen_address.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace pewter::server {
namespace {

constexpr int kMaxPort = 65535;

}  // namespace

bool ListenAddress::IsLoopback() const {
  if (host == "localhost") return true;
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
  in6_addr v6;
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

std::string ListenAddress::ToString() const {
  return absl::StrContains(host, ':') ? absl::StrCat("[", host, "]:", port)
                                      : absl::StrCat(host, ":", port);
}

std::string ListenAddress::LocalTarget() const {
  in6_addr v6;
  // The address that means all of the machine's.
  if (host == "0.0.0.0") return ListenAddress{"127.0.0.1", port}.ToString();
  if (inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_UNSPECIFIED(&v6)) {
    return ListenAddress{"::1", port}.ToString();
  }
  return ToString();
}

absl::StatusOr<ListenAddress> ParseListenAddress(absl::string_view text) {
  const size_t colon = text.rfind(':');
  ListenAddress address;
  if (colon != absl::string_view::npos && colon > 0) {
    absl::string_view host = text.substr(0, colon);
    const bool bracketed = absl::StartsWith(host, "[") && absl::EndsWith(host, "]");
    if (bracketed) host = host.substr(1, host.size() - 2);
    address.host = std::string(host);
    if (!host.empty() && bracketed == absl::StrContains(host, ':') &&
        absl::SimpleAtoi(text.substr(colon + 1), &address.port) && address.port >= 0 &&
        address.port <= kMaxPort) {
      return address;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("address \"", text, "\": write HOST:PORT or [IPV6]:PORT"));
}

}  // namespace pewter::server
