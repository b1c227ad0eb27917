#include "merge/align/symmetry.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/align/table.h"
#include "merge/checkpoint/architecture_data.h"

namespace pewter {
namespace {

using nlohmann::json;

// Heads and their widths are config.json's numbers: nobody has more.
constexpr int64_t kMaxFeatures = int64_t{1} << 24;

struct Family {
  json data;
  std::vector<std::pair<std::string, json>> tensors;  // patterns, lists expanded
};

// The table is part of the program: a malformed one is our bug and shows in the first test.
const std::vector<Family>& Families() {
  static const std::vector<Family>* const families = [] {
    auto* result = new std::vector<Family>;
    const json table = json::parse(kSymmetries);
    for (json data : table.at("families")) {
      if (data.contains("like")) {
        const auto like = absl::c_find_if(
            *result, [&](const Family& f) { return f.data.at("name") == data.at("like"); });
        for (const auto& [key, value] : like->data.items()) {
          if (!data.contains(key)) data[key] = value;
        }
      }
      Family family;
      for (const char* key : {"tensors", "more"}) {
        const json tensors = data.value(key, json::object());
        for (const auto& [names, axes] : tensors.items()) {
          for (std::string& name : ExpandLists(names)) {
            family.tensors.push_back({std::move(name), axes});
          }
        }
      }
      family.data = std::move(data);
      result->push_back(std::move(family));
    }
    return result;
  }();
  return *families;
}

using Numbers = std::map<std::string, std::string>;  // "{layer}" -> "3"

// Whether `name` is `pattern` with numbers for its braced words.
bool Match(absl::string_view pattern, absl::string_view name, Numbers& numbers) {
  while (!pattern.empty()) {
    if (pattern[0] != '{') {
      if (name.empty() || name[0] != pattern[0]) return false;
      pattern.remove_prefix(1);
      name.remove_prefix(1);
      continue;
    }
    const size_t close = pattern.find('}') + 1;
    const size_t digits = absl::c_find_if_not(name, absl::ascii_isdigit) - name.begin();
    int64_t number = 0;
    if (!absl::SimpleAtoi(name.substr(0, digits), &number)) return false;
    numbers[std::string(pattern.substr(0, close))] = std::string(name.substr(0, digits));
    pattern.remove_prefix(close);
    name.remove_prefix(digits);
  }
  return name.empty();
}

std::string Fill(const std::string& text, const Numbers& numbers) {
  return absl::StrReplaceAll(text, numbers);
}

GroupKind KindOf(absl::string_view group) {
  static const auto* const kinds = new std::map<absl::string_view, GroupKind>{
      {"res", GroupKind::kResidual},   {"ff", GroupKind::kFfn},    {"qk", GroupKind::kQueryKey},
      {"vo", GroupKind::kValueOutput}, {"q", GroupKind::kQuery},   {"k", GroupKind::kKey},
      {"v", GroupKind::kValue},        {"o", GroupKind::kOutput},  {"heads", GroupKind::kHeads},
      {"pool", GroupKind::kPooler},    {"head", GroupKind::kHead}, {"classifier", GroupKind::kHead},
  };
  return kinds->at(group.substr(0, group.find('.')));
}

std::string Ref(const Checkpoint& model) { return absl::StrCat("model ", model.ref().ToString()); }

// A whole number of config.json; absent where there is no such key.
absl::StatusOr<std::optional<int64_t>> Setting(const Checkpoint& model, const json& config,
                                               const std::string& key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return std::optional<int64_t>();
  if (!it->is_number_integer() || *it < 1 || *it > kMaxFeatures) {
    return absl::FailedPreconditionError(absl::StrCat(
        Ref(model), ": \"", key, "\" in config.json is not a number of heads or features"));
  }
  return std::optional<int64_t>(it->get<int64_t>());
}

bool IsPermutation(absl::Span<const int32_t> values, int64_t width) {
  if (static_cast<int64_t>(values.size()) != width) return false;
  std::vector<bool> seen(width);
  for (const int32_t value : values) {
    if (value < 0 || value >= width || seen[value]) return false;
    seen[value] = true;
  }
  return true;
}

}  // namespace

absl::string_view GroupKindName(GroupKind kind) {
  switch (kind) {
    case GroupKind::kResidual:
      return "residual stream";
    case GroupKind::kFfn:
      return "feed-forward";
    case GroupKind::kQueryKey:
      return "query/key";
    case GroupKind::kValueOutput:
      return "value/output";
    case GroupKind::kQuery:
      return "query";
    case GroupKind::kKey:
      return "key";
    case GroupKind::kValue:
      return "value";
    case GroupKind::kOutput:
      return "attention output";
    case GroupKind::kHeads:
      return "head order";
    case GroupKind::kPooler:
      return "pooler";
    case GroupKind::kHead:
      return "output head";
  }
  return "";
}

AttentionOrder IdentityOrder(const Attention& attention) {
  AttentionOrder order;
  order.kv_heads.resize(attention.kv_heads);
  absl::c_iota(order.kv_heads, 0);
  order.heads.resize(attention.heads);
  absl::c_iota(order.heads, 0);
  order.query_key.resize(attention.kv_heads * attention.head_dim);
  for (size_t i = 0; i < order.query_key.size(); ++i) {
    order.query_key[i] = static_cast<int32_t>(i % attention.head_dim);
  }
  order.value_output = order.query_key;
  return order;
}

AttentionPermutations Expand(const Attention& attention, const AttentionOrder& order) {
  const int64_t dim = attention.head_dim;
  const int64_t shared = attention.heads / attention.kv_heads;
  const auto expand = [dim](absl::Span<const int32_t> heads, absl::Span<const int32_t> within,
                            int64_t queries) {
    std::vector<int32_t> result(heads.size() * dim);
    for (size_t i = 0; i < result.size(); ++i) {
      const int64_t head = i / dim;
      result[i] = static_cast<int32_t>(heads[head] * dim + within[head / queries * dim + i % dim]);
    }
    return result;
  };
  return {.query = expand(order.heads, order.query_key, shared),
          .key = expand(order.kv_heads, order.query_key, 1),
          .value = expand(order.kv_heads, order.value_output, 1),
          .output = expand(order.heads, order.value_output, shared)};
}

absl::StatusOr<AttentionOrder> ToOrder(const Attention& attention,
                                       const AttentionPermutations& permutations) {
  const int64_t dim = attention.head_dim;
  const auto fail = [&](absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat(attention.name, ": ", what));
  };
  // Which head each slot takes, and the order inside it.
  const auto split = [&](absl::Span<const int32_t> permutation, int64_t heads,
                         std::vector<int32_t>& head_of,
                         std::vector<int32_t>& within) -> absl::Status {
    if (!IsPermutation(permutation, heads * dim)) {
      return fail(absl::StrCat("not a permutation of ", heads * dim, " features"));
    }
    head_of.resize(heads);
    within.resize(permutation.size());
    for (size_t i = 0; i < permutation.size(); ++i) {
      const int32_t head = static_cast<int32_t>(permutation[i] / dim);
      if (i % dim == 0) head_of[i / dim] = head;
      if (head != head_of[i / dim]) return fail("features leave their head");
      within[i] = static_cast<int32_t>(permutation[i] % dim);
    }
    return absl::OkStatus();
  };
  AttentionOrder order;
  std::vector<int32_t> heads, value_heads, within_query, within_output;
  RETURN_IF_ERROR(split(permutations.query, attention.heads, order.heads, within_query));
  RETURN_IF_ERROR(split(permutations.output, attention.heads, heads, within_output));
  RETURN_IF_ERROR(split(permutations.key, attention.kv_heads, order.kv_heads, order.query_key));
  RETURN_IF_ERROR(split(permutations.value, attention.kv_heads, value_heads, order.value_output));
  if (heads != order.heads || value_heads != order.kv_heads) {
    return fail("heads of queries and keys and heads of values have orders of their own");
  }
  const int64_t shared = attention.heads / attention.kv_heads;
  for (int64_t head = 0; head < attention.heads; ++head) {
    const int64_t kv = head / shared;
    if (order.heads[head] / shared != order.kv_heads[kv]) {
      return fail("query heads leave the keys and values that they read");
    }
    for (int64_t i = 0; i < dim; ++i) {
      if (within_query[head * dim + i] != order.query_key[kv * dim + i] ||
          within_output[head * dim + i] != order.value_output[kv * dim + i]) {
        return fail("query heads that share keys and values have orders of their own inside");
      }
      if (attention.rotary && order.query_key[kv * dim + i] != i) {
        return fail(
            "the order inside a query or key head is fixed: RoPE turns each pair of "
            "features at its own frequency");
      }
    }
  }
  return order;
}

int Symmetry::FindGroup(absl::string_view name) const {
  const auto it = group_index_.find(name);
  return it == group_index_.end() ? -1 : it->second;
}

const SymmetricTensor* Symmetry::Find(absl::string_view tensor) const {
  const auto it = tensor_index_.find(tensor);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

// Fills in a Symmetry, tensor by tensor.
class SymmetryReader {
 public:
  SymmetryReader(Models models, const Family& family, Symmetry& symmetry)
      : models_(models), family_(family), symmetry_(symmetry) {}

  absl::Status Read(const Architecture& architecture, absl::Span<const json> configs) {
    configs_ = configs;
    SetTied();
    for (const auto& module : architecture.modules()) {
      for (const ArchTensor& tensor : module->pre()) {
        RETURN_IF_ERROR(AddTensor(architecture, tensor));
      }
      ASSIGN_OR_RETURN(const int64_t layers, LayerCount(*module));
      for (int64_t layer = 0; layer < layers; ++layer) {
        for (const ArchTensor& tensor : module->LayerTensors(layer)) {
          RETURN_IF_ERROR(AddTensor(architecture, tensor));
        }
      }
      for (const ArchTensor& tensor : module->post()) {
        RETURN_IF_ERROR(AddTensor(architecture, tensor));
      }
    }
    // What an architecture does not merge (the transform of a masked-LM head) is part of the
    // network all the same.
    for (const std::string& name : models_[0]->tensor_names()) {
      Numbers numbers;
      if (stored_.contains(name) || FindAxes(architecture, name, numbers) == nullptr) continue;
      RETURN_IF_ERROR(AddTensor(architecture, {.name = name}));
    }
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<int64_t> LayerCount(const ArchModule& module) const {
    ASSIGN_OR_RETURN(const int64_t layers, module.LayerCount(*models_[0]));
    for (const auto& model : models_.subspan(1)) {
      ASSIGN_OR_RETURN(const int64_t other, module.LayerCount(*model));
      if (other == layers) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("layers differ: ", Ref(*models_[0]), " has ", layers, ", ", Ref(*model),
                       " has ", other, "; models are aligned layer by layer"));
    }
    return layers;
  }

  // Groups that are another one in these models.
  void SetTied() {
    for (const json& tie : family_.data.value("tied", json::array())) {
      bool tied = false;
      for (size_t i = 0; i < models_.size(); ++i) {
        const auto it = configs_[i].find("tie_word_embeddings");
        const bool says_tied = it == configs_[i].end() || !it->is_boolean() || it->get<bool>();
        const bool stored = absl::c_any_of(tie.at("by"), [&](const json& name) {
          return models_[i]->Find(name.get_ref<const std::string&>()) != nullptr;
        });
        tied = tied || says_tied || !stored;
      }
      if (tied) symmetry_.tied_[tie.at("group")] = tie.at("to");
    }
  }

  // The table's axes for a tensor, and its numbers. Null when it does not know the name.
  const json* FindAxes(const Architecture& architecture, absl::string_view name,
                       Numbers& numbers) const {
    for (const json& prefix : family_.data.at("prefixes")) {
      if (absl::ConsumePrefix(&name, prefix.get_ref<const std::string&>())) break;
    }
    if (family_.data.contains("classes")) {
      for (const auto& [ending, tensors] : family_.data.at("classes").items()) {
        const auto it = tensors.find(std::string(name));
        if (absl::EndsWith(architecture.name(), ending) && it != tensors.end()) return &*it;
      }
    }
    for (const auto& [pattern, axes] : family_.tensors) {
      numbers.clear();
      if (Match(pattern, name, numbers)) return &axes;
    }
    return nullptr;
  }

  absl::Status AddTensor(const Architecture& architecture, const ArchTensor& tensor) {
    const Checkpoint* first = nullptr;
    for (const auto& model : models_) {
      if (first == nullptr && !StoredName(*model, tensor, /*with_tied=*/false).empty()) {
        first = model.get();
      }
    }
    if (first == nullptr) return absl::OkStatus();
    Numbers numbers;
    const json* axes = FindAxes(architecture, tensor.name, numbers);
    if (axes == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          Ref(*first), ", tensor ", tensor.name, ": the symmetries of the family ",
          symmetry_.family_, " do not say how it is aligned; models that have it cannot be"));
    }
    SymmetricTensor result{.tensor = tensor};
    for (const auto& model : models_) {
      const std::string stored = StoredName(*model, tensor, /*with_tied=*/true);
      if (stored.empty()) continue;
      stored_.insert(stored);
      const TensorInfo& info = *model->Find(stored);
      const Shape& shape = info.shape;
      if (model.get() == first) {
        result.shape = shape;
        result.dtype = info.dtype;
      }
      result.axes.clear();
      RETURN_IF_ERROR(
          Annotate(ReadAxes(*axes, numbers, shape, result.axes),
                   absl::StrCat(Ref(*model), ", tensor ", stored, " ", shape.ToString())));
    }
    symmetry_.tensor_index_[tensor.name] = static_cast<int>(symmetry_.tensors_.size());
    symmetry_.tensors_.push_back(std::move(result));
    return absl::OkStatus();
  }

  absl::Status ReadAxes(const json& list, const Numbers& numbers, const Shape& shape,
                        std::vector<std::vector<AxisSegment>>& axes) {
    axes.resize(shape.rank());
    if (list.empty()) return absl::OkStatus();
    if (static_cast<int>(list.size()) != shape.rank()) {
      return absl::FailedPreconditionError(
          absl::StrCat("the family ", symmetry_.family_, " has it with ", list.size(), " axes"));
    }
    for (int axis = 0; axis < shape.rank(); ++axis) {
      const json segments = list[axis].is_array() ? list[axis] : json::array({list[axis]});
      if (segments.size() == 1 && segments[0] == "") continue;
      int64_t width = 0;
      for (const json& segment : segments) {
        ASSIGN_OR_RETURN(const AxisSegment read,
                         ReadSegment(segment.get_ref<const std::string&>(), numbers,
                                     segments.size() == 1 ? std::optional<int64_t>(shape[axis])
                                                          : std::optional<int64_t>()));
        width += symmetry_.groups_[read.group].width;
        axes[axis].push_back(read);
      }
      if (width == shape[axis]) continue;
      const auto name = [&](const AxisSegment& segment) {
        return symmetry_.groups_[segment.group].name;
      };
      std::vector<std::string> names;
      for (const AxisSegment& segment : axes[axis]) names.push_back(name(segment));
      return absl::FailedPreconditionError(absl::StrCat(
          "axis ", axis, " has ", shape[axis], " features, and ", absl::StrJoin(names, " + "),
          " has ", width, " by config.json and the other tensors"));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<AxisSegment> ReadSegment(absl::string_view text, const Numbers& numbers,
                                          std::optional<int64_t> extent) {
    AxisSegment segment;
    segment.redundant = absl::ConsumePrefix(&text, "~");
    if (absl::ConsumePrefix(&text, "+")) segment.role = FeatureRole::kProduced;
    if (absl::ConsumePrefix(&text, "-")) segment.role = FeatureRole::kConsumed;
    if (absl::ConsumePrefix(&text, "*")) segment.role = FeatureRole::kDual;
    const auto tied = symmetry_.tied_.find(std::string(text));
    ASSIGN_OR_RETURN(
        segment.group,
        Group(tied == symmetry_.tied_.end() ? std::string(text) : tied->second, numbers, extent));
    return segment;
  }

  // The group of a template; made, with its attention, where it is new. `extent` is its width where
  // no configuration tells it.
  absl::StatusOr<int> Group(const std::string& pattern, const Numbers& numbers,
                            std::optional<int64_t> extent) {
    const std::string name = Fill(pattern, numbers);
    if (const int group = symmetry_.FindGroup(name); group >= 0) return group;
    for (const json& attention : family_.data.at("attentions")) {
      for (const char* role : {"query", "key", "value", "output", "head_order"}) {
        const auto it = attention.find(role);
        if (it == attention.end() || *it != pattern) continue;
        if (absl::string_view(role) == "head_order") {
          ASSIGN_OR_RETURN(const Attention geometry, Geometry(attention));
          extent = geometry.heads;
          break;
        }
        RETURN_IF_ERROR(AddAttention(attention, numbers));
        return symmetry_.FindGroup(name);
      }
    }
    return AddGroup(name, numbers, *extent);
  }

  int AddGroup(const std::string& name, const Numbers& numbers, int64_t width) {
    if (const int group = symmetry_.FindGroup(name); group >= 0) return group;
    SymmetryGroup group{.name = name, .kind = KindOf(name), .width = width};
    const auto layer = numbers.find("{layer}");
    if (layer != numbers.end() && absl::StrContains(name, '.') && group.kind != GroupKind::kHeads) {
      (void)absl::SimpleAtoi(layer->second, &group.layer);
    }
    const int index = static_cast<int>(symmetry_.groups_.size());
    symmetry_.group_index_[name] = index;
    symmetry_.groups_.push_back(std::move(group));
    return index;
  }

  // Head counts, the same in all models.
  absl::StatusOr<Attention> Geometry(const json& data) const {
    Attention first;
    for (size_t i = 0; i < models_.size(); ++i) {
      const std::string heads_key = data.at("heads");
      ASSIGN_OR_RETURN(const std::optional<int64_t> heads,
                       Setting(*models_[i], configs_[i], heads_key));
      if (!heads.has_value()) {
        return absl::FailedPreconditionError(
            absl::StrCat(Ref(*models_[i]), ": config.json has no \"", heads_key, "\""));
      }
      Attention attention{.heads = *heads, .kv_heads = *heads};
      if (data.contains("kv_heads")) {
        ASSIGN_OR_RETURN(const auto kv_heads, Setting(*models_[i], configs_[i], data["kv_heads"]));
        attention.kv_heads = kv_heads.value_or(*heads);
      }
      if (attention.heads % attention.kv_heads != 0) {
        return absl::FailedPreconditionError(
            absl::StrCat(Ref(*models_[i]), ": ", attention.heads, " heads cannot share ",
                         attention.kv_heads, " key/value heads (config.json)"));
      }
      ASSIGN_OR_RETURN(attention.head_dim, HeadDim(data, i, attention.heads));
      if (i == 0) {
        first = attention;
      } else if (attention.heads != first.heads || attention.kv_heads != first.kv_heads ||
                 attention.head_dim != first.head_dim) {
        const auto text = [](const Attention& a) {
          return absl::StrCat(a.heads, " heads (", a.kv_heads, " of keys and values) of ",
                              a.head_dim, " features");
        };
        return absl::FailedPreconditionError(
            absl::StrCat("attention heads differ: ", Ref(*models_[0]), " has ", text(first), ", ",
                         Ref(*models_[i]), " has ", text(attention)));
      }
    }
    return first;
  }

  absl::StatusOr<int64_t> HeadDim(const json& data, size_t model, int64_t heads) const {
    if (data.contains("head_dim")) {
      ASSIGN_OR_RETURN(const auto dim, Setting(*models_[model], configs_[model], data["head_dim"]));
      if (dim.has_value()) return *dim;
    }
    // The residual stream, which every table's first tensor has.
    const int residual = symmetry_.FindGroup("res");
    const int64_t width = residual < 0 ? 0 : symmetry_.groups_[residual].width;
    if (width == 0 || width % heads != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat(Ref(*models_[model]), ": ", heads, " heads (", data.at("heads").dump(),
                       " in config.json) do not divide ", width, " features"));
    }
    return width / heads;
  }

  absl::Status AddAttention(const json& data, const Numbers& numbers) {
    ASSIGN_OR_RETURN(Attention attention, Geometry(data));
    attention.name = Fill(data.at("name"), numbers);
    attention.rotary = data.value("rotary", false);
    attention.normed = data.value("normed", false);
    (void)absl::SimpleAtoi(numbers.at("{layer}"), &attention.layer);
    const int index = static_cast<int>(symmetry_.attentions_.size());
    const auto group = [&](const char* role, int64_t heads) {
      const int id = AddGroup(Fill(data.at(role), numbers), numbers, heads * attention.head_dim);
      symmetry_.groups_[id].attention = index;
      return id;
    };
    attention.query = group("query", attention.heads);
    attention.key = group("key", attention.kv_heads);
    attention.value = group("value", attention.kv_heads);
    attention.output = group("output", attention.heads);
    if (data.contains("head_order")) {
      attention.head_order =
          AddGroup(Fill(data.at("head_order"), numbers), numbers, attention.heads);
    }
    symmetry_.attentions_.push_back(std::move(attention));
    return absl::OkStatus();
  }

  const Models models_;
  const Family& family_;
  Symmetry& symmetry_;
  std::set<std::string> stored_;  // names of tensors that have been added
  absl::Span<const json> configs_;
};

absl::StatusOr<Symmetry> Symmetry::Make(const Architecture& architecture, Models models) {
  std::vector<json> configs;
  for (const auto& model : models) {
    if (model->raw()) {
      return absl::FailedPreconditionError(absl::StrCat(
          Ref(*model), " has no config.json, which says what its attention heads are"));
    }
    ASSIGN_OR_RETURN(json config, ParseConfig(*model));
    configs.push_back(std::move(config));
  }
  const auto type_of = [&](size_t model) { return configs[model].value("model_type", json()); };
  const json type = type_of(0);
  std::vector<std::string> known;
  for (const Family& family : Families()) {
    const json& types = family.data.at("model_types");
    if (absl::c_find(types, type) != types.end()) {
      for (size_t i = 1; i < models.size(); ++i) {
        if (absl::c_find(types, type_of(i)) != types.end()) continue;
        return absl::FailedPreconditionError(absl::StrCat(
            "architectures differ: ", Ref(*models[0]), " has model type ", type.dump(), ", ",
            Ref(*models[i]), " has ", type_of(i).dump(), "; only like models can be aligned"));
      }
      Symmetry symmetry;
      symmetry.family_ = family.data.at("name");
      RETURN_IF_ERROR(SymmetryReader(models, family, symmetry).Read(architecture, configs));
      return symmetry;
    }
    for (const json& one : types) known.push_back(one);
  }
  return absl::FailedPreconditionError(
      absl::StrCat(Ref(*models[0]), ": the symmetries of model type ",
                   type.is_string() ? type.get<std::string>() : "(none)",
                   " are not known; models can be aligned of: ", absl::StrJoin(known, ", ")));
}

}  // namespace pewter
