#include "merge/checkpoint/torch_file.h"

#include <minizip/unzip.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/digest.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/checkpoint/pickle.h"
#include "merge/checkpoint/printable.h"
#include "merge/checkpoint/strided.h"

namespace pewter {
namespace {

using Kind = PickleValue::Kind;

constexpr absl::string_view kZipMagic = "PK\x03\x04";
// The number 0x1950a86a20f9469cfc6c in a pickle, after PROTO and perhaps FRAME.
constexpr absl::string_view kLegacyMagic("\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 13);
constexpr size_t kProtoBytes = 2;
constexpr size_t kFrameBytes = 9;
constexpr int64_t kMaxHeaderBytes = int64_t{256} << 20;
constexpr size_t kMaxEntryName = 1024;
constexpr size_t kMaxEntries = size_t{1} << 19;
// Reading a tensor's scattered elements must not take minutes.
constexpr int64_t kMaxStridedReads = int64_t{1} << 24;
constexpr absl::string_view kNestedKeys[] = {"state_dict", "model_state_dict", "model"};
constexpr size_t kNamesShown = 5;

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("not a valid file of torch.save: ", what));
}

// Where a storage lies.
struct StorageBytes {
  int64_t offset = 0;
  int64_t bytes = 0;
};
using StorageTable = absl::flat_hash_map<std::string, StorageBytes>;

bool IsUtf8(absl::string_view text) {
  try {
    nlohmann::json(std::string(text)).dump();
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

// Reads the ranges for their digests.
absl::StatusOr<std::vector<HeaderRange>> ReadRanges(ObjectStore& store, absl::string_view key,
                                                    absl::Span<const StorageBytes> ranges) {
  constexpr int64_t kChunk = int64_t{1} << 16;
  std::vector<std::byte> chunk(kChunk);
  std::vector<HeaderRange> header;
  int64_t total = 0;
  for (const StorageBytes& range : ranges) {
    total += range.bytes;
    if (total > kMaxHeaderBytes) {
      return Malformed(
          absl::StrCat("more than ", FormatBytes(kMaxHeaderBytes), " of it belong to no storage"));
    }
    HeaderRange read{.offset = range.offset, .bytes = range.bytes};
    for (int64_t done = 0; done < range.bytes; done += kChunk) {
      const auto part = absl::MakeSpan(chunk).first(std::min(kChunk, range.bytes - done));
      RETURN_IF_ERROR(store.ReadInto(key, range.offset + done, part));
      read.crc32c = Crc32c(part, read.crc32c);
    }
    header.push_back(read);
  }
  return header;
}

// What no storage covers. Sorts `storages`; DataLoss when two of them overlap.
absl::StatusOr<std::vector<StorageBytes>> RestOfFile(std::vector<StorageBytes> storages,
                                                     int64_t file_size) {
  std::sort(storages.begin(), storages.end(), [](const StorageBytes& a, const StorageBytes& b) {
    return std::tie(a.offset, a.bytes) < std::tie(b.offset, b.bytes);
  });
  std::vector<StorageBytes> rest;
  int64_t end = 0;
  for (const StorageBytes& storage : storages) {
    if (storage.bytes == 0) continue;
    if (storage.offset < end) return Malformed("two entries overlap");
    if (storage.offset > end) rest.push_back({end, storage.offset - end});
    end = storage.offset + storage.bytes;
  }
  if (end < file_size) rest.push_back({end, file_size - end});
  return rest;
}

// --- tensors ---------------------------------------------------------------------------------

// Fills in shape, place and strides of a view of a storage.
absl::Status PlaceView(absl::Span<const PickleValue> extents, absl::Span<const PickleValue> strides,
                       int64_t first, StorageBytes storage, TensorInfo& info) {
  const int64_t width = ByteWidth(info.dtype);
  if (extents.size() != strides.size()) {
    return Malformed("its shape and its strides have different lengths");
  }
  std::vector<int64_t> shape;
  for (const PickleValue& extent : extents) shape.push_back(extent.number);
  const absl::StatusOr<Shape> made = Shape::Make(shape);
  if (!made.ok()) return Malformed(made.status().message());
  info.shape = *made;
  const absl::StatusOr<int64_t> bytes = CheckedMul(made->elements(), width);
  if (!bytes.ok()) return Malformed("its size overflows 64 bits");
  info.bytes = *bytes;
  if (first < 0) return Malformed("its offset is negative");
  const int64_t available = storage.bytes / width;
  if (first > available) return Malformed("it begins after the end of its storage");
  info.offset = storage.offset + first * width;
  if (made->elements() == 0) return absl::OkStatus();

  struct Axis {
    int64_t stride, extent;
  };
  std::vector<Axis> axes;
  int64_t row_major = 1;
  bool contiguous = true;
  for (size_t i = extents.size(); i-- > 0;) {
    if (shape[i] == 1) continue;
    const int64_t stride = strides[i].number;
    if (stride < 0) return Malformed("a stride is negative");
    contiguous = contiguous && stride == row_major;
    row_major *= shape[i];
    axes.push_back({stride, shape[i]});
  }
  std::sort(axes.begin(), axes.end(),
            [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  int64_t span = 1;  // elements from the first to the last
  for (const Axis& axis : axes) {
    if (axis.stride < span) {
      return absl::FailedPreconditionError(
          "elements of it share memory (an expanded tensor); save tensor.clone() instead");
    }
    if (axis.stride > (available - span) / (axis.extent - 1)) {
      return Malformed("it reaches beyond the end of its storage");
    }
    span += axis.stride * (axis.extent - 1);
  }
  if (span > available - first) return Malformed("it reaches beyond the end of its storage");
  if (contiguous) return absl::OkStatus();
  for (size_t i = 0; i < strides.size(); ++i) {
    info.strides.push_back(shape[i] == 1 ? 0 : strides[i].number);
  }
  if (StridedReads(info) > kMaxStridedReads) {
    return absl::FailedPreconditionError(
        "its elements lie too far apart to be read one by one; save tensor.contiguous() instead");
  }
  return absl::OkStatus();
}

class StateDict {
 public:
  StateDict(const Pickle& pickle, const StorageTable& storages)
      : pickle_(pickle), storages_(storages) {}

  absl::Status Read(TorchFile& file) {
    ASSIGN_OR_RETURN(const PickleValue dict, Find(file.warnings));
    const absl::Span<const PickleValue> entries = pickle_.Items(dict);
    absl::flat_hash_set<absl::string_view> names;
    std::vector<std::string> others;
    for (size_t i = 0; i < entries.size(); i += 2) {
      const PickleValue key = entries[i];
      const std::string name = key.kind == Kind::kText ? std::string(pickle_.Text(key)) : "";
      if (entries[i + 1].kind != Kind::kTensor) {
        others.push_back(key.kind != Kind::kText ? "one without a name"
                         : IsUtf8(name)          ? Printable(name)
                                                 : "one whose name is no text");
        continue;
      }
      if (key.kind != Kind::kText || !IsUtf8(name)) {
        return Malformed("the name of a tensor is no UTF-8 text");
      }
      if (!names.insert(pickle_.Text(key)).second) {
        return Malformed(absl::StrCat("tensor ", Printable(name), " is there twice"));
      }
      absl::StatusOr<TensorInfo> info = View(pickle_.Tensor(entries[i + 1]), name);
      if (!info.ok()) {
        return Annotate(info.status(), absl::StrCat("tensor ", Printable(name)));
      }
      file.tensors.push_back(*std::move(info));
    }
    std::sort(file.tensors.begin(), file.tensors.end(),
              [](const TensorInfo& a, const TensorInfo& b) {
                return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
              });
    if (!others.empty()) file.warnings.push_back(LeftOut("are not tensors", others));
    return absl::OkStatus();
  }

 private:
  static std::string LeftOut(absl::string_view why, const std::vector<std::string>& names) {
    const size_t shown = std::min(names.size(), kNamesShown);
    return absl::StrCat(
        "entries that ", why,
        " are left out: ", absl::StrJoin(names.begin(), names.begin() + shown, ", "),
        names.size() > shown ? absl::StrCat(" and ", names.size() - shown, " more") : "");
  }

  bool HasTensors(PickleValue value) const {
    if (value.kind != Kind::kDict) return false;
    const absl::Span<const PickleValue> entries = pickle_.Items(value);
    for (size_t i = 1; i < entries.size(); i += 2) {
      if (entries[i].kind == Kind::kTensor) return true;
    }
    return false;
  }

  // The dict that holds the tensors.
  absl::StatusOr<PickleValue> Find(std::vector<std::string>& warnings) const {
    const PickleValue root = pickle_.root();
    if (root.kind != Kind::kDict) {
      return absl::FailedPreconditionError(
          "what it holds is no dict of tensors; save model.state_dict()");
    }
    const absl::Span<const PickleValue> entries = pickle_.Items(root);
    std::vector<std::string> found, others;
    PickleValue dict = root;
    if (HasTensors(root)) found.push_back("the dict itself");
    for (size_t i = 0; i < entries.size(); i += 2) {
      if (entries[i].kind != Kind::kText) continue;
      const absl::string_view name = pickle_.Text(entries[i]);
      const bool known =
          std::find(std::begin(kNestedKeys), std::end(kNestedKeys), name) != std::end(kNestedKeys);
      if (known && HasTensors(entries[i + 1])) {
        found.push_back(absl::StrCat("\"", name, "\""));
        dict = entries[i + 1];
      } else {
        others.push_back(IsUtf8(name) ? Printable(name) : "one whose name is no text");
      }
    }
    if (found.empty()) return absl::FailedPreconditionError("there are no tensors in it");
    if (found.size() > 1) {
      return absl::FailedPreconditionError(absl::StrCat("there are tensors in each of ",
                                                        absl::StrJoin(found, ", "),
                                                        "; save the dict that is meant"));
    }
    if (HasTensors(root)) return root;
    warnings.push_back(absl::StrCat("its tensors are those of the entry ", found[0]));
    if (!others.empty()) warnings.push_back(LeftOut("are beside it", others));
    return dict;
  }

  absl::StatusOr<TensorInfo> View(const PickledTensor& tensor, const std::string& name) const {
    const absl::string_view key = pickle_.Text(tensor.storage.key);
    const auto storage = storages_.find(key);
    if (storage == storages_.end()) {
      return Malformed(absl::StrCat("its storage ", ShownKey(key), " is not there"));
    }
    const absl::StatusOr<int64_t> bytes =
        CheckedMul(tensor.storage.elements, ByteWidth(tensor.storage.dtype));
    if (!bytes.ok() || *bytes != storage->second.bytes) {
      return Malformed(absl::StrCat("storage ", ShownKey(key), " has ", storage->second.bytes,
                                    " bytes, and ", tensor.storage.elements, " elements of ",
                                    SafetensorsName(tensor.storage.dtype), " are stated"));
    }
    TensorInfo info{.name = name, .dtype = tensor.dtype};
    RETURN_IF_ERROR(PlaceView(pickle_.Items(tensor.shape), pickle_.Items(tensor.strides),
                              tensor.offset, storage->second, info));
    return info;
  }

  static std::string ShownKey(absl::string_view key) {
    return IsUtf8(key) ? Printable(key) : "(no text)";
  }

  const Pickle& pickle_;
  const StorageTable& storages_;
};

// The pickle ended too early for the bytes that it has.
absl::Status Truncated(const absl::Status& status) {
  if (!absl::IsOutOfRange(status)) return status;
  return Malformed(absl::StrCat("truncated: ", status.message()));
}

// --- ZIP -------------------------------------------------------------------------------------

// An object as minizip reads it: the block that was read last is kept, since it asks byte by byte.
class ZipStream {
 public:
  ZipStream(ObjectStore& store, absl::string_view key, int64_t size)
      : store_(store), key_(key), size_(size) {}

  // Of the last read that failed.
  const absl::Status& status() const { return status_; }

  zlib_filefunc64_def Functions() {
    return {
        .zopen64_file = [](void* self, const void*, int) { return self; },
        .zread_file = [](void*, void* self, void* to, uLong count) -> uLong {
          return static_cast<ZipStream*>(self)->Read(static_cast<char*>(to), count);
        },
        .zwrite_file = [](void*, void*, const void*, uLong) -> uLong { return 0; },
        .ztell64_file = [](void*, void* self) -> ZPOS64_T {
          return static_cast<ZipStream*>(self)->at_;
        },
        .zseek64_file = [](void*, void* self, ZPOS64_T offset, int origin) -> long {
          return static_cast<ZipStream*>(self)->Seek(offset, origin);
        },
        .zclose_file = [](void*, void*) { return 0; },
        .zerror_file = [](void*, void*) { return 0; },
        .opaque = this,
    };
  }

 private:
  static constexpr uint64_t kBlock = 4096;

  uLong Read(char* to, uLong count) {
    uLong done = 0;
    while (done < count && at_ < static_cast<uint64_t>(size_)) {
      const uint64_t block = at_ / kBlock;
      const uint64_t begin = block * kBlock;
      const uint64_t bytes = std::min<uint64_t>(kBlock, size_ - begin);
      if (block != block_) {
        status_ = store_.ReadInto(key_, static_cast<int64_t>(begin), {buffer_.data(), bytes});
        if (!status_.ok()) return done;
        block_ = block;
      }
      const uint64_t part = std::min<uint64_t>(count - done, begin + bytes - at_);
      std::memcpy(to + done, buffer_.data() + (at_ - begin), part);
      done += part;
      at_ += part;
    }
    return done;
  }

  long Seek(uint64_t offset, int origin) {
    const uint64_t from = origin == ZLIB_FILEFUNC_SEEK_SET   ? 0
                          : origin == ZLIB_FILEFUNC_SEEK_CUR ? at_
                                                             : static_cast<uint64_t>(size_);
    // Wraps for a negative offset, which is then out of range.
    const uint64_t to = from + offset;
    if (to > static_cast<uint64_t>(size_)) return -1;
    at_ = to;
    return 0;
  }

  ObjectStore& store_;
  const absl::string_view key_;
  const int64_t size_;
  uint64_t at_ = 0;
  uint64_t block_ = ~uint64_t{0};
  std::array<std::byte, kBlock> buffer_;
  absl::Status status_;
};

class ZipReader {
 public:
  ZipReader(ObjectStore& store, absl::string_view key, int64_t size)
      : store_(store), key_(key), size_(size), stream_(store, key, size) {}

  absl::StatusOr<TorchFile> Read() {
    zlib_filefunc64_def functions = stream_.Functions();
    zip_.reset(unzOpen2_64(nullptr, &functions));
    if (zip_ == nullptr) return Failed("its ZIP directory is missing: truncated?");
    RETURN_IF_ERROR(ReadDirectory());
    if (by_name_.contains(absl::StrCat(root_, "constants.pkl"))) {
      return absl::FailedPreconditionError(
          "it is a TorchScript program; save its state_dict instead");
    }
    RETURN_IF_ERROR(CheckByteOrder());
    TorchFile file;
    {
      std::vector<StorageBytes> all, data;
      for (const auto& [name, entry] : by_name_) {
        all.push_back(entry.bytes);
        absl::string_view storage = name;
        if (!absl::ConsumePrefix(&storage, absl::StrCat(root_, "data/"))) continue;
        data.push_back(entry.bytes);
        storages_[storage] = entry.bytes;
      }
      RETURN_IF_ERROR(RestOfFile(std::move(all), size_).status());
      ASSIGN_OR_RETURN(const std::vector<StorageBytes> rest, RestOfFile(std::move(data), size_));
      ASSIGN_OR_RETURN(file.header, ReadRanges(store_, key_, rest));
    }
    ASSIGN_OR_RETURN(const std::string bytes, ReadEntry(pickle_name_, Pickle::kMaxBytes));
    const absl::StatusOr<Pickle> pickle = Pickle::Parse(bytes);
    if (!pickle.ok()) return Truncated(pickle.status());
    if (pickle->size() != bytes.size()) return Malformed("bytes after the end of its pickle");
    RETURN_IF_ERROR(StateDict(*pickle, storages_).Read(file));
    return file;
  }

 private:
  struct Entry {
    StorageBytes bytes;
    unz64_file_pos place;
  };

  absl::Status Failed(absl::string_view what) const {
    return stream_.status().ok() ? Malformed(what) : stream_.status();
  }

  absl::Status ReadDirectory() {
    int result = unzGoToFirstFile(zip_.get());
    RETURN_IF_ERROR(CheckBegin());
    for (; result == UNZ_OK; result = unzGoToNextFile(zip_.get())) {
      RETURN_IF_ERROR(AddEntry());
    }
    if (result != UNZ_END_OF_LIST_OF_FILE) return Failed("its ZIP directory is damaged");
    if (pickle_name_.empty()) return Malformed("there is no data.pkl in it");
    for (const auto& [name, entry] : by_name_) {
      if (!absl::StartsWith(name, root_)) {
        return Malformed(absl::StrCat("entry ", Printable(name), " is outside ", root_));
      }
    }
    return absl::OkStatus();
  }

  // minizip takes a file that has something else before the archive.
  absl::Status CheckBegin() {
    std::array<std::byte, kZipMagic.size()> begin;
    RETURN_IF_ERROR(store_.ReadInto(key_, 0, absl::MakeSpan(begin)));
    std::array<std::byte, 4> entry;
    const int64_t at = static_cast<int64_t>(unzGetOffset64(zip_.get()));
    if (at > size_ - 4) return Malformed("its ZIP directory is damaged");
    RETURN_IF_ERROR(store_.ReadInto(key_, at, absl::MakeSpan(entry)));
    if (std::memcmp(entry.data(), "PK\x01\x02", 4) == 0) return absl::OkStatus();
    return Malformed("its ZIP directory is not where it should be");
  }

  absl::Status AddEntry() {
    std::array<char, kMaxEntryName + 1> buffer;
    unz_file_info64 info;
    if (unzGetCurrentFileInfo64(zip_.get(), &info, buffer.data(), buffer.size(), nullptr, 0,
                                nullptr, 0) != UNZ_OK) {
      return Failed("its ZIP directory is damaged");
    }
    if (by_name_.size() == kMaxEntries) return Malformed("too many entries");
    if (info.size_filename > kMaxEntryName) return Malformed("the name of an entry is too long");
    const std::string name(buffer.data(), info.size_filename);
    if (!IsUtf8(name)) return Malformed("the name of an entry is no UTF-8 text");
    const auto bad = [&](absl::string_view what) {
      return Malformed(absl::StrCat("entry ", Printable(name), ": ", what));
    };
    for (absl::string_view part : absl::StrSplit(name, '/')) {
      if (part.empty() || part == "." || part == ".." || absl::StrContains(part, '\\') ||
          part.find('\0') != absl::string_view::npos) {
        return bad("not a name that torch.save gives");
      }
    }
    if ((info.flag & 1) != 0) return bad("it is encrypted");
    if (info.compression_method != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("entry ", Printable(name),
                       " is compressed, which torch.save never does: unpack the archive and pack "
                       "it again with `zip -0`, or load and save it in PyTorch"));
    }
    if (info.compressed_size != info.uncompressed_size) return bad("it has two sizes");
    if (unzOpenCurrentFile2(zip_.get(), nullptr, nullptr, /*raw=*/1) != UNZ_OK) {
      return Failed(absl::StrCat("entry ", Printable(name), " is not as the directory says"));
    }
    const uint64_t offset = unzGetCurrentFileZStreamPos64(zip_.get());
    unzCloseCurrentFile(zip_.get());
    if (offset > static_cast<uint64_t>(size_) || info.uncompressed_size > size_ - offset) {
      return bad("it ends after the end of the file: truncated");
    }
    Entry entry{
        .bytes = {static_cast<int64_t>(offset), static_cast<int64_t>(info.uncompressed_size)}};
    unzGetFilePos64(zip_.get(), &entry.place);
    const auto [added, is_new] = by_name_.try_emplace(name, entry);
    if (!is_new) return bad("it is there twice");
    const std::vector<absl::string_view> parts = absl::StrSplit(name, '/');
    if (parts.size() == 2 && parts[1] == "data.pkl") {
      if (!pickle_name_.empty()) return Malformed("there are two data.pkl in it");
      pickle_name_ = name;
      root_ = absl::StrCat(parts[0], "/");
    }
    return absl::OkStatus();
  }

  // Checks the entry's CRC, too.
  absl::StatusOr<std::string> ReadEntry(const std::string& name, int64_t limit) {
    const Entry& entry = by_name_.at(name);
    if (entry.bytes.bytes > limit) {
      return absl::FailedPreconditionError(
          absl::StrCat("entry ", Printable(name), " has ", FormatBytes(entry.bytes.bytes),
                       "; at most ", FormatBytes(limit), " are expected"));
    }
    std::string bytes(entry.bytes.bytes, '\0');
    if (unzGoToFilePos64(zip_.get(), &entry.place) != UNZ_OK ||
        unzOpenCurrentFile(zip_.get()) != UNZ_OK) {
      return Failed(absl::StrCat("entry ", Printable(name), " cannot be read"));
    }
    const int read = unzReadCurrentFile(zip_.get(), bytes.data(), bytes.size());
    const int closed = unzCloseCurrentFile(zip_.get());
    if (read != static_cast<int>(bytes.size())) {
      return Failed(absl::StrCat("entry ", Printable(name), " cannot be read"));
    }
    if (closed == UNZ_CRCERROR) {
      return Malformed(absl::StrCat(
          "the checksum of ", Printable(name),
          " is wrong: it is damaged, or was saved with set_crc32_options(False); if PyTorch loads "
          "it, save it again with checksums"));
    }
    return bytes;
  }

  absl::Status CheckByteOrder() {
    const std::string name = absl::StrCat(root_, "byteorder");
    if (!by_name_.contains(name)) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::string order, ReadEntry(name, 16));
    if (order == "little") return absl::OkStatus();
    return absl::FailedPreconditionError(
        "it was saved by a big-endian machine; load and save it on a little-endian one");
  }

  struct Close {
    void operator()(void* zip) const { unzClose(zip); }
  };

  ObjectStore& store_;
  const absl::string_view key_;
  const int64_t size_;
  ZipStream stream_;
  std::unique_ptr<void, Close> zip_;
  absl::flat_hash_map<std::string, Entry> by_name_;
  std::string pickle_name_;
  std::string root_;  // "archive/"
  StorageTable storages_;
};

// --- before 1.6 ------------------------------------------------------------------------------

// Bytes of the pickle of the magic number; 0 when the file does not begin with one.
size_t MagicBytes(absl::string_view begin) {
  if (begin.size() < kProtoBytes || begin[0] != '\x80') return 0;
  size_t at = kProtoBytes;
  if (begin.size() > at && begin[at] == '\x95') at += kFrameBytes;
  if (begin.size() < at || !absl::StartsWith(begin.substr(at), kLegacyMagic)) return 0;
  return at + kLegacyMagic.size();
}

class LegacyReader {
 public:
  LegacyReader(ObjectStore& store, absl::string_view key, int64_t size)
      : store_(store), key_(key), size_(size) {}

  absl::StatusOr<TorchFile> Read() {
    // How long the pickles are is known only when they have been read.
    constexpr int64_t kFirst = int64_t{64} << 10;
    for (int64_t bytes = std::min(kFirst, size_);; bytes = std::min(2 * bytes, size_)) {
      bytes = std::min(bytes, Pickle::kMaxBytes);
      begin_.resize(bytes);
      RETURN_IF_ERROR(store_.ReadInto(
          key_, 0, absl::MakeSpan(reinterpret_cast<std::byte*>(begin_.data()), begin_.size())));
      absl::StatusOr<TorchFile> file = ReadPickles();
      if (!absl::IsOutOfRange(file.status())) return file;
      if (bytes == size_) return Truncated(file.status());
      if (bytes == Pickle::kMaxBytes) {
        return absl::FailedPreconditionError(absl::StrCat(
            "its pickles have more than ", FormatBytes(bytes), "; save it as safetensors"));
      }
    }
  }

 private:
  absl::StatusOr<Pickle> Next(size_t& at) const {
    absl::StatusOr<Pickle> pickle = Pickle::Parse(absl::string_view(begin_).substr(at));
    if (pickle.ok()) at += pickle->size();
    return pickle;
  }

  static absl::Status CheckMachine(const Pickle& machine) {
    if (machine.root().kind != Kind::kDict) return Malformed("no description of the machine");
    const absl::Span<const PickleValue> entries = machine.Items(machine.root());
    for (size_t i = 0; i < entries.size(); i += 2) {
      if (entries[i].kind != Kind::kText || machine.Text(entries[i]) != "little_endian") continue;
      if (entries[i + 1].kind == Kind::kBool && entries[i + 1].number == 1) return absl::OkStatus();
      return absl::FailedPreconditionError(
          "it was saved by a big-endian machine; load and save it on a little-endian one");
    }
    return Malformed("no byte order in it");
  }

  absl::StatusOr<TorchFile> ReadPickles() {
    size_t at = MagicBytes(begin_);
    ASSIGN_OR_RETURN(const Pickle protocol, Next(at));
    if (protocol.root().kind != Kind::kInt || protocol.root().number != 1001) {
      return absl::FailedPreconditionError("it has an unknown version");
    }
    ASSIGN_OR_RETURN(const Pickle machine, Next(at));
    RETURN_IF_ERROR(CheckMachine(machine));
    ASSIGN_OR_RETURN(const Pickle object, Next(at));
    ASSIGN_OR_RETURN(const Pickle keys, Next(at));
    TorchFile file;
    ASSIGN_OR_RETURN(const StorageTable storages,
                     PlaceStorages(object, keys, static_cast<int64_t>(at), file));
    RETURN_IF_ERROR(StateDict(object, storages).Read(file));
    return file;
  }

  // Storages follow the pickles in the order of `keys`; their types are those that the object
  // states.
  absl::StatusOr<StorageTable> PlaceStorages(const Pickle& object, const Pickle& keys, int64_t at,
                                             TorchFile& file) {
    absl::flat_hash_map<absl::string_view, int64_t> widths;
    for (const PickledStorage& storage : object.storages()) {
      const int64_t width = ByteWidth(storage.dtype);
      if (widths.try_emplace(object.Text(storage.key), width).first->second != width) {
        return Malformed("a storage has two element types");
      }
    }
    if (keys.root().kind != Kind::kList) return Malformed("no list of storages");
    StorageTable table;
    std::vector<StorageBytes> placed;
    for (const PickleValue& key : keys.Items(keys.root())) {
      const auto width = key.kind == Kind::kText ? widths.find(keys.Text(key)) : widths.end();
      if (width == widths.end()) return Malformed("a storage that nothing uses");
      uint64_t elements = 0;
      if (at > size_ - 8) return Malformed("truncated before a storage");
      RETURN_IF_ERROR(store_.ReadInto(
          key_, at, absl::MakeSpan(reinterpret_cast<std::byte*>(&elements), sizeof elements)));
      at += 8;
      if (elements > static_cast<uint64_t>(size_ - at) / width->second) {
        return Malformed("truncated: a storage ends after the end of the file");
      }
      const StorageBytes bytes{at, static_cast<int64_t>(elements) * width->second};
      if (!table.try_emplace(keys.Text(key), bytes).second) {
        return Malformed("a storage is there twice");
      }
      placed.push_back(bytes);
      at += bytes.bytes;
    }
    if (at != size_) return Malformed(absl::StrCat(size_ - at, " bytes after the last storage"));
    ASSIGN_OR_RETURN(const std::vector<StorageBytes> rest, RestOfFile(std::move(placed), size_));
    ASSIGN_OR_RETURN(file.header, ReadRanges(store_, key_, rest));
    return table;
  }

  ObjectStore& store_;
  const absl::string_view key_;
  const int64_t size_;
  std::string begin_;
};

}  // namespace

bool IsTorchFile(absl::string_view key) {
  return absl::EndsWith(key, ".bin") || absl::EndsWith(key, ".pt") || absl::EndsWith(key, ".pth");
}

absl::StatusOr<TorchFile> ReadTorchFile(ObjectStore& store, absl::string_view key,
                                        int64_t file_size) {
  std::string begin(std::min<int64_t>(file_size, kProtoBytes + kFrameBytes + kLegacyMagic.size()),
                    '\0');
  RETURN_IF_ERROR(store.ReadInto(
      key, 0, absl::MakeSpan(reinterpret_cast<std::byte*>(begin.data()), begin.size())));
  absl::StatusOr<TorchFile> file =
      absl::StartsWith(begin, kZipMagic) ? ZipReader(store, key, file_size).Read()
      : MagicBytes(begin) > 0            ? LegacyReader(store, key, file_size).Read()
                                         : Malformed("it begins like none");
  if (!file.ok()) return Annotate(file.status(), store.Describe(key));
  return file;
}

}  // namespace pewter
