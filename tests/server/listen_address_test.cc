#include "server/listen_address.h"

#include <gtest/gtest.h>

namespace pewter::server {
namespace {

TEST(ListenAddress, ParsesHostAndPort) {
  struct Case {
    const char* text;
    const char* host;
    int port;
    bool loopback;
    const char* local;
  };
  for (const Case& c : {
           Case{"127.0.0.1:7480", "127.0.0.1", 7480, true, "127.0.0.1:7480"},
           Case{"127.1.2.3:0", "127.1.2.3", 0, true, "127.1.2.3:0"},
           Case{"localhost:1", "localhost", 1, true, "localhost:1"},
           Case{"[::1]:80", "::1", 80, true, "[::1]:80"},
           Case{"0.0.0.0:80", "0.0.0.0", 80, false, "127.0.0.1:80"},
           Case{"[::]:80", "::", 80, false, "[::1]:80"},
           Case{"10.0.0.1:80", "10.0.0.1", 80, false, "10.0.0.1:80"},
           Case{"example.org:80", "example.org", 80, false, "example.org:80"},
           Case{"127.0.0.1.example.org:80", "127.0.0.1.example.org", 80, false,
                "127.0.0.1.example.org:80"},
       }) {
    const auto address = ParseListenAddress(c.text);
    ASSERT_TRUE(address.ok()) << address.status();
    EXPECT_EQ(address->host, c.host);
    EXPECT_EQ(address->port, c.port);
    EXPECT_EQ(address->IsLoopback(), c.loopback) << c.text;
    EXPECT_EQ(address->LocalTarget(), c.local);
    EXPECT_EQ(address->ToString(), c.text);
  }
}

TEST(ListenAddress, RefusesOthers) {
  for (const char* text :
       {"", "7480", ":7480", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1",
        "127.0.0.1:65536", "::1:80", "[127.0.0.1]:80", "[]:80"}) {
    EXPECT_EQ(ParseListenAddress(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace pewter::server
