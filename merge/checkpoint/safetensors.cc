#include "merge/checkpoint/safetensors.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/checkpoint/json_error.h"
#include "merge/checkpoint/printable.h"

namespace pewter {
namespace {

using Json = nlohmann::json;

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;
constexpr absl::string_view kMetadataKey = "__metadata__";

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("not a valid safetensors file: ", what));
}

uint64_t LoadLength(absl::string_view text) {
  uint64_t length = 0;
  for (int i = kLengthBytes - 1; i >= 0; --i) {
    length = length << 8 | static_cast<unsigned char>(text[i]);
  }
  return length;
}

std::string StoreLength(uint64_t length) {
  std::string text;
  for (int i = 0; i < kLengthBytes; ++i) text += static_cast<char>(length >> (8 * i) & 0xff);
  return text;
}

// Receives the header's tokens one by one and accepts exactly the format's grammar, so nothing but
// the tensors themselves is kept in memory and a duplicate key is seen.
class HeaderHandler final : public nlohmann::json_sax<Json> {
 public:
  explicit HeaderHandler(SafetensorsHeader& header) : header_(header) {}

  // Why parsing stopped.
  const absl::Status& status() const { return failure_; }

  bool start_object(size_t) override {
    switch (state_) {
      case State::kBegin:
        state_ = State::kTop;
        return true;
      case State::kTensorBegin:
        state_ = State::kTensor;
        return true;
      case State::kMetadataBegin:
        state_ = State::kMetadata;
        return true;
      default:
        return Unexpected("an object");
    }
  }

  bool key(string_t& key) override {
    if (state_ == State::kTop) {
      if (key == kMetadataKey) {
        if (std::exchange(seen_metadata_, true)) return Fail("duplicate key \"__metadata__\"");
        state_ = State::kMetadataBegin;
      } else {
        header_.tensors.push_back({.name = std::move(key)});
        seen_ = 0;
        state_ = State::kTensorBegin;
      }
      return true;
    }
    if (state_ == State::kMetadata) {
      auto [entry, added] = header_.metadata.try_emplace(std::move(key));
      if (!added) {
        return Fail(absl::StrCat("duplicate key ", Printable(entry->first), " in __metadata__"));
      }
      metadata_value_ = &entry->second;
      return true;
    }
    // In a tensor.
    static constexpr std::pair<absl::string_view, State> kFields[] = {
        {"dtype", State::kDType},
        {"shape", State::kShapeBegin},
        {"data_offsets", State::kOffsetsBegin}};
    for (int i = 0; i < 3; ++i) {
      if (key != kFields[i].first) continue;
      if (seen_ & (1 << i)) return FailTensor(absl::StrCat("duplicate key \"", key, "\""));
      seen_ |= 1 << i;
      state_ = kFields[i].second;
      return true;
    }
    return FailTensor(absl::StrCat("unknown key ", Printable(key)));
  }

  bool end_object() override {
    if (state_ == State::kTensor) {
      if (seen_ != 7) return FailTensor("dtype, shape and data_offsets are needed");
      state_ = State::kTop;
    } else if (state_ == State::kMetadata) {
      state_ = State::kTop;
    } else {
      state_ = State::kEnd;
    }
    return true;
  }

  bool start_array(size_t) override {
    numbers_.clear();
    if (state_ == State::kShapeBegin) {
      state_ = State::kShape;
      return true;
    }
    if (state_ == State::kOffsetsBegin) {
      state_ = State::kOffsets;
      return true;
    }
    return Unexpected("an array");
  }

  bool end_array() override {
    TensorInfo& tensor = header_.tensors.back();
    if (state_ == State::kShape) {
      absl::StatusOr<Shape> shape = Shape::Make(numbers_);
      if (!shape.ok()) return FailTensor(absl::StrCat("bad shape: ", shape.status().message()));
      tensor.shape = *shape;
    } else {
      if (numbers_.size() != 2) return FailTensor("data_offsets must be [begin, end]");
      if (numbers_[0] > numbers_[1]) {
        return FailTensor(absl::StrCat("data_offsets [", numbers_[0], ", ", numbers_[1],
                                       "] end before they begin"));
      }
      tensor.offset = numbers_[0];
      tensor.bytes = numbers_[1] - numbers_[0];
    }
    state_ = State::kTensor;
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ != State::kShape && state_ != State::kOffsets) return Unexpected("a number");
    const absl::string_view field = state_ == State::kShape ? "shape" : "data_offsets";
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return FailTensor(absl::StrCat(field, " overflows 64 bits"));
    }
    if (numbers_.size() == Shape::kMaxRank) {
      return FailTensor(absl::StrCat("more than ", Shape::kMaxRank, " numbers in ", field));
    }
    numbers_.push_back(static_cast<int64_t>(value));
    return true;
  }
  bool number_integer(number_integer_t value) override {
    if (state_ == State::kShape || state_ == State::kOffsets) {
      return FailTensor(absl::StrCat(
          "negative ", state_ == State::kShape ? "dimension " : "data offset ", value));
    }
    return Unexpected("a number");
  }
  bool number_float(number_float_t, const string_t& text) override {
    if (state_ == State::kShape || state_ == State::kOffsets) {
      return FailTensor(absl::StrCat(Printable(text), " is not a 64-bit integer"));
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) {
      *metadata_value_ = std::move(value);
      return true;
    }
    if (state_ != State::kDType) return Unexpected("a string");
    absl::StatusOr<DType> dtype = DTypeFromSafetensors(value);
    if (!dtype.ok()) return FailTensor(absl::StrCat("unsupported dtype ", Printable(value)));
    header_.tensors.back().dtype = *dtype;
    state_ = State::kTensor;
    return true;
  }

  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool parse_error(size_t position, const std::string&, const Json::exception& error) override {
    return Fail(JsonErrorText(position, error.what()));
  }

 private:
  enum class State {
    kBegin,
    kTop,
    kMetadataBegin,
    kMetadata,
    kTensorBegin,
    kTensor,
    kDType,
    kShapeBegin,
    kShape,
    kOffsetsBegin,
    kOffsets,
    kEnd,
  };

  bool Fail(absl::string_view what) {
    if (failure_.ok()) failure_ = Malformed(what);
    return false;
  }
  bool FailTensor(absl::string_view what) {
    return Fail(absl::StrCat("tensor ", Printable(header_.tensors.back().name), ": ", what));
  }
  bool Unexpected(absl::string_view what) {
    switch (state_) {
      case State::kBegin:
      case State::kTop:
      case State::kEnd:
        return Fail(absl::StrCat("its header is ", what, " where an object is expected"));
      case State::kMetadataBegin:
      case State::kMetadata:
        return Fail(absl::StrCat("__metadata__ must map strings to strings, but has ", what));
      default:
        return FailTensor(absl::StrCat(what, " in the wrong place"));
    }
  }

  SafetensorsHeader& header_;
  absl::Status failure_;
  State state_ = State::kBegin;
  bool seen_metadata_ = false;
  std::string* metadata_value_ = nullptr;
  int seen_ = 0;  // bits: dtype, shape, data_offsets
  std::vector<int64_t> numbers_;
};

// A name that is there twice; null when there is none.
const std::string* FindDuplicate(const std::vector<TensorInfo>& tensors) {
  absl::flat_hash_set<absl::string_view> names;
  names.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) {
    if (!names.insert(tensor.name).second) return &tensor.name;
  }
  return nullptr;
}

// Sorts the tensors by place and checks that they tile the data part exactly. Offsets still count
// from the start of the data.
absl::Status CheckPlaces(std::vector<TensorInfo>& tensors, int64_t data_bytes) {
  for (const TensorInfo& tensor : tensors) {
    const auto fail = [&](absl::string_view what) {
      return Malformed(absl::StrCat("tensor ", Printable(tensor.name), ": ", what));
    };
    const absl::StatusOr<int64_t> bytes =
        CheckedMul(tensor.shape.elements(), ByteWidth(tensor.dtype));
    if (!bytes.ok()) return fail("its size overflows 64 bits");
    if (*bytes != tensor.bytes) {
      return fail(absl::StrCat("shape ", tensor.shape.ToString(), " of ",
                               SafetensorsName(tensor.dtype), " takes ", *bytes,
                               " bytes, its data_offsets span ", tensor.bytes));
    }
    const int64_t end = tensor.offset + tensor.bytes;
    if (end > data_bytes) {
      return fail(absl::StrCat("its data ends at byte ", end, " of the data part, which has only ",
                               data_bytes, ": the file is truncated or its offsets are wrong"));
    }
  }
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
  });
  int64_t end = 0;
  const TensorInfo* previous = nullptr;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.offset < end) {
      return Malformed(absl::StrCat("tensors ", Printable(previous->name), " and ",
                                    Printable(tensor.name), " overlap"));
    }
    if (tensor.offset > end) {
      return Malformed(absl::StrCat("a hole of ", tensor.offset - end, " bytes before tensor ",
                                    Printable(tensor.name)));
    }
    end = tensor.offset + tensor.bytes;
    previous = &tensor;
  }
  if (end != data_bytes) {
    return Malformed(absl::StrCat(data_bytes - end, " bytes after the last tensor"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view json, int64_t data_begin,
                                                         int64_t file_size) {
  SafetensorsHeader header;
  header.data_begin = data_begin;
  if (json.empty() || json.front() != '{') return Malformed("its header does not begin with '{'");
  // The JSON library takes a NUL for the end of the text.
  if (json.find('\0') != absl::string_view::npos) return Malformed("NUL byte in its header");
  HeaderHandler handler(header);
  if (!Json::sax_parse(json.begin(), json.end(), &handler)) return handler.status();
  if (const std::string* name = FindDuplicate(header.tensors); name != nullptr) {
    return Malformed(absl::StrCat("tensor ", Printable(*name), " is there twice"));
  }
  RETURN_IF_ERROR(CheckPlaces(header.tensors, file_size - data_begin));
  for (TensorInfo& tensor : header.tensors) tensor.offset += data_begin;
  return header;
}

absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(ObjectStore& store, absl::string_view key,
                                                        int64_t file_size) {
  const std::string file = store.Describe(key);
  if (file_size < kLengthBytes) {
    return Annotate(Malformed(absl::StrCat("it has only ", file_size, " bytes")), file);
  }
  std::string text(kLengthBytes, '\0');
  const auto read = [&](int64_t from) {
    return store.ReadInto(key, from,
                          absl::MakeSpan(reinterpret_cast<std::byte*>(text.data()) + from,
                                         text.size() - static_cast<size_t>(from)));
  };
  RETURN_IF_ERROR(read(0));
  const uint64_t json_bytes = LoadLength(text);
  const uint64_t most = static_cast<uint64_t>(file_size - kLengthBytes);
  if (json_bytes > most) {
    return Annotate(Malformed(absl::StrCat("its header claims ", json_bytes,
                                           " bytes, the file has only ", most, " more: truncated")),
                    file);
  }
  if (json_bytes > kMaxHeaderBytes) {
    return Annotate(Malformed(absl::StrCat("its header claims ", json_bytes, " bytes; at most ",
                                           kMaxHeaderBytes, " are allowed")),
                    file);
  }
  text.resize(kLengthBytes + json_bytes);
  RETURN_IF_ERROR(read(kLengthBytes));
  absl::StatusOr<SafetensorsHeader> header = ParseSafetensorsHeader(
      absl::string_view(text).substr(kLengthBytes), static_cast<int64_t>(text.size()), file_size);
  if (!header.ok()) return Annotate(header.status(), file);
  header->crc32c =
      Crc32c(absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()), text.size()));
  return header;
}

absl::StatusOr<std::string> LayOutSafetensors(std::vector<TensorInfo>& tensors,
                                              const std::map<std::string, std::string>& metadata) {
  if (const std::string* name = FindDuplicate(tensors); name != nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", Printable(*name), " would be written twice to one file"));
  }
  std::string json = "{";
  int64_t end = 0;
  try {
    const auto quoted = [](const std::string& text) { return Json(text).dump(); };
    const auto separate = [&] {
      if (json.size() > 1) json += ',';
    };
    if (!metadata.empty()) absl::StrAppend(&json, "\"__metadata__\":", Json(metadata).dump());
    for (TensorInfo& tensor : tensors) {
      if (tensor.name == kMetadataKey) {
        return absl::InvalidArgumentError("a tensor cannot be named __metadata__");
      }
      ASSIGN_OR_RETURN(tensor.bytes, CheckedMul(tensor.shape.elements(), ByteWidth(tensor.dtype)));
      tensor.offset = end;
      ASSIGN_OR_RETURN(end, CheckedAdd(end, tensor.bytes));
      separate();
      absl::StrAppend(&json, quoted(tensor.name), ":{\"dtype\":\"", SafetensorsName(tensor.dtype),
                      "\",\"shape\":[", absl::StrJoin(tensor.shape.extents(), ","),
                      "],\"data_offsets\":[", tensor.offset, ",", end, "]}");
    }
  } catch (const Json::exception& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("a tensor's name or metadata is not UTF-8: ", error.what()));
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');
  if (static_cast<int64_t>(json.size()) > kMaxHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat("a safetensors header of ", json.size(),
                                                   " bytes is above the format's limit of ",
                                                   kMaxHeaderBytes, "; write more shards"));
  }
  const std::string header = absl::StrCat(StoreLength(json.size()), json);
  for (TensorInfo& tensor : tensors) tensor.offset += static_cast<int64_t>(header.size());
  return header;
}

}  // namespace pewter
