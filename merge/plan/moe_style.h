// The kinds of mixtures that `pewter moe` makes: what they are made from, what their tensors are
// called, what config.json says of them. Names and settings are mergekit-moe's; the settings are
// those of the classes in transformers that read the mixtures.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "base/dtype.h"

namespace pewter {

struct MoeStyle {
  const char* name;  // mergekit's
  const char* architecture;
  const char* model_type;
  std::vector<const char*> from;  // model types of the dense models
  int least_shared = 0;
  int most_shared = 0;
  bool gated_shared = false;  // the shared expert has a gate of its own
  bool query_biases = false;  // there is a place for biases of queries, keys and values
  bool other_biases = false;  // and for all others, but for those of MLPs
  bool fused = false;         // unless experts are asked for one by one
  // Of one layer, behind "model.layers.N.": routers of fused experts and of experts one by one,
  // these, the shared expert, and what the three matrices are called there. The names have
  // {expert} and {part}.
  const char* router;
  const char* separate_router;
  const char* separate_expert;
  const char* shared = nullptr;
  std::map<std::string, const char*> parts;
};

// In the order in which they are tried.
absl::Span<const MoeStyle> MoeStyles();

// What config.json is to say. Widths are those of the experts' MLPs.
struct MoeSizes {
  int64_t experts = 0;
  int64_t experts_per_token = 0;
  int64_t shared = 0;  // experts
  int64_t width = 0;
  int64_t shared_width = 0;
  int64_t tokens = 0;          // rows of the embedding
  std::optional<DType> dtype;  // of the output's tensors, where they have one
};

// The text of config.json: `base_config`, a JSON object, with the mixture's settings. Settings that
// the base leaves to the defaults of its own class are written out where the mixture's class has
// others.
std::string MoeConfigJson(const MoeStyle& style, const std::string& base_config,
                          const MoeSizes& sizes, std::vector<std::string>& warnings);

}  // namespace pewter
