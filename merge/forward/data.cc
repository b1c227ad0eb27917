#include "merge/forward/data.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/checkpoint/stored_source.h"
#include "merge/forward/object_path.h"

namespace pewter {
namespace {

constexpr char kIds[] = "input_ids", kMask[] = "attention_mask", kTypes[] = "token_type_ids",
               kLabels[] = "labels", kPixels[] = "pixel_values";
constexpr int64_t kReadBytes = int64_t{1} << 20;

using Tensors = std::map<std::string, TensorInfo>;

absl::Status Wrong(absl::string_view tensor, absl::string_view what) {
  return absl::FailedPreconditionError(absl::StrCat(tensor, " ", what));
}

// The value of an integer type; false for the other types.
bool ReadInteger(const std::byte* from, DType dtype, int64_t* value) {
  const auto read = [&](auto element) {
    std::memcpy(&element, from, sizeof(element));
    *value = static_cast<int64_t>(element);
    return true;
  };
  switch (dtype) {
    case DType::kI64:
    case DType::kU64:
      return read(int64_t{});
    case DType::kI32:
      return read(int32_t{});
    case DType::kU32:
      return read(uint32_t{});
    case DType::kI16:
      return read(int16_t{});
    case DType::kU16:
      return read(uint16_t{});
    case DType::kI8:
      return read(int8_t{});
    case DType::kU8:
    case DType::kBool:
      return read(uint8_t{});
    default:
      return false;
  }
}

std::string PlaceOf(const Shape& shape, int64_t element) {
  if (shape.rank() < 2) return absl::StrCat("[", element, "]");
  return absl::StrCat("[", element / shape[1], ", ", element % shape[1], "]");
}

// All elements, each of which must be in [least, most].
template <class Integer>
absl::Status ReadIntegers(ObjectStore& store, absl::string_view key, const TensorInfo& tensor,
                          int64_t least, int64_t most, std::vector<Integer>& values) {
  if (int64_t value;
      !ReadInteger(reinterpret_cast<const std::byte*>(&value), tensor.dtype, &value)) {
    return Wrong(tensor.name,
                 absl::StrCat("is ", SafetensorsName(tensor.dtype), " and not of an integer type"));
  }
  const int64_t width = ByteWidth(tensor.dtype), elements = tensor.shape.elements();
  values.resize(elements);
  std::vector<std::byte> block(std::min(elements * width, kReadBytes));
  for (int64_t first = 0; first < elements; first += kReadBytes / width) {
    const int64_t count = std::min(elements - first, kReadBytes / width);
    RETURN_IF_ERROR(store.ReadInto(key, tensor.offset + first * width,
                                   absl::MakeSpan(block.data(), count * width)));
    for (int64_t i = 0; i < count; ++i) {
      int64_t value = 0;
      ReadInteger(block.data() + i * width, tensor.dtype, &value);
      if (value < least || value > most) {
        return Wrong(tensor.name, absl::StrCat(PlaceOf(tensor.shape, first + i), " is ", value,
                                               "; it must be in ", least, " to ", most));
      }
      values[first + i] = static_cast<Integer>(value);
    }
  }
  return absl::OkStatus();
}

void AddToDigest(Sha256& digest, absl::string_view name, const Shape& shape,
                 absl::Span<const std::byte> bytes) {
  digest.Update(absl::StrCat(name, shape.ToString(), "\n"));
  digest.Update(bytes);
}
template <class Integer>
void AddToDigest(Sha256& digest, const TensorInfo& tensor, const std::vector<Integer>& values) {
  AddToDigest(digest, tensor.name, tensor.shape,
              absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()),
                                  values.size() * sizeof(Integer)));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const ForwardData>> ForwardData::Open(
    std::shared_ptr<ObjectStore> store, absl::string_view key) {
  std::shared_ptr<ForwardData> data(new ForwardData);
  data->name_ = store->Describe(key);
  const absl::Status loaded = data->Load(std::move(store), key);
  if (!loaded.ok()) return Annotate(loaded, absl::StrCat("data ", data->name_));
  return data;
}

absl::StatusOr<std::shared_ptr<const ForwardData>> ForwardData::Open(absl::string_view uri) {
  ASSIGN_OR_RETURN(ObjectPlace place, LocateObject(uri));
  return Open(std::move(place.store), place.key);
}

std::shared_ptr<const ForwardData> ForwardData::OfTokens(
    std::string name, absl::Span<const std::vector<int32_t>> rows) {
  std::shared_ptr<ForwardData> data(new ForwardData);
  data->name_ = std::move(name);
  data->rows_ = static_cast<int64_t>(rows.size());
  for (const std::vector<int32_t>& row : rows) {
    data->length_ = std::max(data->length_, static_cast<int64_t>(row.size()));
  }
  for (const std::vector<int32_t>& row : rows) {
    data->ids_.insert(data->ids_.end(), row.begin(), row.end());
    data->mask_.resize(data->ids_.size(), 1);
    data->ids_.resize(data->ids_.size() + data->length_ - row.size());
    data->mask_.resize(data->ids_.size());
  }
  const Shape shape = {data->rows_, data->length_};
  Sha256 digest;
  AddToDigest(digest, {.name = kIds, .shape = shape}, data->ids_);
  AddToDigest(digest, {.name = kMask, .shape = shape}, data->mask_);
  data->digest_ = digest.Finish();
  return data;
}

absl::Status ForwardData::Load(std::shared_ptr<ObjectStore> store, absl::string_view key) {
  ASSIGN_OR_RETURN(const ObjectStat stat, store->Stat(key));
  ASSIGN_OR_RETURN(SafetensorsHeader header, ReadSafetensorsHeader(*store, key, stat.size));
  Tensors tensors;
  std::vector<std::string> names;
  for (TensorInfo& tensor : header.tensors) {
    names.push_back(tensor.name);
    tensors.emplace(names.back(), std::move(tensor));
  }
  const auto find = [&](const char* name) -> const TensorInfo* {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : &found->second;
  };
  const TensorInfo* const tokens = find(kIds);
  const TensorInfo* const images = find(kPixels);
  if ((tokens == nullptr) == (images == nullptr)) {
    return absl::FailedPreconditionError(
        tokens != nullptr
            ? absl::StrCat("there are both ", kIds, " and ", kPixels, "; one kind is wanted")
            : absl::StrCat("there is neither ", kIds, " nor ", kPixels, "; there is ",
                           names.empty() ? "nothing" : absl::StrJoin(names, ", ")));
  }
  const TensorInfo& first = tokens != nullptr ? *tokens : *images;
  const int rank = tokens != nullptr ? 2 : 4;
  if (first.shape.rank() != rank) {
    return Wrong(first.name,
                 absl::StrCat("has the shape ", first.shape.ToString(), "; wanted is ",
                              rank == 2 ? "[rows, length]" : "[rows, channels, height, width]"));
  }
  if (first.shape.elements() == 0) {
    return Wrong(first.name, absl::StrCat("is empty: ", first.shape.ToString()));
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (first.shape[0] > kMost || (tokens != nullptr && first.shape.elements() > kMost)) {
    return Wrong(first.name, absl::StrCat("is too large: ", first.shape.ToString()));
  }
  rows_ = first.shape[0];
  Sha256 digest;
  if (tokens != nullptr) {
    length_ = tokens->shape[1];
    RETURN_IF_ERROR(ReadIntegers(*store, key, *tokens, 0, kMost, ids_));
    AddToDigest(digest, *tokens, ids_);
    const auto like_tokens = [&](const TensorInfo& tensor) {
      return tensor.shape == tokens->shape
                 ? absl::OkStatus()
                 : Wrong(tensor.name, absl::StrCat("has the shape ", tensor.shape.ToString(),
                                                   " and ", kIds, " ", tokens->shape.ToString()));
    };
    if (const TensorInfo* const mask = find(kMask)) {
      RETURN_IF_ERROR(like_tokens(*mask));
      RETURN_IF_ERROR(ReadIntegers(*store, key, *mask, 0, 1, mask_));
      AddToDigest(digest, *mask, mask_);
      for (int64_t row = 0; row < rows_; ++row) {
        const auto begin = mask_.begin() + row * length_;
        if (std::find(begin, begin + length_, 1) == begin + length_) {
          return Wrong(kMask, absl::StrCat("leaves nothing of row ", row));
        }
      }
    }
    if (const TensorInfo* const types = find(kTypes)) {
      RETURN_IF_ERROR(like_tokens(*types));
      RETURN_IF_ERROR(ReadIntegers(*store, key, *types, 0, kMost, types_));
      AddToDigest(digest, *types, types_);
    }
  } else {
    if (!IsFloat(images->dtype)) {
      return Wrong(kPixels, absl::StrCat("is ", SafetensorsName(images->dtype),
                                         " and not of a floating type: pixels are wanted as the "
                                         "model's preprocessor gives them out"));
    }
    pixels_ = CastSource(
        std::make_shared<StoredSource>(store, std::string(key), *images,
                                       absl::StrCat("data ", name_, ", ", kPixels), /*file=*/0),
        DType::kF32);
    digest.Update(absl::StrCat(kPixels, images->shape.ToString(), "\n"));
    std::vector<float> block(std::min(images->shape.elements(), kReadBytes));
    for (int64_t at = 0; at < images->shape.elements(); at += kReadBytes) {
      const int64_t count = std::min(images->shape.elements() - at, kReadBytes);
      const auto bytes =
          absl::MakeSpan(reinterpret_cast<std::byte*>(block.data()), count * sizeof(float));
      RETURN_IF_ERROR(pixels_->Read(at, count, bytes, nullptr));
      digest.Update(bytes);
    }
  }
  if (const TensorInfo* const labels = find(kLabels)) {
    labels_of_rows_ = labels->shape == Shape{rows_};
    if (!labels_of_rows_ && (tokens == nullptr || !(labels->shape == tokens->shape))) {
      return Wrong(kLabels,
                   absl::StrCat("has the shape ", labels->shape.ToString(), "; wanted is [", rows_,
                                "]", tokens == nullptr ? "" : " or that of input_ids"));
    }
    RETURN_IF_ERROR(ReadIntegers(*store, key, *labels, kNoLabel, kMost, labels_));
    for (int64_t i = 0; i < static_cast<int64_t>(labels_.size()); ++i) {
      if (labels_[i] < 0 && labels_[i] != kNoLabel) {
        return Wrong(kLabels, absl::StrCat(PlaceOf(labels->shape, i), " is ", labels_[i],
                                           "; it must be a class or -100"));
      }
      if (labels_of_rows_ || labels_[i] == kNoLabel || mask_.empty() || mask_[i] != 0) continue;
      return Wrong(kLabels, absl::StrCat(PlaceOf(labels->shape, i), " is ", labels_[i],
                                         " where attention_mask is 0; use -100 there"));
    }
    AddToDigest(digest, *labels, labels_);
  }
  digest_ = digest.Finish();
  return absl::OkStatus();
}

}  // namespace pewter
