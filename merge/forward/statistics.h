// Second moments of features, and the artefact that holds them: statistics.safetensors.
//
// A site is a place in a network where features are taken, named alike in every family (layers
// count from 0):
//
//   residual.K         the residual stream: after the embedding (K = 0), after each attention and
//                      each feed-forward block (K to 2 layers); of post-norm networks what the
//                      norms give out, of pre-norm ones the sums
//   attention_input.L  what query, key and value are made of       query.L, key.L, value.L  these,
//                      before rotary positions and their norms
//   attention.L        the concatenated head contexts: the output projection's input
//   ffn_input.L        what the feed-forward block reads           ffn.L  input of its output
//                      projection
//   transform_input, head_input          of a masked language model's transform and decoder;
//                      head_input is any language model head's
//   pooler_input, classifier_input       one row a sequence
//
// The file, a safetensors one, has for each site, of models i <= j,
//
//   SITE.count     I64 []                 rows: tokens, or sequences
//   SITE.sum.I     F64 [width_i]          sums of the features
//   SITE.square.I  F64 [width_i]          sums of their squares
//   SITE.gram.I.J  F64 [width_i, width_j] sums of their products, where collected
//
// and as metadata "format" = "pewter-statistics-1", "models" and "sites" (JSON lists of names, in
// order) and "data" (the digest of the calibration data). Sums of two files over different data
// may be added.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/safetensors.h"
#include "store/object_store.h"

namespace pewter {

// Of models i and j over the same rows. Nothing is centred or divided.
struct SiteMoments {
  std::string site;
  int64_t count = 0;                         // rows
  std::vector<std::vector<double>> sums;     // [model][feature]
  std::vector<std::vector<double>> squares;  // [model][feature]: the diagonals of the Gram matrices
  // Row-major [width_i, width_j]; grams[i][j] for i <= j; empty where not collected.
  std::vector<std::vector<std::vector<double>>> grams;
};

// An opened artefact. The header is read at once, moments as they are asked for, so that memory
// holds one site at a time. Immutable; may be used from any thread.
class StatisticsReader {
 public:
  // DataLoss when the file is malformed or not such an artefact. Errors name the file.
  static absl::StatusOr<std::shared_ptr<const StatisticsReader>> Open(
      std::shared_ptr<ObjectStore> store, absl::string_view key);
  // A path or URI of the file.
  static absl::StatusOr<std::shared_ptr<const StatisticsReader>> Open(absl::string_view uri);

  const std::vector<std::string>& sites() const { return sites_; }
  const std::vector<std::string>& models() const { return models_; }
  const std::string& data_digest() const { return data_digest_; }
  // The file, for messages.
  const std::string& name() const { return name_; }

  // NotFound when there is no such site.
  absl::StatusOr<SiteMoments> Read(absl::string_view site) const;

 private:
  StatisticsReader() = default;
  absl::Status Load();
  absl::StatusOr<std::vector<double>> ReadValues(const TensorInfo& tensor) const;

  std::shared_ptr<ObjectStore> store_;
  std::string key_, name_;
  std::vector<std::string> sites_, models_;
  std::string data_digest_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
};

}  // namespace pewter
