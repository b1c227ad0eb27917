// The answer to a GET with a Range header, checked: whether it is the range that was asked for.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "store/http.h"

namespace pewter {

// `response` is a 2xx to a GET of `size` bytes from `offset` on. OK for that range, and for the
// whole object where that is the same. DataLoss: the object ends earlier, or the server does
// something else than it was asked for. The message names no object.
absl::Status CheckRange(int64_t offset, int64_t size, const HttpResponse& response);

// The value of the Range header.
std::string RangeHeader(int64_t offset, int64_t size);

}  // namespace pewter
