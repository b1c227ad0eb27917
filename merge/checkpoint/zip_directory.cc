#include "merge/checkpoint/zip_directory.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

constexpr absl::string_view kLocalMagic = "PK\x03\x04";
constexpr absl::string_view kRecordMagic = "PK\x01\x02";
constexpr absl::string_view kEndMagic = "PK\x05\x06";
constexpr absl::string_view kEnd64Magic = "PK\x06\x06";
constexpr absl::string_view kLocatorMagic = "PK\x06\x07";
constexpr int64_t kLocalBytes = 30;
constexpr int64_t kRecordBytes = 46;
constexpr int64_t kEndBytes = 22;
constexpr int64_t kEnd64Bytes = 56;
constexpr int64_t kLocatorBytes = 20;
constexpr uint64_t kMax16 = 0xffff;
constexpr uint64_t kMax32 = 0xffffffff;  // "see the ZIP64 field"
constexpr uint16_t kZip64Field = 1;
constexpr uint16_t kEncrypted = 1;
constexpr uint16_t kSizesFollow = 8;  // the local header does not know them
constexpr int64_t kMaxDirectoryBytes = int64_t{64} << 20;
constexpr size_t kMaxNameBytes = 1024;

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("not a valid file of torch.save: ", what));
}
absl::Status Damaged() { return Malformed("its ZIP directory is damaged"); }

// Any bytes, for a message.
std::string Shown(absl::string_view name) {
  return absl::StrCat("entry \"", absl::CHexEscape(name.substr(0, 200)), "\"");
}

// Little endian, of 2, 4 or 8 bytes.
uint64_t Number(absl::string_view text, size_t at, int bytes) {
  uint64_t number = 0;
  for (int i = bytes - 1; i >= 0; --i) {
    number = number << 8 | static_cast<unsigned char>(text[at + i]);
  }
  return number;
}

class DirectoryReader {
 public:
  DirectoryReader(ObjectStore& store, absl::string_view key, int64_t size)
      : store_(store), key_(key), size_(size) {}

  absl::StatusOr<std::vector<ZipEntry>> Read() {
    RETURN_IF_ERROR(FindDirectory());
    std::string directory;
    RETURN_IF_ERROR(Load(offset_, bytes_, directory));
    std::vector<ZipEntry> entries;
    absl::string_view rest = directory;
    while (!rest.empty()) {
      ASSIGN_OR_RETURN(Record record, TakeRecord(rest));
      RETURN_IF_ERROR(PlaceEntry(record));
      entries.push_back(std::move(record.entry));
    }
    if (entries.size() != count_) return Damaged();
    absl::flat_hash_set<absl::string_view> names;
    for (const ZipEntry& entry : entries) {
      if (!names.insert(entry.name).second) {
        return Malformed(absl::StrCat(Shown(entry.name), " is there twice"));
      }
    }
    return entries;
  }

 private:
  struct Record {
    ZipEntry entry;
    uint64_t header = 0;  // where the local header is
    uint16_t flags = 0;
    uint16_t method = 0;
  };

  absl::Status Load(int64_t offset, int64_t bytes, std::string& text) {
    text.resize(bytes);
    return store_.ReadInto(key_, offset,
                           absl::MakeSpan(reinterpret_cast<std::byte*>(text.data()), text.size()));
  }

  // The end record says where the directory is; the ZIP64 one says what does not fit there.
  absl::Status FindDirectory() {
    const int64_t tail = std::min<int64_t>(size_, kLocatorBytes + kEndBytes + kMax16);
    std::string text;
    RETURN_IF_ERROR(Load(size_ - tail, tail, text));
    size_t at = text.size();
    do {  // its comment, which nearly always is empty, ends the file
      at = at == 0 ? absl::string_view::npos : absl::string_view(text).rfind(kEndMagic, at - 1);
      if (at == absl::string_view::npos) {
        return Malformed("its ZIP directory is missing: truncated?");
      }
    } while (at + kEndBytes > text.size() ||
             Number(text, at + 20, 2) != text.size() - at - kEndBytes);
    count_ = Number(text, at + 10, 2);
    uint64_t bytes = Number(text, at + 12, 4);
    uint64_t offset = Number(text, at + 16, 4);
    bool one_file = Number(text, at + 4, 2) == 0 && Number(text, at + 6, 2) == 0;
    uint64_t end = static_cast<uint64_t>(size_ - tail) + at;  // of the directory

    if (at >= kLocatorBytes &&
        absl::StartsWith(absl::string_view(text).substr(at - kLocatorBytes), kLocatorMagic)) {
      const uint64_t end64 = Number(text, at - kLocatorBytes + 8, 8);
      if (end < kLocatorBytes + kEnd64Bytes || end64 > end - kLocatorBytes - kEnd64Bytes) {
        return Damaged();
      }
      std::string record;
      RETURN_IF_ERROR(Load(static_cast<int64_t>(end64), kEnd64Bytes, record));
      if (!absl::StartsWith(record, kEnd64Magic)) return Damaged();
      const auto replace = [](uint64_t& value, uint64_t most, uint64_t wide) {
        if (value != most && value != wide) return false;
        value = wide;
        return true;
      };
      if (!replace(count_, kMax16, Number(record, 32, 8)) ||
          !replace(bytes, kMax32, Number(record, 40, 8)) ||
          !replace(offset, kMax32, Number(record, 48, 8))) {
        return Damaged();
      }
      one_file = Number(record, 16, 4) == 0 && Number(record, 20, 4) == 0;
      end = end64;
    }
    if (!one_file) {
      return absl::FailedPreconditionError("it is a part of an archive of several files");
    }
    if (bytes > end || offset != end - bytes) {
      return Malformed("its ZIP directory is not where it should be");
    }
    if (bytes > kMaxDirectoryBytes) return Malformed("its ZIP directory is too large");
    offset_ = static_cast<int64_t>(offset);
    bytes_ = static_cast<int64_t>(bytes);
    return absl::OkStatus();
  }

  // Takes one record off the front of the directory.
  absl::StatusOr<Record> TakeRecord(absl::string_view& rest) const {
    if (rest.size() < kRecordBytes || !absl::StartsWith(rest, kRecordMagic)) return Damaged();
    const size_t name = Number(rest, 28, 2), extra = Number(rest, 30, 2);
    const size_t whole = kRecordBytes + name + extra + Number(rest, 32, 2);
    if (whole > rest.size()) return Damaged();
    if (name > kMaxNameBytes) return Malformed("the name of an entry is too long");
    Record record{.entry = {.name = std::string(rest.substr(kRecordBytes, name)),
                            .crc32 = static_cast<uint32_t>(Number(rest, 16, 4))},
                  .header = Number(rest, 42, 4),
                  .flags = static_cast<uint16_t>(Number(rest, 8, 2)),
                  .method = static_cast<uint16_t>(Number(rest, 10, 2))};
    uint64_t stored = Number(rest, 20, 4), unpacked = Number(rest, 24, 4);
    RETURN_IF_ERROR(ReadZip64Field(rest.substr(kRecordBytes + name, extra),
                                   {&unpacked, &stored, &record.header}));
    const auto fail = [&](absl::string_view what) {
      return Malformed(absl::StrCat(Shown(record.entry.name), " ", what));
    };
    if ((record.flags & kEncrypted) != 0) {
      return absl::FailedPreconditionError(absl::StrCat(Shown(record.entry.name), " is encrypted"));
    }
    record.entry.compressed = record.method != 0;
    if (!record.entry.compressed && stored != unpacked) return fail("has two sizes");
    if (stored > static_cast<uint64_t>(size_)) {
      return fail("ends after the end of the file: truncated");
    }
    record.entry.bytes = static_cast<int64_t>(stored);
    rest.remove_prefix(whole);
    return record;
  }

  // Replaces the numbers that did not fit.
  static absl::Status ReadZip64Field(absl::string_view extra,
                                     std::initializer_list<uint64_t*> numbers) {
    absl::string_view field;
    while (extra.size() >= 4) {
      const uint64_t id = Number(extra, 0, 2), bytes = Number(extra, 2, 2);
      if (bytes > extra.size() - 4) return Damaged();
      if (id == kZip64Field) field = extra.substr(4, bytes);
      extra.remove_prefix(4 + bytes);
    }
    for (uint64_t* number : numbers) {
      if (*number != kMax32) continue;
      if (field.size() < 8) return Damaged();
      *number = Number(field, 0, 8);
      field.remove_prefix(8);
    }
    return absl::OkStatus();
  }

  // The bytes follow the local header.
  absl::Status PlaceEntry(Record& record) {
    const ZipEntry& entry = record.entry;
    const auto differs = [&] {
      return Malformed(absl::StrCat(Shown(entry.name), " is not as the directory says"));
    };
    const uint64_t bytes = kLocalBytes + entry.name.size();
    const uint64_t end = static_cast<uint64_t>(offset_);  // the directory begins here
    if (record.header > end || bytes > end - record.header) return differs();
    std::string header;
    RETURN_IF_ERROR(Load(static_cast<int64_t>(record.header), static_cast<int64_t>(bytes), header));
    if (!absl::StartsWith(header, kLocalMagic) || Number(header, 6, 2) != record.flags ||
        Number(header, 8, 2) != record.method || Number(header, 26, 2) != entry.name.size() ||
        absl::string_view(header).substr(kLocalBytes) != entry.name) {
      return differs();
    }
    if ((record.flags & kSizesFollow) == 0) {
      const uint64_t stored = Number(header, 18, 4);
      if (Number(header, 14, 4) != entry.crc32 ||
          (stored != kMax32 && stored != static_cast<uint64_t>(entry.bytes))) {
        return differs();
      }
    }
    const uint64_t offset = record.header + bytes + Number(header, 28, 2);
    if (offset > end || static_cast<uint64_t>(entry.bytes) > end - offset) {
      return Malformed(
          absl::StrCat(Shown(entry.name), " ends after the end of the entries: truncated"));
    }
    record.entry.offset = static_cast<int64_t>(offset);
    return absl::OkStatus();
  }

  ObjectStore& store_;
  const absl::string_view key_;
  const int64_t size_;
  uint64_t count_ = 0;
  int64_t offset_ = 0;  // of the directory
  int64_t bytes_ = 0;
};

}  // namespace

absl::StatusOr<std::vector<ZipEntry>> ReadZipDirectory(ObjectStore& store, absl::string_view key,
                                                       int64_t file_size) {
  return DirectoryReader(store, key, file_size).Read();
}

}  // namespace pewter
