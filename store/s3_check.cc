#include "store/s3_check.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/random/random.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"

namespace pewter {
namespace {

constexpr int64_t kLeastPart = int64_t{5} << 20;  // of a multipart upload, the last one excepted
constexpr char kContent[] = "0123456789";
constexpr char kWrongCrc[] = "AAAAAA==";  // of nothing that is written here

absl::Span<const std::byte> AsBytes(absl::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

class Check {
 public:
  Check(S3Client& client, const S3Store::Place& place) : client_(client), place_(place) {
    absl::BitGen random;
    place_.prefix += absl::StrFormat(".pewter-check-%016x/", absl::Uniform<uint64_t>(random));
  }

  absl::StatusOr<std::vector<StoreFinding>> Run() {
    const absl::Cleanup clean = [this] {
      for (const char* key : {"a", "new", "crc", "parts"}) (void)Send("DELETE", key);
    };
    RETURN_IF_ERROR(Send("PUT", "a", kContent));
    Add("write", true, true, "");
    RETURN_IF_ERROR(Ranges());
    Listing();
    ConditionalCreate();
    Checksums();
    Multipart();
    const absl::Status removed = Send("DELETE", "a");
    Add("remove", removed.ok(), true, std::string(removed.message()));
    return std::move(findings_);
  }

 private:
  void Add(std::string feature, bool supported, bool needed, std::string detail) {
    findings_.push_back({std::move(feature), supported, needed, std::move(detail)});
  }

  S3Request Request(absl::string_view method, absl::string_view key) const {
    return {.method = std::string(method),
            .bucket = place_.bucket,
            .key = absl::StrCat(place_.prefix, key)};
  }

  absl::Status Send(absl::string_view method, absl::string_view key, absl::string_view body = "",
                    std::vector<std::pair<std::string, std::string>> headers = {},
                    std::vector<std::pair<std::string, std::string>> query = {}) {
    S3Request request = Request(method, key);
    request.body = AsBytes(body);
    request.headers = std::move(headers);
    request.query = std::move(query);
    return client_.Send(std::move(request), reply_);
  }

  absl::Status ReadFour(const std::string& version) {
    char four[4] = {};
    S3Request request = Request("GET", "a");
    request.into = {reinterpret_cast<std::byte*>(four), sizeof(four)};
    request.offset = 3;
    request.if_match = version;
    RETURN_IF_ERROR(client_.Send(std::move(request), reply_));
    if (absl::string_view(four, sizeof(four)) == "3456") return absl::OkStatus();
    return absl::DataLossError("other bytes came back than were written");
  }

  absl::Status Ranges() {
    RETURN_IF_ERROR(Send("HEAD", "a"));
    const std::string etag = BareEtag(reply_.http.Header("etag"));
    Add("ETag", !etag.empty(), true,
        etag.empty() ? "objects have none: a change during a merge is not noticed" : "");
    const absl::Status read = ReadFour("");
    Add("ranged read", read.ok(), true, std::string(read.message()));
    if (!read.ok()) return absl::OkStatus();
    // An object of another version than the one that is there.
    const absl::Status other = ReadFour("00000000000000000000000000000000");
    const bool refused = reply_.http.status == 412;
    Add("If-Match of ranged reads", refused && !other.ok(), false,
        refused ? ""
                : "ignored; pewter compares the ETag of every answer, which is as good as long "
                  "as answers have one");
    return absl::OkStatus();
  }

  // -1 on error.
  int CountListed() {
    S3Store store(std::shared_ptr<S3Client>(std::shared_ptr<void>(), &client_), place_);
    const auto entries = store.List("");
    return entries.ok() ? static_cast<int>(entries->size()) : -1;
  }

  void Listing() {
    bool after_write = true, after_remove = true;
    constexpr int kRounds = 5;
    for (int i = 0; i < kRounds; ++i) {
      if (!Send("PUT", "new", kContent).ok()) after_write = false;
      after_write = after_write && CountListed() == 2;
      if (!Send("DELETE", "new").ok()) after_remove = false;
      after_remove = after_remove && CountListed() == 1;
    }
    Add("list", CountListed() >= 0, true, "");
    Add("consistent listing", after_write && after_remove, true,
        after_write && after_remove
            ? ""
            : absl::StrCat("an object that was just ", after_write ? "removed" : "written",
                           after_write ? " is listed" : " is not listed",
                           "; a merge may then not see a folder as it is"));
  }

  void ConditionalCreate() {
    const std::vector<std::pair<std::string, std::string>> only_new = {{"If-None-Match", "*"}};
    const absl::Status first = Send("PUT", "new", kContent, only_new);
    if (!first.ok()) {
      Add("conditional create", false, true,
          absl::StrCat("refused: ", first.message(), "; pewter cannot publish here"));
      return;
    }
    const absl::Status second = Send("PUT", "new", "other", only_new);
    Add("conditional create", reply_.http.status == 412, true,
        reply_.http.status == 412
            ? ""
            : absl::StrCat("the header is ignored: a second writer ",
                           second.ok() ? "replaces the first" : second.message(),
                           "; let one job at a time write to a place"));
  }

  void Checksums() {
    S3Request request = Request("PUT", "crc");
    request.body = AsBytes(kContent);
    request.headers = {{"x-amz-checksum-crc32c", kWrongCrc}};
    request.once = true;
    const absl::Status wrong = client_.Send(std::move(request), reply_);
    Add("CRC32C of writes", !wrong.ok(), false,
        wrong.ok() ? "not checked: wrong bytes are stored; without TLS the SHA-256 of the "
                     "signature protects them"
                   : "");
  }

  void Multipart() {
    const auto fail = [this](const absl::Status& status) {
      Add("multipart upload", false, true, std::string(status.message()));
    };
    S3Store store(std::shared_ptr<S3Client>(std::shared_ptr<void>(), &client_), place_);
    if (absl::Status begun = Send("POST", "parts", "", {}, {{"uploads", ""}}); !begun.ok()) {
      return fail(begun);
    }
    const auto id = ParseUploadId(reply_.http.body);
    if (!id.ok()) return fail(id.status());
    const auto aborted = store.AbortUploads(absl::InfiniteFuture());
    Add("list and abort uploads", aborted.ok() && *aborted == 1, false,
        aborted.ok() && *aborted == 1
            ? ""
            : "what a killed merge has begun to upload stays; let a lifecycle rule remove it");
    if (!aborted.ok() || *aborted != 1) (void)Send("DELETE", "parts", "", {}, {{"uploadId", *id}});

    std::string content(kLeastPart + 10, 'x');
    std::vector<S3Part> parts;
    if (absl::Status begun = Send("POST", "parts", "", {}, {{"uploads", ""}}); !begun.ok()) {
      return fail(begun);
    }
    const auto upload = ParseUploadId(reply_.http.body);
    if (!upload.ok()) return fail(upload.status());
    for (const auto& [offset, size] :
         {std::pair<int64_t, int64_t>{0, kLeastPart}, {kLeastPart, 10}}) {
      const std::string number = absl::StrCat(parts.size() + 1);
      const absl::Status put = Send("PUT", "parts", absl::string_view(content).substr(offset, size),
                                    {}, {{"partNumber", number}, {"uploadId", *upload}});
      if (!put.ok()) return fail(put);
      parts.push_back({.number = static_cast<int>(parts.size()) + 1,
                       .etag = std::string(reply_.http.Header("etag"))});
    }
    const bool visible = Send("HEAD", "parts").ok();
    const std::string xml = CompleteUploadXml(parts);
    absl::Status done = Send("POST", "parts", xml, {}, {{"uploadId", *upload}});
    if (done.ok()) done = Send("HEAD", "parts");
    const bool whole =
        done.ok() && reply_.http.Header("content-length") == absl::StrCat(content.size());
    Add("multipart upload", whole && !visible, true,
        visible      ? "an upload is visible before it is complete"
        : !done.ok() ? std::string(done.message())
        : whole      ? ""
                     : "the object has another size than its parts");
  }

  S3Client& client_;
  S3Store::Place place_;
  S3Reply reply_;
  std::vector<StoreFinding> findings_;
};

}  // namespace

absl::StatusOr<std::vector<StoreFinding>> CheckS3Store(S3Client& client,
                                                       const S3Store::Place& place) {
  return Check(client, place).Run();
}

}  // namespace pewter
