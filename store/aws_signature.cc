#include "store/aws_signature.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "store/http.h"

namespace pewter {
namespace {

constexpr char kAlgorithm[] = "AWS4-HMAC-SHA256";

std::string Hmac(absl::string_view key, absl::string_view text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()),
       reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest, &size);
  return std::string(reinterpret_cast<const char*>(digest), size);
}

// By lower-case name; values without outer blanks, inner runs of blanks as one; values of one name
// in the order they are given.
std::map<std::string, std::string> CanonicalHeaders(const AwsRequest& request) {
  std::map<std::string, std::string> headers;
  for (const auto& [name, value] : request.headers) {
    std::string clean = value;
    absl::RemoveExtraAsciiWhitespace(&clean);
    std::string& place = headers[absl::AsciiStrToLower(name)];
    place = place.empty() ? clean : absl::StrCat(place, ",", clean);
  }
  return headers;
}

std::string SignedHeaders(const std::map<std::string, std::string>& headers) {
  return absl::StrJoin(headers, ";",
                       [](std::string* out, const auto& header) { out->append(header.first); });
}

}  // namespace

std::string AwsDate(absl::Time time) {
  return absl::FormatTime("%Y%m%dT%H%M%SZ", time, absl::UTCTimeZone());
}

std::string AwsQuery(const std::vector<std::pair<std::string, std::string>>& query) {
  std::vector<std::pair<std::string, std::string>> encoded;
  for (const auto& [name, value] : query) {
    encoded.emplace_back(PercentEncode(name, /*keep_slash=*/false),
                         PercentEncode(value, /*keep_slash=*/false));
  }
  std::sort(encoded.begin(), encoded.end());
  return absl::StrJoin(encoded, "&", absl::PairFormatter("="));
}

std::string AwsCanonicalRequest(const AwsRequest& request) {
  const std::map<std::string, std::string> headers = CanonicalHeaders(request);
  std::string text =
      absl::StrCat(request.method, "\n", request.path, "\n", AwsQuery(request.query), "\n");
  for (const auto& [name, value] : headers) absl::StrAppend(&text, name, ":", value, "\n");
  absl::StrAppend(&text, "\n", SignedHeaders(headers), "\n", request.payload_hash);
  return text;
}

std::string AwsAuthorization(const AwsRequest& request, const AwsCredentials& credentials,
                             const AwsScope& scope) {
  const std::string date = AwsDate(scope.time);
  const std::string day = date.substr(0, 8);
  const std::string place =
      absl::StrCat(day, "/", scope.region, "/", scope.service, "/aws4_request");
  const std::string to_sign = absl::StrCat(kAlgorithm, "\n", date, "\n", place, "\n",
                                           Sha256::Of(AwsCanonicalRequest(request)));
  std::string key = absl::StrCat("AWS4", credentials.secret_key.Reveal());
  for (absl::string_view part :
       {absl::string_view(day), absl::string_view(scope.region), absl::string_view(scope.service),
        absl::string_view("aws4_request")}) {
    key = Hmac(key, part);
  }
  return absl::StrCat(kAlgorithm, " Credential=", credentials.access_key, "/", place,
                      ", SignedHeaders=", SignedHeaders(CanonicalHeaders(request)),
                      ", Signature=", absl::BytesToHexString(Hmac(key, to_sign)));
}

}  // namespace pewter
