// What HTTP answers hold besides S3's XML and the hub's JSON, on any bytes: ranges, credentials of
// a container's endpoint, and AWS profiles. No crash, refusals have one code, and an accepted range
// is the one that was asked for.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "store/aws_credentials.h"
#include "store/http.h"
#include "store/http_range.h"
#include "tests/fuzz/memory_store.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using pewter::fuzz::Require;
  uint64_t numbers[2] = {};
  if (size >= sizeof numbers) {
    std::memcpy(numbers, data, sizeof numbers);
    data += sizeof numbers;
    size -= sizeof numbers;
  }
  const absl::string_view text(reinterpret_cast<const char*>(data), size);

  // Sizes of objects: their sum is a number, too.
  const int64_t offset = numbers[0] >> 2, length = (numbers[1] >> 2) + 1;
  const std::string asked = absl::StrCat("bytes ", offset, "-", offset + length - 1, "/");
  for (const std::string& range : {std::string(text), absl::StrCat(asked, text)}) {
    const pewter::HttpResponse answer{.status = 206, .headers = {{"content-range", range}}};
    const absl::Status status = pewter::CheckRange(offset, length, answer);
    Require(status.ok() || absl::IsDataLoss(status));
    if (status.ok()) {
      Require(range.compare(0, 6, "bytes ") == 0 && range.find('/') != std::string::npos);
    }
  }
  const pewter::HttpResponse whole{.status = 200,
                                   .headers = {{"content-length", std::string(text)}}};
  Require(!pewter::CheckRange(offset + 1, length, whole).ok());
  Require(
      pewter::CheckRange(offset, length,
                         {.status = 206, .headers = {{"content-range", absl::StrCat(asked, "*")}}})
          .ok());

  const auto credentials = pewter::ParseContainerCredentials(text);
  Require(credentials.ok() || absl::IsDataLoss(credentials.status()));
  if (credentials.ok())
    Require(!credentials->access_key.empty() && !credentials->secret_key.empty());

  for (const auto& [name, value] : pewter::ParseAwsProfile(text, "default")) {
    Require(text.find(value) != absl::string_view::npos);
  }

  Require(pewter::PercentDecode(pewter::PercentEncode(text, text.size() % 2 == 0)) == text);
  const pewter::UrlParts url = pewter::SplitUrl(text);
  Require(url.host.empty() || url.scheme == "http" || url.scheme == "https");
  return 0;
}
