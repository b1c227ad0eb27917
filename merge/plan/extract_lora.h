// Extraction: a plan that writes the difference of two models as a LoRA adapter in PEFT's layout.
//
//   adapter_model.safetensors   base_model.model.MODULE.lora_A.weight [r, in], .lora_B.weight
//                               [out, r] of linear weights and convolutions; of embeddings
//                               .lora_embedding_A [r, tokens], .lora_embedding_B [dim, r];
//                               base_model.model.TENSOR: saved whole (modules_to_save)
//   adapter_config.json         ranks, with lora_alpha = rank: the scale is in the factors
//
// The rank of a module is known from its shape and the options, so that everything but the values
// is planned from headers. With `energy` or `sv_epsilon` it follows from the singular values, which
// are then computed here, in a first pass over the weights.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "merge/plan/plan.h"

namespace pewter {

struct ExtractLoraOptions {
  ModelRef model;
  ModelRef base;
  int64_t max_rank = 128;
  // Regular expressions that are searched for in a module's name; the first match sets its
  // max_rank.
  std::vector<std::pair<std::string, int64_t>> rank_of;
  double energy = 0;  // the least rank that keeps this share of the squared singular values; 0: off
  double sv_epsilon = 0;             // singular values up to it are dropped
  bool distribute_scale = true;      // sqrt(S) into both factors, else all of S into A
  bool embed_lora = false;           // embeddings and output heads as factors, too
  bool skip_undecomposable = false;  // leave out what cannot be factors, else it is saved whole
  std::vector<std::string> save_modules;      // saved whole: last part of a name, or all of it
  std::vector<std::string> include, exclude;  // regular expressions searched for in module names
  DType dtype = DType::kF32;                  // of the factors
};

absl::StatusOr<Plan> MakeExtractLoraPlan(const ExtractLoraOptions& extract,
                                         const PlanOptions& options);

}  // namespace pewter
