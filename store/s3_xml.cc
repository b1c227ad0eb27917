#include "store/s3_xml.h"

#include <pugixml.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "store/http.h"

namespace pewter {
namespace {

// "s3:Key" is Key.
absl::string_view LocalName(const pugi::xml_node& node) {
  const absl::string_view name = node.name();
  const size_t colon = name.rfind(':');
  return colon == absl::string_view::npos ? name : name.substr(colon + 1);
}

pugi::xml_node Child(const pugi::xml_node& node, absl::string_view name) {
  return node.find_child([&](const pugi::xml_node& child) { return LocalName(child) == name; });
}

std::string Text(const pugi::xml_node& node, absl::string_view name) {
  return Child(node, name).child_value();
}

// Calls fn for each child of that name.
template <class Fn>
void ForEach(const pugi::xml_node& node, absl::string_view name, Fn fn) {
  for (const pugi::xml_node& child : node.children()) {
    if (LocalName(child) == name) fn(child);
  }
}

// The root element, which must have that name.
absl::StatusOr<pugi::xml_node> Root(pugi::xml_document& document, absl::string_view text,
                                    absl::string_view name) {
  const pugi::xml_parse_result parsed = document.load_buffer(text.data(), text.size());
  if (!parsed) return absl::DataLossError(absl::StrCat("bad XML: ", parsed.description()));
  const pugi::xml_node root = document.document_element();
  if (LocalName(root) != name) {
    return absl::DataLossError(absl::StrCat("the answer is no ", name));
  }
  return root;
}

// Keys are asked for percent-encoded, since XML cannot hold every character; stores that do not
// know that leave them as they are, and say so by saying nothing.
std::string Key(const pugi::xml_node& root, std::string key) {
  return Text(root, "EncodingType") == "url" ? PercentDecode(key) : key;
}

}  // namespace

S3Error ParseS3Error(absl::string_view text) {
  pugi::xml_document document;
  if (!document.load_buffer(text.data(), text.size())) return {};
  pugi::xml_node root = document.document_element();
  // STS wraps it.
  if (LocalName(root) == "ErrorResponse") root = Child(root, "Error");
  if (LocalName(root) != "Error") return {};
  return {.code = Text(root, "Code"), .message = Text(root, "Message")};
}

absl::StatusOr<S3ObjectPage> ParseListObjects(absl::string_view text) {
  pugi::xml_document document;
  ASSIGN_OR_RETURN(const pugi::xml_node root, Root(document, text, "ListBucketResult"));
  S3ObjectPage page;
  bool good = true;
  ForEach(root, "Contents", [&](const pugi::xml_node& node) {
    S3Object object{.key = Key(root, Text(node, "Key")), .etag = BareEtag(Text(node, "ETag"))};
    good = good && !object.key.empty() && absl::SimpleAtoi(Text(node, "Size"), &object.size) &&
           object.size >= 0;
    page.objects.push_back(std::move(object));
  });
  if (!good) return absl::DataLossError("a listing has an object without key or size");
  if (Text(root, "IsTruncated") == "true") {
    page.next = Text(root, "NextContinuationToken");
    if (page.next.empty()) {
      return absl::DataLossError("a listing is cut off and does not say where it goes on");
    }
  }
  return page;
}

absl::StatusOr<S3UploadPage> ParseListUploads(absl::string_view text) {
  pugi::xml_document document;
  ASSIGN_OR_RETURN(const pugi::xml_node root, Root(document, text, "ListMultipartUploadsResult"));
  S3UploadPage page;
  ForEach(root, "Upload", [&](const pugi::xml_node& node) {
    S3Upload upload{.key = Key(root, Text(node, "Key")), .id = Text(node, "UploadId")};
    absl::Time initiated;
    if (absl::ParseTime(absl::RFC3339_full, Text(node, "Initiated"), &initiated, nullptr)) {
      upload.initiated = initiated;
    }
    if (!upload.key.empty() && !upload.id.empty()) page.uploads.push_back(std::move(upload));
  });
  if (Text(root, "IsTruncated") == "true") {
    page.next_key = Key(root, Text(root, "NextKeyMarker"));
    page.next_id = Text(root, "NextUploadIdMarker");
    if (page.next_key.empty()) {
      return absl::DataLossError("a listing is cut off and does not say where it goes on");
    }
  }
  return page;
}

absl::StatusOr<std::string> ParseUploadId(absl::string_view text) {
  pugi::xml_document document;
  ASSIGN_OR_RETURN(const pugi::xml_node root,
                   Root(document, text, "InitiateMultipartUploadResult"));
  std::string id = Text(root, "UploadId");
  if (id.empty()) return absl::DataLossError("the answer has no UploadId");
  return id;
}

std::string CompleteUploadXml(absl::Span<const S3Part> parts) {
  pugi::xml_document document;
  pugi::xml_node root = document.append_child("CompleteMultipartUpload");
  root.append_attribute("xmlns") = "http://s3.amazonaws.com/doc/2006-03-01/";
  for (const S3Part& part : parts) {
    pugi::xml_node node = root.append_child("Part");
    node.append_child("PartNumber").text() = part.number;
    node.append_child("ETag").text() = part.etag.c_str();
    if (!part.crc32c.empty()) node.append_child("ChecksumCRC32C").text() = part.crc32c.c_str();
  }
  std::ostringstream out;
  document.save(out, "", pugi::format_raw);
  return out.str();
}

absl::StatusOr<S3Error> ParseCompleteUpload(absl::string_view text) {
  pugi::xml_document document;
  if (Root(document, text, "CompleteMultipartUploadResult").ok()) return S3Error{};
  S3Error error = ParseS3Error(text);
  if (error.code.empty()) {
    return absl::DataLossError("the answer is no CompleteMultipartUploadResult");
  }
  return error;
}

absl::StatusOr<AwsCredentials> ParseAssumedRole(absl::string_view text) {
  pugi::xml_document document;
  ASSIGN_OR_RETURN(const pugi::xml_node root,
                   Root(document, text, "AssumeRoleWithWebIdentityResponse"));
  const pugi::xml_node node = Child(Child(root, "AssumeRoleWithWebIdentityResult"), "Credentials");
  AwsCredentials credentials{.access_key = Text(node, "AccessKeyId"),
                             .secret_key = Secret(Text(node, "SecretAccessKey")),
                             .session_token = Secret(Text(node, "SessionToken"))};
  if (credentials.access_key.empty() || credentials.secret_key.empty() ||
      !absl::ParseTime(absl::RFC3339_full, Text(node, "Expiration"), &credentials.expires,
                       nullptr)) {
    return absl::DataLossError("the answer has no complete credentials");
  }
  return credentials;
}

std::string BareEtag(absl::string_view etag) {
  absl::ConsumePrefix(&etag, "W/");
  absl::ConsumePrefix(&etag, "\"");
  absl::ConsumeSuffix(&etag, "\"");
  return std::string(etag);
}

}  // namespace pewter
