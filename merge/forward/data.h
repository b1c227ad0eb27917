// ForwardData: what models are run on: token ids or pixels, mostly from one safetensors file.
//
//   input_ids       integers [rows, length]
//   attention_mask  optional, integers or bools [rows, length]: 0 where a row is padded
//   token_type_ids  optional, integers [rows, length]
//   labels          optional, integers [rows, length], -100 where nothing is to be predicted, or
//                   [rows]: classes
//   pixel_values    instead of input_ids: floats [rows, channels, height, width]
//
// Tokens are held in memory, pixels are read as they are needed. Other tensors are not looked at.
// Immutable; may be used from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/checkpoint/tensor_source.h"
#include "store/object_store.h"

namespace pewter {

// A label that asks for nothing.
inline constexpr int32_t kNoLabel = -100;

class ForwardData {
 public:
  // FailedPrecondition when a tensor is missing, is of another kind or shape, is empty, or has
  // values that cannot be; DataLoss for a damaged file. Errors name the file and the place.
  static absl::StatusOr<std::shared_ptr<const ForwardData>> Open(std::shared_ptr<ObjectStore> store,
                                                                 absl::string_view key);
  // A path or URI of the file.
  static absl::StatusOr<std::shared_ptr<const ForwardData>> Open(absl::string_view uri);
  // Texts as token ids, of any lengths but 0; at least one.
  static std::shared_ptr<const ForwardData> OfTokens(std::string name,
                                                     absl::Span<const std::vector<int32_t>> rows);

  const std::string& name() const { return name_; }      // the file, for messages
  const std::string& digest() const { return digest_; }  // SHA-256 of all values
  int64_t rows() const { return rows_; }

  // Tokens, [rows, length]; `mask` (1: counts) and `types` may be empty.
  bool has_tokens() const { return pixels_ == nullptr; }
  int64_t length() const { return length_; }
  absl::Span<const int32_t> ids() const { return ids_; }
  absl::Span<const uint8_t> mask() const { return mask_; }
  absl::Span<const int32_t> types() const { return types_; }
  bool real(int64_t row, int64_t column) const {
    return mask_.empty() || mask_[row * length_ + column] != 0;
  }

  // [rows, length] or [rows]; empty when there are none.
  absl::Span<const int32_t> labels() const { return labels_; }
  bool labels_of_rows() const { return labels_of_rows_; }

  // Float32 [rows, channels, height, width]; null for tokens.
  const TensorSource* pixels() const { return pixels_.get(); }

 private:
  ForwardData() = default;
  absl::Status Load(std::shared_ptr<ObjectStore> store, absl::string_view key);

  std::string name_, digest_;
  int64_t rows_ = 0, length_ = 0;
  std::vector<int32_t> ids_, types_, labels_;
  std::vector<uint8_t> mask_;
  bool labels_of_rows_ = false;
  std::shared_ptr<const TensorSource> pixels_;
};

}  // namespace pewter
