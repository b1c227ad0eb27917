#include "store/http_range.h"

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace pewter {

std::string RangeHeader(int64_t offset, int64_t size) {
  return absl::StrCat("bytes=", offset, "-", offset + size - 1);
}

absl::Status CheckRange(int64_t offset, int64_t size, const HttpResponse& response) {
  if (response.status == 200) {
    int64_t length = -1;
    if (offset == 0 && absl::SimpleAtoi(response.Header("content-length"), &length) &&
        length == size) {
      return absl::OkStatus();
    }
    return absl::DataLossError("the store does not do ranged reads: it sent the whole object");
  }
  absl::string_view range = response.Header("content-range");
  int64_t first = -1, last = -1;
  const bool bytes = absl::ConsumePrefix(&range, "bytes ");
  const size_t dash = range.find('-'), slash = range.find('/');
  if (!bytes || dash == absl::string_view::npos || slash == absl::string_view::npos ||
      slash < dash || !absl::SimpleAtoi(range.substr(0, dash), &first) ||
      !absl::SimpleAtoi(range.substr(dash + 1, slash - dash - 1), &last) || first != offset ||
      last < first || last >= offset + size) {
    return absl::DataLossError(absl::StrCat(
        "the store sent another range than bytes ", offset, "-", offset + size - 1, ": \"",
        absl::Utf8SafeCHexEscape(response.Header("content-range").substr(0, 100)), "\""));
  }
  if (last < offset + size - 1) {
    return absl::DataLossError(absl::StrCat("ends too early: ", size, " bytes at offset ", offset,
                                            " are needed, only ", last - offset + 1, " are there"));
  }
  return absl::OkStatus();
}

}  // namespace pewter
