// Digests of messages, and the page tokens that are bound to them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"

namespace pewter::server {

// SHA-256 of the message; equal messages have equal digests, whatever the order of maps.
std::string DigestOf(const google::protobuf::Message& message);

// Where a list goes on. Clients take it as opaque; it grants nothing.
struct PageToken {
  int64_t position = 0;
  std::string version;  // of what is listed; without '.'
};

// `digest`: of the request that the token continues.
std::string FormatPageToken(const PageToken& token, absl::string_view digest);
// The empty token is the first page. InvalidArgument (PAGE_TOKEN_INVALID) when it is not one of
// ours or of another request.
absl::StatusOr<PageToken> ParsePageToken(absl::string_view text, absl::string_view digest);

}  // namespace pewter::server
