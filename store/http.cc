#include "store/http.h"

#include <curl/curl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace pewter {
namespace {

constexpr size_t kMostIdle = 64;
constexpr long kBufferBytes = 512L << 10;

struct FreeHeaders {
  void operator()(curl_slist* list) const { curl_slist_free_all(list); }
};
using HeaderList = std::unique_ptr<curl_slist, FreeHeaders>;

// What the callbacks of one transfer work on.
struct Transfer {
  const HttpRequest& request;
  HttpResponse& response;
  int64_t most_body_bytes;
  size_t sent = 0;
  bool too_long = false;
};

size_t OnHeader(char* data, size_t, size_t size, void* user) {
  HttpResponse& response = static_cast<Transfer*>(user)->response;
  const absl::string_view line = absl::StripAsciiWhitespace(absl::string_view(data, size));
  if (absl::StartsWith(line, "HTTP/")) {  // also of an interim answer (100)
    response.headers.clear();
    response.status = 0;
    if (const size_t space = line.find(' '); space != absl::string_view::npos) {
      (void)absl::SimpleAtoi(line.substr(space + 1, 3), &response.status);
    }
    return size;
  }
  if (const size_t colon = line.find(':'); colon != absl::string_view::npos) {
    response.headers[absl::AsciiStrToLower(line.substr(0, colon))] =
        std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
  }
  return size;
}

size_t OnBody(char* data, size_t, size_t size, void* user) {
  Transfer& transfer = *static_cast<Transfer*>(user);
  HttpResponse& response = transfer.response;
  const absl::Span<std::byte> into = transfer.request.into;
  if (!into.empty() && response.status / 100 == 2) {
    if (size > into.size() - response.received) {
      transfer.too_long = true;
      return 0;
    }
    std::memcpy(into.data() + response.received, data, size);
    response.received += static_cast<int64_t>(size);
    return size;
  }
  if (static_cast<int64_t>(response.body.size() + size) > transfer.most_body_bytes) {
    transfer.too_long = true;
    return 0;
  }
  response.body.append(data, size);
  return size;
}

size_t OnRead(char* data, size_t, size_t size, void* user) {
  Transfer& transfer = *static_cast<Transfer*>(user);
  const auto part = transfer.request.body.subspan(transfer.sent, size);
  if (!part.empty()) std::memcpy(data, part.data(), part.size());
  transfer.sent += part.size();
  return part.size();
}

// A kept connection that the server had closed: curl sends the body again on a new one.
int OnSeek(void* user, curl_off_t offset, int origin) {
  Transfer& transfer = *static_cast<Transfer*>(user);
  if (origin != SEEK_SET || offset < 0 ||
      static_cast<size_t>(offset) > transfer.request.body.size()) {
    return CURL_SEEKFUNC_CANTSEEK;
  }
  transfer.sent = static_cast<size_t>(offset);
  return CURL_SEEKFUNC_OK;
}

absl::Status FromCurl(CURLcode code, const char* detail, absl::string_view url) {
  const std::string message = absl::StrCat(SplitUrl(url).authority, ": ",
                                           *detail != '\0' ? detail : curl_easy_strerror(code));
  switch (code) {
    case CURLE_UNSUPPORTED_PROTOCOL:
    case CURLE_URL_MALFORMAT:
      return absl::InvalidArgumentError(message);
    case CURLE_SSL_CONNECT_ERROR:
      // A connection may also break during the handshake.
      if (!absl::StrContains(message, "error:")) return absl::UnavailableError(message);
      return absl::FailedPreconditionError(absl::StrCat("TLS: ", message));
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CIPHER:
    case CURLE_SSL_ISSUER_ERROR:
    case CURLE_SSL_INVALIDCERTSTATUS:
    case CURLE_SSL_PINNEDPUBKEYNOTMATCH:
      return absl::FailedPreconditionError(absl::StrCat("TLS: ", message));
    case CURLE_OUT_OF_MEMORY:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::UnavailableError(message);
  }
}

}  // namespace

absl::string_view HttpResponse::Header(absl::string_view name) const {
  const auto found = headers.find(name);
  return found == headers.end() ? absl::string_view() : absl::string_view(found->second);
}

// curl's handles that no request uses. Each keeps its connections.
class HttpClient::Handles {
 public:
  Handles() {
    static const CURLcode initialised = curl_global_init(CURL_GLOBAL_DEFAULT);
    (void)initialised;
  }
  ~Handles() {
    for (CURL* handle : idle_) curl_easy_cleanup(handle);
  }
  CURL* Take() {
    std::lock_guard lock(mutex_);
    if (idle_.empty()) return curl_easy_init();
    CURL* const handle = idle_.back();
    idle_.pop_back();
    return handle;
  }
  void Give(CURL* handle) {
    curl_easy_reset(handle);  // keeps connections
    std::lock_guard lock(mutex_);
    if (idle_.size() < kMostIdle) {
      idle_.push_back(handle);
    } else {
      curl_easy_cleanup(handle);
    }
  }

 private:
  std::mutex mutex_;
  std::vector<CURL*> idle_;  // guarded by mutex_
};

HttpClient::HttpClient(HttpOptions options)
    : options_(options), handles_(std::make_unique<Handles>()) {}
HttpClient::~HttpClient() = default;

absl::Status HttpClient::Send(const HttpRequest& request, HttpResponse& response) {
  response = {};
  CURL* const curl = handles_->Take();
  if (curl == nullptr) return absl::ResourceExhaustedError("no memory for a connection");
  Transfer transfer{request, response, options_.most_body_bytes};
  char detail[CURL_ERROR_SIZE] = "";
  HeaderList headers;
  const auto add = [&](const std::string& line) {
    headers.reset(curl_slist_append(headers.release(), line.c_str()));
  };
  for (const auto& [name, value] : request.headers) add(absl::StrCat(name, ": ", value));
  // Uploads are sent at once: waiting for a 100 costs a round trip each.
  add("Expect:");
  curl_easy_setopt(curl, CURLOPT_URL, request.url.c_str());
  curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers.get());
  curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(curl, CURLOPT_PATH_AS_IS, 1L);
  curl_easy_setopt(curl, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
  curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(curl, CURLOPT_TCP_KEEPALIVE, 1L);
  curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, detail);
  curl_easy_setopt(curl, CURLOPT_USERAGENT, "pewter");
  curl_easy_setopt(curl, CURLOPT_BUFFERSIZE, kBufferBytes);
  curl_easy_setopt(curl, CURLOPT_UPLOAD_BUFFERSIZE, kBufferBytes);
  curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS,
                   static_cast<long>(absl::ToInt64Milliseconds(options_.connect_timeout)));
  if (request.patient) {
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS,
                     static_cast<long>(absl::ToInt64Milliseconds(options_.patience)));
  } else {
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT,
                     static_cast<long>(options_.least_bytes_per_second));
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME,
                     static_cast<long>(absl::ToInt64Seconds(options_.stall_timeout)));
  }
  if (const char* bundle = std::getenv("AWS_CA_BUNDLE"); bundle != nullptr && *bundle != '\0') {
    curl_easy_setopt(curl, CURLOPT_CAINFO, bundle);
  }
  curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, &OnHeader);
  curl_easy_setopt(curl, CURLOPT_HEADERDATA, &transfer);
  curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, &OnBody);
  curl_easy_setopt(curl, CURLOPT_WRITEDATA, &transfer);
  if (request.method == "HEAD") {
    curl_easy_setopt(curl, CURLOPT_NOBODY, 1L);
  } else if (request.method == "PUT" || request.method == "POST") {
    curl_easy_setopt(curl, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request.method.c_str());
    curl_easy_setopt(curl, CURLOPT_INFILESIZE_LARGE, static_cast<curl_off_t>(request.body.size()));
    curl_easy_setopt(curl, CURLOPT_READFUNCTION, &OnRead);
    curl_easy_setopt(curl, CURLOPT_READDATA, &transfer);
    curl_easy_setopt(curl, CURLOPT_SEEKFUNCTION, &OnSeek);
    curl_easy_setopt(curl, CURLOPT_SEEKDATA, &transfer);
  } else if (request.method != "GET") {
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request.method.c_str());
  }
  const CURLcode code = curl_easy_perform(curl);
  handles_->Give(curl);
  if (transfer.too_long) {
    return absl::DataLossError(
        absl::StrCat(SplitUrl(request.url).authority, ": sent more bytes than were asked for"));
  }
  return code == CURLE_OK ? absl::OkStatus() : FromCurl(code, detail, request.url);
}

UrlParts SplitUrl(absl::string_view url) {
  UrlParts parts;
  const size_t colon = url.find("://");
  if (colon == absl::string_view::npos) return parts;
  parts.scheme = absl::AsciiStrToLower(url.substr(0, colon));
  if (parts.scheme != "http" && parts.scheme != "https") return parts;
  url.remove_prefix(colon + 3);
  const size_t slash = url.find_first_of("/?");
  absl::string_view authority = url.substr(0, slash);
  parts.path = slash == absl::string_view::npos ? "" : std::string(url.substr(slash));
  if (absl::StrContains(authority, '@')) return parts;  // credentials do not belong into a URL
  absl::string_view host = authority;
  // An IPv6 address has colons in its brackets.
  const size_t bracket = host.rfind(']');
  const size_t port = host.find(':', bracket == absl::string_view::npos ? 0 : bracket);
  if (port != absl::string_view::npos) {
    const absl::string_view number = host.substr(port + 1);
    host = host.substr(0, port);
    if (number == (parts.scheme == "http" ? "80" : "443")) authority = host;
  }
  parts.host = absl::AsciiStrToLower(host);
  parts.authority = absl::AsciiStrToLower(authority);
  return parts;
}

std::string PercentEncode(absl::string_view text, bool keep_slash) {
  std::string encoded;
  for (const char c : text) {
    if (absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.' || c == '~' ||
        (keep_slash && c == '/')) {
      encoded.push_back(c);
    } else {
      absl::StrAppend(&encoded, "%",
                      absl::AsciiStrToUpper(absl::BytesToHexString(absl::string_view(&c, 1))));
    }
  }
  return encoded;
}

std::string PercentDecode(absl::string_view text) {
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && absl::ascii_isxdigit(text[i + 1]) &&
        absl::ascii_isxdigit(text[i + 2])) {
      decoded += absl::HexStringToBytes(text.substr(i + 1, 2));
      i += 2;
    } else {
      decoded.push_back(text[i]);
    }
  }
  return decoded;
}

}  // namespace pewter
