#include "store/s3_store.h"

#include <algorithm>
#include <condition_variable>
#include <latch>
#include <map>
#include <mutex>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "base/units.h"
#include "store/object_key.h"
#include "store/read_ahead.h"

namespace pewter {
namespace {

// Larger reads are split: one connection seldom fills a link.
constexpr int64_t kSplitBytes = int64_t{8} << 20;
// Parts of one writer that are under way while the next one is filled.
constexpr int kMostPartsInFlight = 4;
constexpr int64_t kMostNewBytes = int64_t{256} << 20;
constexpr char kMark[] = "x-amz-meta-pewter-write";

std::string NewMark() {
  absl::BitGen random;
  return absl::StrFormat("%016x", absl::Uniform<uint64_t>(random));
}

// As S3 writes it: base64 of the four bytes, the highest first.
std::string Crc32cHeader(absl::Span<const std::byte> bytes) {
  const uint32_t crc = Crc32c(bytes);
  const char big_endian[] = {static_cast<char>(crc >> 24), static_cast<char>(crc >> 16),
                             static_cast<char>(crc >> 8), static_cast<char>(crc)};
  return absl::Base64Escape({big_endian, sizeof(big_endian)});
}

absl::StatusOr<ObjectStat> StatOf(const HttpResponse& response) {
  ObjectStat stat{.etag = BareEtag(response.Header("etag"))};
  if (!absl::SimpleAtoi(response.Header("content-length"), &stat.size) || stat.size < 0) {
    return absl::DataLossError("the store does not say how large the object is");
  }
  return stat;
}

// Fills `into` from `offset` on, of that version of the object when one is given. Its ETag.
absl::StatusOr<std::string> ReadRange(S3Client& client, S3Request request,
                                      const std::string& version, int64_t offset,
                                      absl::Span<std::byte> into) {
  const std::string name = absl::StrCat("s3://", request.bucket, "/", request.key);
  request.into = into;
  request.offset = offset;
  request.if_match = version;
  S3Reply reply;
  const absl::Status status = client.Send(std::move(request), reply);
  if (reply.http.status == 412 || (!version.empty() && reply.http.status == 404)) {
    return absl::FailedPreconditionError(absl::StrCat(name, " changed while it was being read"));
  }
  if (reply.http.status == 416) {
    return absl::DataLossError(absl::StrCat(name, " ends too early: ", into.size(),
                                            " bytes at offset ", offset, " are needed"));
  }
  RETURN_IF_ERROR(status);
  return BareEtag(reply.http.Header("etag"));
}

}  // namespace

// The ETag that each key is read with.
class S3Store::Versions {
 public:
  std::string Get(absl::string_view key) {
    std::lock_guard lock(mutex_);
    const auto found = etags_.find(key);
    return found == etags_.end() ? "" : found->second;
  }
  void Set(absl::string_view key, const std::string& etag) {
    std::lock_guard lock(mutex_);
    etags_[key] = etag;
  }
  // What another thread has read first counts.
  void SetFirst(absl::string_view key, const std::string& etag) {
    std::lock_guard lock(mutex_);
    etags_.try_emplace(key, etag);
  }
  void Forget(absl::string_view key) {
    std::lock_guard lock(mutex_);
    etags_.erase(key);
  }

 private:
  std::mutex mutex_;
  absl::flat_hash_map<std::string, std::string> etags_;  // guarded by mutex_
};

class S3Store::Writer final : public ObjectWriter {
 public:
  Writer(std::shared_ptr<S3Client> client, S3Request object, std::string key,
         std::shared_ptr<Versions> versions, int parts_in_flight)
      : client_(std::move(client)),
        object_(std::move(object)),
        key_(std::move(key)),
        versions_(std::move(versions)),
        parts_in_flight_(parts_in_flight) {}

  ~Writer() override {
    WaitForParts(0);
    if (upload_id_.empty() || committed_) return;
    S3Request request = object_;
    request.method = "DELETE";
    request.query = {{"uploadId", upload_id_}};
    S3Reply reply;
    client_->Send(std::move(request), reply).IgnoreError();  // `pewter store clean` finds it
  }

  absl::Status Append(absl::Span<const std::byte> bytes) override {
    RETURN_IF_ERROR(failure_);
    while (!bytes.empty()) {
      const int64_t room = kPartBytes - static_cast<int64_t>(filling_.size());
      const auto piece = bytes.subspan(0, room);
      if (filling_.capacity() < filling_.size() + piece.size()) {
        filling_.reserve(std::min<size_t>(
            kPartBytes, std::max(2 * filling_.capacity(), filling_.size() + piece.size())));
      }
      filling_.insert(filling_.end(), piece.begin(), piece.end());
      bytes.remove_prefix(piece.size());
      if (static_cast<int64_t>(filling_.size()) == kPartBytes) {
        if (absl::Status sent = SendPart(); !sent.ok()) return failure_ = sent;
      }
    }
    return absl::OkStatus();
  }

  absl::Status Commit() override {
    RETURN_IF_ERROR(failure_);
    failure_ = absl::FailedPreconditionError(absl::StrCat(Name(), " was committed already"));
    absl::Status status = upload_id_.empty() ? Put() : Complete();
    if (!status.ok()) return failure_ = status;
    committed_ = true;
    versions_->Forget(key_);
    return absl::OkStatus();
  }

 private:
  std::string Name() const { return absl::StrCat("s3://", object_.bucket, "/", object_.key); }

  absl::Status Put() {
    S3Request request = object_;
    request.method = "PUT";
    request.body = filling_;
    if (client_->options().checksums) {
      request.headers = {{"x-amz-checksum-crc32c", Crc32cHeader(filling_)}};
    }
    S3Reply reply;
    return client_->Send(std::move(request), reply);
  }

  absl::Status Begin() {
    AbortEarlierUploads();
    S3Request request = object_;
    request.method = "POST";
    request.query = {{"uploads", ""}};
    request.headers = {{kMark, mark_}};
    if (client_->options().checksums) {
      request.headers.emplace_back("x-amz-checksum-algorithm", "CRC32C");
    }
    S3Reply reply;
    RETURN_IF_ERROR(client_->Send(std::move(request), reply));
    absl::StatusOr<std::string> id = ParseUploadId(reply.http.body);
    if (!id.ok()) return Annotate(id.status(), Name());
    upload_id_ = *std::move(id);
    return absl::OkStatus();
  }

  // Best effort: what is left costs space, not correctness.
  void AbortEarlierUploads() {
    S3Request list = object_;
    list.method = "GET";
    list.key.clear();
    list.query = {{"uploads", ""}, {"prefix", object_.key}};
    S3Reply reply;
    if (!client_->Send(std::move(list), reply).ok()) return;
    const absl::StatusOr<S3UploadPage> page = ParseListUploads(reply.http.body);
    if (!page.ok()) return;
    for (const S3Upload& upload : page->uploads) {
      if (upload.key != object_.key) continue;
      S3Request request = object_;
      request.method = "DELETE";
      request.query = {{"uploadId", upload.id}};
      client_->Send(std::move(request), reply).IgnoreError();
    }
  }

  // The full part goes to a worker.
  absl::Status SendPart() {
    if (upload_id_.empty()) RETURN_IF_ERROR(Begin());
    const int number = static_cast<int>(parts_.size()) + 1;
    if (number > kMostParts) {
      return absl::ResourceExhaustedError(
          absl::StrCat(Name(), " is larger than ", FormatBytes(kMostParts * kPartBytes),
                       ", the most that one object takes; choose a smaller output.shard_size"));
    }
    WaitForParts(parts_in_flight_ - 1);
    std::vector<std::byte> next;
    {
      std::lock_guard lock(mutex_);
      RETURN_IF_ERROR(part_failure_);
      parts_.push_back({.number = number});
      ++in_flight_;
      if (!free_.empty()) {
        next = std::move(free_.back());
        free_.pop_back();
      }
    }
    next.clear();
    client_->workers().Run([this, number,
                            bytes = std::make_shared<std::vector<std::byte>>(std::exchange(
                                filling_, std::move(next)))] { UploadPart(number, *bytes); });
    return absl::OkStatus();
  }

  void UploadPart(int number, std::vector<std::byte>& bytes) {
    S3Request request = object_;
    request.method = "PUT";
    request.query = {{"partNumber", absl::StrCat(number)}, {"uploadId", upload_id_}};
    request.body = bytes;
    std::string crc;
    if (client_->options().checksums) {
      crc = Crc32cHeader(bytes);
      request.headers = {{"x-amz-checksum-crc32c", crc}};
    }
    S3Reply reply;
    absl::Status status = client_->Send(std::move(request), reply);
    if (absl::IsNotFound(status)) {
      status = absl::AbortedError(absl::StrCat(
          Name(), ": the upload was aborted; another run has begun to write the same object"));
    }
    std::string etag(reply.http.Header("etag"));
    if (status.ok() && etag.empty()) {
      status = absl::DataLossError(absl::StrCat(Name(), ": the store gave a part no ETag"));
    }
    if (status.ok()) status = Reach(Failpoint::kPartSent);
    std::lock_guard lock(mutex_);
    if (part_failure_.ok()) part_failure_ = status;
    parts_[number - 1].etag = std::move(etag);
    parts_[number - 1].crc32c = std::move(crc);
    free_.push_back(std::move(bytes));
    --in_flight_;
    changed_.notify_all();
  }

  void WaitForParts(int most) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return in_flight_ <= most; });
  }

  absl::Status Complete() {
    if (!filling_.empty()) RETURN_IF_ERROR(SendPart());
    WaitForParts(0);
    {
      std::lock_guard lock(mutex_);
      RETURN_IF_ERROR(part_failure_);
    }
    const std::string xml = CompleteUploadXml(parts_);
    S3Request request = object_;
    request.method = "POST";
    request.query = {{"uploadId", upload_id_}};
    request.headers = {{"Content-Type", "application/xml"}};
    request.body = {reinterpret_cast<const std::byte*>(xml.data()), xml.size()};
    request.patient = true;
    S3Reply reply;
    absl::Status status = client_->Send(std::move(request), reply);
    if (status.ok()) {
      if (auto answer = ParseCompleteUpload(reply.http.body); !answer.ok()) {
        status = Annotate(answer.status(), Name());
      }
    }
    // The upload is gone, or nobody knows: the object tells.
    if (!status.ok() && IsOurs()) return absl::OkStatus();
    return status;
  }

  bool IsOurs() {
    S3Request request = object_;
    request.method = "HEAD";
    S3Reply reply;
    return client_->Send(std::move(request), reply).ok() && reply.http.Header(kMark) == mark_;
  }

  const std::shared_ptr<S3Client> client_;
  const S3Request object_;
  const std::string key_;
  const std::shared_ptr<Versions> versions_;
  const int parts_in_flight_;
  const std::string mark_ = NewMark();
  absl::Status failure_;  // of the first failure: a damaged object is never committed
  std::vector<std::byte> filling_;
  std::string upload_id_;
  bool committed_ = false;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<S3Part> parts_;  // the last four guarded by mutex_ while parts are under way
  std::vector<std::vector<std::byte>> free_;
  absl::Status part_failure_;
  int in_flight_ = 0;
};

class S3Store::NewWriter final : public ObjectWriter {
 public:
  NewWriter(std::shared_ptr<S3Client> client, S3Request object, std::string key,
            std::shared_ptr<Versions> versions)
      : client_(std::move(client)),
        object_(std::move(object)),
        key_(std::move(key)),
        versions_(std::move(versions)) {}

  absl::Status Append(absl::Span<const std::byte> bytes) override {
    RETURN_IF_ERROR(failure_);
    if (static_cast<int64_t>(content_.size() + bytes.size()) > kMostNewBytes) {
      return failure_ = absl::ResourceExhaustedError(
                 absl::StrCat(Name(), " has more than ", FormatBytes(kMostNewBytes),
                              ", the most that is created on condition that it is new"));
    }
    content_.insert(content_.end(), bytes.begin(), bytes.end());
    return absl::OkStatus();
  }

  absl::Status Commit() override {
    RETURN_IF_ERROR(failure_);
    failure_ = absl::FailedPreconditionError(absl::StrCat(Name(), " was committed already"));
    const std::string mark = NewMark();
    S3Request request = object_;
    request.method = "PUT";
    request.body = content_;
    request.headers = {{"If-None-Match", "*"}, {kMark, mark}};
    if (client_->options().checksums) {
      request.headers.emplace_back("x-amz-checksum-crc32c", Crc32cHeader(content_));
    }
    S3Reply reply;
    const absl::Status status = client_->Send(std::move(request), reply);
    versions_->Forget(key_);
    if (status.ok()) return status;
    // It may be there by an earlier attempt of this very write, whose reply was lost.
    S3Request head = object_;
    head.method = "HEAD";
    S3Reply found;
    if (client_->Send(std::move(head), found).ok() && found.http.Header(kMark) == mark) {
      return absl::OkStatus();
    }
    if (reply.http.status == 412) {
      return failure_ = absl::AlreadyExistsError(absl::StrCat(Name(), " exists already"));
    }
    if (absl::IsUnimplemented(status)) {
      return failure_ = absl::UnimplementedError(
                 absl::StrCat(status.message(),
                              "; the store cannot create an object on condition that it is "
                              "new, which publishing a model needs: see pewter store check"));
    }
    return failure_ = status;
  }

 private:
  std::string Name() const { return absl::StrCat("s3://", object_.bucket, "/", object_.key); }

  const std::shared_ptr<S3Client> client_;
  const S3Request object_;
  const std::string key_;
  const std::shared_ptr<Versions> versions_;
  std::vector<std::byte> content_;
  absl::Status failure_;
};

absl::StatusOr<S3Store::Place> S3Store::Parse(absl::string_view uri) {
  absl::string_view rest = uri;
  absl::ConsumePrefix(&rest, "s3://");
  const size_t slash = rest.find('/');
  Place place{.bucket = std::string(rest.substr(0, slash))};
  absl::string_view prefix =
      slash == absl::string_view::npos ? absl::string_view() : rest.substr(slash + 1);
  absl::ConsumeSuffix(&prefix, "/");
  const bool good_bucket =
      place.bucket.size() >= 3 && place.bucket.size() <= 255 &&
      std::all_of(place.bucket.begin(), place.bucket.end(), [](unsigned char c) {
        return absl::ascii_isalnum(c) || c == '-' || c == '.' || c == '_';
      });
  if (!good_bucket || (!prefix.empty() && !ValidateKey(prefix).ok())) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", absl::Utf8SafeCHexEscape(uri), "\" is not s3://bucket/prefix"));
  }
  if (!prefix.empty()) place.prefix = absl::StrCat(prefix, "/");
  return place;
}

absl::StatusOr<std::shared_ptr<S3Client>> S3Store::Client() {
  ASSIGN_OR_RETURN(S3Options options, S3OptionsFrom(ProcessEnvironment()));
  // What the environment says may change between calls, in tests at least.
  const std::string identity = absl::StrCat(
      options.endpoint, " ", options.region, " ", options.path_style, " ", options.checksums, " ",
      options.environment("AWS_PROFILE"), " ", options.environment("AWS_ACCESS_KEY_ID"));
  static std::mutex mutex;
  static auto& clients = *new std::map<std::string, std::weak_ptr<S3Client>>;
  std::lock_guard lock(mutex);
  std::weak_ptr<S3Client>& shared = clients[identity];
  std::shared_ptr<S3Client> client = shared.lock();
  if (client == nullptr) {
    client = std::make_shared<S3Client>(std::move(options));
    shared = client;
  }
  return client;
}

absl::StatusOr<std::shared_ptr<ObjectStore>> S3Store::Open(absl::string_view uri) {
  ASSIGN_OR_RETURN(Place place, Parse(uri));
  ASSIGN_OR_RETURN(std::shared_ptr<S3Client> client, Client());
  return std::make_shared<S3Store>(std::move(client), std::move(place));
}

S3Store::S3Store(std::shared_ptr<S3Client> client, Place place)
    : client_(std::move(client)),
      place_(std::move(place)),
      versions_(std::make_shared<Versions>()),
      parts_in_flight_(kMostPartsInFlight) {}
S3Store::~S3Store() = default;

void S3Store::LimitWriters(int64_t bytes) {
  parts_in_flight_ =
      static_cast<int>(std::clamp<int64_t>(bytes / kPartBytes - 1, 1, kMostPartsInFlight));
}

std::string S3Store::Describe(absl::string_view key) const {
  return absl::StrCat("s3://", place_.bucket, "/", place_.prefix, key);
}

S3Request S3Store::Request(absl::string_view method, absl::string_view key) const {
  return {.method = std::string(method),
          .bucket = place_.bucket,
          .key = absl::StrCat(place_.prefix, key)};
}

absl::StatusOr<ObjectStat> S3Store::Stat(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  S3Reply reply;
  RETURN_IF_ERROR(client_->Send(Request("HEAD", key), reply));
  absl::StatusOr<ObjectStat> stat = StatOf(reply.http);
  if (!stat.ok()) return Annotate(stat.status(), Describe(key));
  versions_->Set(key, stat->etag);
  return stat;
}

absl::Status S3Store::ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) {
  RETURN_IF_ERROR(ValidateKey(key));
  if (offset < 0) {
    return absl::InvalidArgumentError(absl::StrCat("negative offset ", offset, " in ", key));
  }
  if (out.empty()) return absl::OkStatus();
  const std::string version = versions_->Get(key);
  const auto read = [&](int64_t at, absl::Span<std::byte> into) -> absl::Status {
    ASSIGN_OR_RETURN(const std::string etag,
                     ReadRange(*client_, Request("GET", key), version, at, into));
    if (version.empty()) versions_->SetFirst(key, etag);
    return absl::OkStatus();
  };
  const int64_t size = static_cast<int64_t>(out.size());
  if (size <= kSplitBytes) {
    ASSIGN_OR_RETURN(const bool announced,
                     ReadAhead::Shared().Read(VersionName(key, version), offset, out));
    return announced ? absl::OkStatus() : read(offset, out);
  }
  const int pieces = static_cast<int>((size + kSplitBytes - 1) / kSplitBytes);
  std::vector<absl::Status> statuses(pieces);
  std::latch left(pieces);
  for (int i = 0; i < pieces; ++i) {
    client_->workers().Run([&, i] {
      const int64_t at = i * kSplitBytes;
      statuses[i] = read(offset + at, out.subspan(at, kSplitBytes));
      left.count_down();
    });
  }
  left.wait();
  for (absl::Status& status : statuses) RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

std::string S3Store::VersionName(absl::string_view key, absl::string_view version) const {
  return absl::StrCat(client_->options().endpoint, " ", Describe(key), " ", version);
}

std::shared_ptr<void> S3Store::WillRead(absl::string_view key, int64_t offset, int64_t bytes) {
  const std::string version = versions_->Get(key);
  if (version.empty()) return nullptr;
  return ReadAhead::Shared().Announce(
      VersionName(key, version), offset, bytes,
      [client = client_, request = Request("GET", key), version](int64_t at,
                                                                 absl::Span<std::byte> into) {
        return ReadRange(*client, request, version, at, into).status();
      });
}

absl::StatusOr<std::vector<ObjectEntry>> S3Store::List(absl::string_view prefix) {
  if (!prefix.empty()) {
    RETURN_IF_ERROR(
        ValidateKey(absl::EndsWith(prefix, "/") ? prefix.substr(0, prefix.size() - 1) : prefix));
  }
  std::vector<ObjectEntry> entries;
  std::string next;
  do {
    S3Request request = Request("GET", "");
    request.key.clear();
    request.query = {{"list-type", "2"},
                     {"encoding-type", "url"},
                     {"prefix", absl::StrCat(place_.prefix, prefix)}};
    if (!next.empty()) request.query.emplace_back("continuation-token", next);
    S3Reply reply;
    RETURN_IF_ERROR(client_->Send(std::move(request), reply));
    absl::StatusOr<S3ObjectPage> page = ParseListObjects(reply.http.body);
    if (!page.ok()) return Annotate(page.status(), Describe(prefix));
    for (S3Object& object : page->objects) {
      absl::string_view key = object.key;
      // What other tools leave as the mark of a folder is none of ours.
      if (!absl::ConsumePrefix(&key, place_.prefix) || !ValidateKey(key).ok()) continue;
      entries.push_back({std::string(key), {.size = object.size, .etag = std::move(object.etag)}});
    }
    if (!page->next.empty() && page->next == next) {
      return absl::DataLossError(absl::StrCat(Describe(prefix), ": a listing that does not end"));
    }
    next = std::move(page->next);
  } while (!next.empty());
  std::sort(entries.begin(), entries.end(),
            [](const ObjectEntry& a, const ObjectEntry& b) { return a.key < b.key; });
  return entries;
}

absl::Status S3Store::Remove(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  S3Reply reply;
  const absl::Status status = client_->Send(Request("DELETE", key), reply);
  versions_->Forget(key);
  return reply.error.code == "NoSuchKey" ? absl::OkStatus() : status;
}

absl::StatusOr<std::unique_ptr<ObjectWriter>> S3Store::Create(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  return std::make_unique<Writer>(client_, Request("PUT", key), std::string(key), versions_,
                                  parts_in_flight_);
}

absl::StatusOr<std::unique_ptr<ObjectWriter>> S3Store::CreateNew(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  return std::make_unique<NewWriter>(client_, Request("PUT", key), std::string(key), versions_);
}

absl::StatusOr<int64_t> S3Store::AbortUploads(absl::Time before) {
  int64_t aborted = 0;
  S3UploadPage page;
  do {
    S3Request request = Request("GET", "");
    request.key.clear();
    request.query = {{"uploads", ""}, {"prefix", place_.prefix}};
    if (!page.next_key.empty()) {
      request.query.emplace_back("key-marker", page.next_key);
      request.query.emplace_back("upload-id-marker", page.next_id);
    }
    S3Reply reply;
    RETURN_IF_ERROR(client_->Send(std::move(request), reply));
    ASSIGN_OR_RETURN(page, ParseListUploads(reply.http.body));
    for (const S3Upload& upload : page.uploads) {
      if (upload.initiated >= before) continue;
      S3Request abort = Request("DELETE", "");
      abort.key = upload.key;
      abort.query = {{"uploadId", upload.id}};
      RETURN_IF_ERROR(client_->Send(std::move(abort), reply));
      ++aborted;
    }
  } while (!page.next_key.empty());
  return aborted;
}

}  // namespace pewter
