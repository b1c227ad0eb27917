// The families of merge/checkpoint/architectures/*.json, compiled in. The form of a file:
//
//   {"model_type": "llama",                       config.json's model_type
//    "layer_count": "num_hidden_layers",          config.json's key
//    "per_layer_lists": ["layer_types"],          config.json's lists with one entry a layer
//    "prefix": "model.",                          of the backbone's tensors
//    "legacy_names": {"LayerNorm.weight": "LayerNorm.gamma"},   endings that old files use instead
//    "pre": [WEIGHT...], "layer": [...], "post": [...],         the backbone, without the prefix
//    "architectures": {                           config.json's architectures[0]
//      "LlamaForCausalLM": {"post": [WEIGHT...]}, the head's tensors, full names
//      "LlamaModel": {"bare": true},              the backbone alone, written without the prefix
//      "LLaMaForCausalLM": "LlamaForCausalLM"}}   another name for one of them
//
//   WEIGHT: NAME, or {"name": NAME, "optional": true, "vocabulary": true, "tied": [NAME...]}
//
// NAME may have {layer}. Every backbone tensor is also found under the other form of its name, with
// or without the prefix; the output's name is the first form.
#pragma once

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace pewter {

struct ArchitectureFile {
  const char* name;  // "llama.json"
  const char* json;
};

absl::Span<const ArchitectureFile> ArchitectureFiles();

}  // namespace pewter
