#include "server/digest.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/digest.h"
#include "server/errors.h"

namespace pewter::server {

std::string DigestOf(const google::protobuf::Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    message.SerializeToCodedStream(&coded);
  }
  return Sha256::Of(bytes);
}

std::string FormatPageToken(const PageToken& token, absl::string_view digest) {
  return absl::WebSafeBase64Escape(
      absl::StrCat(token.position, ".", digest.substr(0, 16), ".", token.version));
}

absl::StatusOr<PageToken> ParsePageToken(absl::string_view text, absl::string_view digest) {
  PageToken token;
  if (text.empty()) return token;
  std::string plain;
  if (absl::WebSafeBase64Unescape(text, &plain)) {
    const std::vector<absl::string_view> parts = absl::StrSplit(plain, '.');
    if (parts.size() == 3 && absl::SimpleAtoi(parts[0], &token.position) && token.position > 0 &&
        parts[1] == digest.substr(0, 16)) {
      token.version = std::string(parts[2]);
      return token;
    }
  }
  return BadRequestError("PAGE_TOKEN_INVALID",
                         {{"page_token",
                           "is not from the last answer to this request; begin with the first "
                           "page"}});
}

}  // namespace pewter::server
