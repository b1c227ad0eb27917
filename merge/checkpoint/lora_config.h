// LoraConfig: adapter_config.json of a PEFT LoRA adapter.
//
//   {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": false, "fan_in_fan_out": false,
//    "rank_pattern": {PATTERN: 4, ...}, "alpha_pattern": {PATTERN: 32, ...}, ...}
//
// A PATTERN is a regular expression for the end of a module's name, whole parts of it ("q_proj",
// "layers\.[01]\.mlp"); the first that matches, in the order of the file, counts.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace re2 {
class RE2;
}

namespace pewter {

class LoraConfig {
 public:
  // FailedPrecondition for an adapter of another type and for features that are not supported.
  static absl::StatusOr<LoraConfig> Parse(absl::string_view json);

  int64_t Rank(absl::string_view module) const;
  // Of all that it speaks of, whether there is such a module or not.
  int64_t largest_rank() const;
  // What B A is multiplied with.
  float Scale(absl::string_view module) const;
  // The weights of linear modules are stored [in, out].
  bool fan_in_fan_out() const { return fan_in_fan_out_; }

 private:
  struct Pattern {
    std::shared_ptr<const re2::RE2> module;
    double value = 0;
  };

  int64_t rank_ = 0;
  double alpha_ = 0;
  bool use_rslora_ = false;
  bool fan_in_fan_out_ = false;
  std::vector<Pattern> rank_patterns_;
  std::vector<Pattern> alpha_patterns_;
};

}  // namespace pewter
