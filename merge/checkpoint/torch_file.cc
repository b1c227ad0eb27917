#include "merge/checkpoint/torch_file.h"

#include <zlib.h>

#include <algorithm>
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
#include "merge/checkpoint/zip_directory.h"

namespace pewter {
namespace {

using Kind = PickleValue::Kind;

constexpr absl::string_view kZipMagic = "PK\x03\x04";
// The number 0x1950a86a20f9469cfc6c in a pickle, after PROTO and perhaps FRAME.
constexpr absl::string_view kLegacyMagic("\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 13);
constexpr size_t kProtoBytes = 2;
constexpr size_t kFrameBytes = 9;
constexpr int64_t kMaxHeaderBytes = int64_t{256} << 20;
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

class ZipReader {
 public:
  ZipReader(ObjectStore& store, absl::string_view key, int64_t size)
      : store_(store), key_(key), size_(size) {}

  absl::StatusOr<TorchFile> Read() {
    ASSIGN_OR_RETURN(std::vector<ZipEntry> entries, ReadZipDirectory(store_, key_, size_));
    RETURN_IF_ERROR(FindRoot(entries));
    std::vector<StorageBytes> all, data;
    for (ZipEntry& entry : entries) {
      const StorageBytes bytes{entry.offset, entry.bytes};
      all.push_back(bytes);
      absl::string_view key = entry.name;
      if (absl::ConsumePrefix(&key, absl::StrCat(root_, "data/"))) {
        data.push_back(bytes);
        storages_[key] = bytes;
      }
      by_name_[entry.name] = std::move(entry);
    }
    RETURN_IF_ERROR(RestOfFile(std::move(all), size_).status());
    if (by_name_.contains(absl::StrCat(root_, "constants.pkl"))) {
      return absl::FailedPreconditionError(
          "it is a TorchScript program; save its state_dict instead");
    }
    RETURN_IF_ERROR(CheckByteOrder());
    TorchFile file;
    ASSIGN_OR_RETURN(const std::vector<StorageBytes> rest, RestOfFile(std::move(data), size_));
    ASSIGN_OR_RETURN(file.header, ReadRanges(store_, key_, rest));
    ASSIGN_OR_RETURN(const std::string bytes,
                     ReadEntry(absl::StrCat(root_, kPickle), Pickle::kMaxBytes));
    const absl::StatusOr<Pickle> pickle = Pickle::Parse(bytes);
    if (!pickle.ok()) return Truncated(pickle.status());
    if (pickle->size() != bytes.size()) return Malformed("bytes after the end of its pickle");
    RETURN_IF_ERROR(StateDict(*pickle, storages_).Read(file));
    return file;
  }

 private:
  static constexpr absl::string_view kPickle = "data.pkl";

  absl::Status FindRoot(absl::Span<const ZipEntry> entries) {
    for (const ZipEntry& entry : entries) {
      RETURN_IF_ERROR(CheckEntry(entry));
      const std::vector<absl::string_view> parts = absl::StrSplit(entry.name, '/');
      if (parts.size() != 2 || parts[1] != kPickle) continue;
      if (!root_.empty()) return Malformed("there are two data.pkl in it");
      root_ = absl::StrCat(parts[0], "/");
    }
    if (root_.empty()) return Malformed("there is no data.pkl in it");
    for (const ZipEntry& entry : entries) {
      if (absl::StartsWith(entry.name, root_)) continue;
      return Malformed(absl::StrCat("entry ", Printable(entry.name), " is outside ", root_));
    }
    return absl::OkStatus();
  }

  static absl::Status CheckEntry(const ZipEntry& entry) {
    if (!IsUtf8(entry.name)) return Malformed("the name of an entry is no UTF-8 text");
    for (absl::string_view part : absl::StrSplit(entry.name, '/')) {
      if (part.empty() || part == "." || part == ".." || absl::StrContains(part, '\\') ||
          part.find('\0') != absl::string_view::npos) {
        return Malformed(
            absl::StrCat("entry ", Printable(entry.name), ": not a name that torch.save gives"));
      }
    }
    if (!entry.compressed) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("entry ", Printable(entry.name),
                     " is compressed, which torch.save never does: unpack the archive and pack "
                     "it again with `zip -0`, or load and save it in PyTorch"));
  }

  // Checks the entry's CRC, too.
  absl::StatusOr<std::string> ReadEntry(const std::string& name, int64_t limit) {
    const ZipEntry& entry = by_name_.at(name);
    if (entry.bytes > limit) {
      return absl::FailedPreconditionError(absl::StrCat("entry ", Printable(name), " has ",
                                                        FormatBytes(entry.bytes), "; at most ",
                                                        FormatBytes(limit), " are expected"));
    }
    std::string bytes(entry.bytes, '\0');
    RETURN_IF_ERROR(
        store_.ReadInto(key_, entry.offset,
                        absl::MakeSpan(reinterpret_cast<std::byte*>(bytes.data()), bytes.size())));
    if (crc32_z(0, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()) != entry.crc32) {
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

  ObjectStore& store_;
  const absl::string_view key_;
  const int64_t size_;
  std::string root_;  // "archive/"
  absl::flat_hash_map<std::string, ZipEntry> by_name_;
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
