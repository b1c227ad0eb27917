// The families of merge/checkpoint/architectures/*.json, compiled in.
//
// templates.json holds named lists of weights and named heads; every other file is
// {"families": [FAMILY...]}. A FAMILY has
//
//   "name": "Qwen2", "model_type": "qwen2"   of class names, and config.json's
//   "like": "llama"                  everything below that is not given is that family's, except
//                                    "architectures"
//   "prefix": ["model."]             of the backbone, or several that checkpoints use
//   "modules": [MODULE...]           components; a family without the key is one MODULE itself
//   "heads": ["*ForCausalLM"]        heads of templates.json; "*" and what stands before it become
//                                    the family's name
//   "architectures": {"LLaMaForCausalLM": HEAD or the name of one}
//   "files": ["preprocessor_config.json"]    copied to the output besides the usual ones
//
// A MODULE has
//
//   "name": "text_decoder", "like": "llama"      the body of that family
//   "at": ["language_model.model."]  between the prefix and the names; several are alternatives
//   "layer_count": ["num_hidden_layers"]     config.json's keys, dotted for nested ones
//   "per_layer_lists": ["layer_types"]       beside them: lists with one entry a layer
//   "pre": [WEIGHT...], "layers": "layers.{layer}.", "layer": [WEIGHT...], "post": [WEIGHT...]
//   "other_endings": {"LayerNorm.weight": "LayerNorm.gamma"}  endings that old files use instead
//
// and a HEAD {"post": [WEIGHT...]} with full names, which go to the last module or to "module",
// "modules" that the class is made of (default: all), and "bare": true when its tensors have no
// prefix, or another "prefix". A WEIGHT is one of
//
//   "self_attn.{q,k,v}_proj.weight"      three names
//   "mlp.{gate,up}_proj.bias?"           optional ones
//   "mlp.experts.{expert}.w1.weight"     a braced word is a number that is counted in the inputs
//   "@attention"                         the list of templates.json
//   {"name": ..., "aliases": [...], "vocabulary": true, "optional": true, "tied": ["x.weight"]}
//                                        "tied": true is the input embedding; either is optional
//   {"one_of": {"dense": [WEIGHT...], "experts": [WEIGHT...]}}   each layer has one of these sets;
//                                        an empty set stands for none
//
// The output's name of a tensor is made with the first prefix and the first "at"; the others, and
// the name without a prefix, are aliases. For a bare model it is the other way round.
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
