// The symmetries of symmetries.json, compiled in: {"families": [FAMILY...]}. A FAMILY has
//
//   "name": "bert", "model_types": ["bert", ...]      of config.json
//   "like": "llama"                  all that is not given is that family's
//   "prefixes": ["bert."]            that names may have
//   "attentions": [ATTENTION...]     "query": "qk.{layer}", ...: names of groups; "heads",
//   "kv_heads",
//                                    "head_dim": config.json's keys (the last two may be missing
//                                    there); "rotary", "normed", "head_order": as in symmetry.h
//   "tied": [{"group": "head", "to": "res", "by": ["lm_head.decoder.weight"]}]    the group is the
//                                    other one in models that do not store these tensors, or whose
//                                    configuration ties them to the embeddings (the default)
//   "tensors": {NAME: AXES}          with lists in braces, {layer} and {expert}; "more" adds to
//   them "classes": {ENDING: {NAME: AXES}}    instead, for classes whose name has that ending
//
// AXES has, for each axis, "" or a group or a list of groups that follow each other; [] stands for
// a tensor of any rank where nothing moves. In front of a group stands its role (FeatureRole): "+"
// produced, "-" consumed, "*" dual, nothing: ordered; and "~" before that: redundant.
//
// A group's kind follows from its name: what stands before the first dot.
#pragma once

namespace pewter {

extern const char* const kSymmetries;

}  // namespace pewter
