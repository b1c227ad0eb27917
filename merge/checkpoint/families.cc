#include "merge/checkpoint/families.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/checkpoint/architectures/table.h"

namespace pewter {

using nlohmann::json;

struct KnownArchitecture {
  std::string name;        // "Qwen2ForCausalLM"
  std::string model_type;  // "qwen2"
  const json* family;      // without "like"
  json head;
};

namespace {

// Lists with one entry a layer that configurations have beside their layer count.
constexpr const char* kPerLayerLists[] = {"layer_types", "mlp_layer_types", "no_rope_layers",
                                          "layers_block_type"};

// The files are part of the program: a malformed one is our bug and shows in the first test. What
// at() and get() throw on then is not caught.
struct Tables {
  json templates;
  std::map<std::string, json> families;  // by model_type
  std::multimap<std::string, KnownArchitecture> architectures;
};

std::vector<std::string> Strings(const json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() ? std::vector<std::string>{} : it->get<std::vector<std::string>>();
}

// `own`'s keys, and those of `like` that it lacks.
void Inherit(const json& like, json& own) {
  for (const auto& [key, value] : like.items()) {
    if (key != "architectures" && !own.contains(key)) own[key] = value;
  }
}

void AddArchitectures(const json& family, Tables& tables) {
  const json& heads = tables.templates.at("heads");
  const std::string type = family.at("model_type");
  const auto add = [&](const std::string& name, const json& head) {
    tables.architectures.emplace(name,
                                 KnownArchitecture{name, type, &tables.families.at(type), head});
  };
  for (const std::string& head : Strings(family, "heads")) {
    const std::vector<std::string> parts = absl::StrSplit(head, absl::MaxSplits('*', 1));
    add(absl::StrCat(family.at("name").get<std::string>(), parts.at(1)), heads.at(head));
  }
  const json own = family.value("architectures", json::object());
  for (const auto& [name, head] : own.items()) {
    if (head.is_string()) {
      const std::string other = head.get<std::string>();
      add(name, own.contains(other) ? own.at(other) : heads.at(other));
    } else {
      add(name, head);
    }
  }
}

const Tables& AllTables() {
  static const Tables* const tables = [] {
    auto* result = new Tables;
    std::vector<json> families;
    for (const ArchitectureFile& file : ArchitectureFiles()) {
      const json content = json::parse(file.json);
      if (!content.contains("families")) result->templates = content;
      for (const json& family : content.value("families", json::array())) {
        families.push_back(family);
      }
    }
    // A family may be like one of another file: those that can be resolved first.
    while (!families.empty()) {
      std::vector<json> later;
      for (json& family : families) {
        if (family.contains("like")) {
          const auto like = result->families.find(family.at("like").get<std::string>());
          if (like == result->families.end()) {
            later.push_back(std::move(family));
            continue;
          }
          Inherit(like->second, family);
        }
        const std::string type = family.at("model_type");
        result->families[type] = std::move(family);
      }
      if (later.size() == families.size()) break;  // like a family that is not there
      families = std::move(later);
    }
    for (const auto& [type, family] : result->families) AddArchitectures(family, *result);
    return result;
  }();
  return *tables;
}

// Where a braced word other than {layer} stands in a template; npos when there is none.
std::pair<size_t, size_t> FindCounted(absl::string_view name) {
  for (size_t open = name.find('{'); open != name.npos; open = name.find('{', open + 1)) {
    const size_t close = name.find('}', open) + 1;
    if (name.substr(open, close - open) != kLayer) return {open, close};
  }
  return {name.npos, name.npos};
}

class FamilyReader {
 public:
  FamilyReader(const KnownArchitecture& known, Models inputs)
      : known_(known), family_(*known.family), inputs_(inputs) {}

  absl::StatusOr<ArchitecturePtr> Read() {
    auto architecture = std::make_shared<ArchitectureData>();
    architecture->name_ = known_.name;
    architecture->tagalong_files_ = Strings(family_, "files");
    const json& head = known_.head;
    const json modules = family_.value("modules", json::array({family_}));
    const std::vector<std::string> used = Strings(head, "modules");
    for (json module : modules) {
      // A family that is its own only module has no "modules"; its name is that of its classes.
      const std::string name =
          family_.contains("modules") ? module.at("name").get<std::string>() : "default";
      if (!used.empty() && std::find(used.begin(), used.end(), name) == used.end()) continue;
      if (family_.contains("modules") && module.contains("like")) {
        Inherit(AllTables().families.at(module.at("like").get<std::string>()), module);
      }
      auto data = std::make_unique<ModuleData>();
      data->name_ = name;
      RETURN_IF_ERROR(ReadModule(module, *data));
      architecture->modules_.push_back(std::move(data));
    }
    const std::string target = head.value("module", architecture->modules_.back()->name());
    for (auto& module : architecture->modules_) {
      if (module->name() != target) continue;
      forms_ = {""};
      endings_.clear();
      RETURN_IF_ERROR(
          ReadList(head.value("post", json::array()), static_cast<ModuleData&>(*module).post_));
    }
    Tie(*architecture);
    return architecture;
  }

 private:
  absl::Status ReadModule(const json& module, ModuleData& data) {
    if (module.contains("layer")) {
      data.layer_count_keys_ = Strings(module, "layer_count");
      if (data.layer_count_keys_.empty()) data.layer_count_keys_ = {"num_hidden_layers"};
    }
    for (const std::string& key : data.layer_count_keys_) {
      const std::string beside(key, 0, key.rfind('.') + 1);  // "text_config."
      for (const char* list : kPerLayerLists) {
        data.per_layer_keys_.push_back(absl::StrCat(beside, list));
      }
      for (const std::string& list : Strings(module, "per_layer_lists")) {
        data.per_layer_keys_.push_back(absl::StrCat(beside, list));
      }
    }
    std::sort(data.per_layer_keys_.begin(), data.per_layer_keys_.end());
    data.per_layer_keys_.erase(
        std::unique(data.per_layer_keys_.begin(), data.per_layer_keys_.end()),
        data.per_layer_keys_.end());

    endings_.clear();
    if (const auto it = module.find("other_endings"); it != module.end()) {
      endings_ = it->get<std::map<std::string, std::string>>();
    }
    SetForms(module, "");
    RETURN_IF_ERROR(ReadList(module.value("pre", json::array()), data.pre_));
    RETURN_IF_ERROR(ReadList(module.value("post", json::array()), data.post_));
    SetForms(module, module.value("layers", std::string()));
    return ReadList(module.value("layer", json::array()), data.layer_);
  }

  // What may stand in front of a name; the first is the output's.
  void SetForms(const json& module, const std::string& layers) {
    std::vector<std::string> prefixes = known_.head.contains("prefix")
                                            ? Strings(known_.head, "prefix")
                                            : Strings(family_, "prefix");
    // Modules that lie at a place of their own are not looked for without it.
    if (!module.contains("at")) {
      const bool bare = known_.head.value("bare", false);
      if (std::find(prefixes.begin(), prefixes.end(), "") == prefixes.end()) {
        prefixes.insert(bare ? prefixes.begin() : prefixes.end(), "");
      }
    }
    std::vector<std::string> places = Strings(module, "at");
    if (places.empty()) places = {""};
    forms_.clear();
    for (const std::string& prefix : prefixes) {
      for (const std::string& place : places) {
        forms_.push_back(absl::StrCat(prefix, place, layers));
      }
    }
  }

  absl::Status ReadList(const json& list, std::vector<ArchTensor>& tensors) {
    for (const json& item : list) {
      if (item.is_string() && absl::StartsWith(item.get_ref<const std::string&>(), "@")) {
        const json& named =
            AllTables().templates.at("weights").at(item.get_ref<const std::string&>().substr(1));
        RETURN_IF_ERROR(ReadList(named, tensors));
      } else if (item.is_object() && item.contains("one_of")) {
        RETURN_IF_ERROR(ReadChoice(item.at("one_of"), tensors));
      } else {
        RETURN_IF_ERROR(ReadWeight(item, tensors));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadChoice(const json& sets, std::vector<ArchTensor>& tensors) {
    ArchChoice choice{.id = ++choices_};
    for (const auto& [name, list] : sets.items()) choice.needed = choice.needed && !list.empty();
    for (const auto& [name, list] : sets.items()) {
      choice.set = name;
      const size_t first = tensors.size();
      RETURN_IF_ERROR(ReadList(list, tensors));
      for (size_t i = first; i < tensors.size(); ++i) tensors[i].choice = choice;
    }
    return absl::OkStatus();
  }

  absl::Status ReadWeight(const json& weight, std::vector<ArchTensor>& tensors) {
    ArchTensor model;
    std::string text;
    if (weight.is_string()) {
      text = weight.get<std::string>();
      if (absl::EndsWith(text, "?")) {
        text.pop_back();
        model.optional = true;
      }
    } else {
      text = weight.at("name").get<std::string>();
      model.optional = weight.value("optional", false) || weight.contains("tied");
      model.vocabulary = weight.value("vocabulary", false);
      model.aliases = Strings(weight, "aliases");
      if (weight.contains("tied") && weight.at("tied").is_array()) {
        model.tied_names = Strings(weight, "tied");
      } else if (weight.contains("tied")) {
        model.tied_names = {kTiedToEmbedding};
      }
    }
    for (const std::string& one : ExpandLists(text)) {
      ArchTensor tensor = model;
      tensor.name = forms_[0] + one;
      for (const std::string& form : forms_) {
        const std::string name = form + one;
        if (name != tensor.name) tensor.aliases.push_back(name);
        for (const auto& [ending, other] : endings_) {
          if (!absl::EndsWith(name, ending)) continue;
          tensor.aliases.push_back(
              absl::StrCat(absl::StripSuffix(absl::string_view(name), ending), other));
        }
      }
      RETURN_IF_ERROR(AddCounted(std::move(tensor), tensors));
    }
    return absl::OkStatus();
  }

  // Once for each expert where the name has one.
  absl::Status AddCounted(ArchTensor tensor, std::vector<ArchTensor>& tensors) {
    const auto [open, close] = FindCounted(tensor.name);
    if (open == tensor.name.npos) {
      tensors.push_back(std::move(tensor));
      return absl::OkStatus();
    }
    int64_t count = 0;
    for (const std::string& form : forms_) {
      ASSIGN_OR_RETURN(const int64_t more,
                       Count(form + tensor.name.substr(forms_[0].size(), open - forms_[0].size())));
      count = std::max(count, more);
    }
    for (int64_t i = 0; i < count; ++i) {
      ArchTensor one = tensor;
      const auto fill = [&](std::string& name) {
        const auto [from, to] = FindCounted(name);
        if (from != name.npos) name.replace(from, to - from, absl::StrCat(i));
      };
      fill(one.name);
      for (std::string& alias : one.aliases) fill(alias);
      tensors.push_back(std::move(one));
    }
    return absl::OkStatus();
  }

  // How many there are of what is numbered behind `before`, in any layer.
  absl::StatusOr<int64_t> Count(absl::string_view before) {
    const size_t layer = before.find(kLayer);
    const bool anywhere = layer != before.npos;
    if (anywhere) before.remove_prefix(layer + kLayer.size());
    const auto [known, is_new] = counts_.try_emplace(std::string(before), 0);
    if (!is_new) return known->second;
    for (const auto& input : inputs_) {
      const int64_t count = CountNumbers(input->tensor_names(), before, anywhere);
      if (count > static_cast<int64_t>(input->tensor_names().size())) {
        return absl::FailedPreconditionError(
            absl::StrCat("model ", input->ref().ToString(), ": a tensor is number ", count - 1,
                         " at \"", before, "\", and the model has fewer tensors than that"));
      }
      known->second = std::max(known->second, count);
    }
    return known->second;
  }

  // Fills in the input embedding's names.
  static void Tie(ArchitectureData& architecture) {
    const auto is_embedding = [](const ArchTensor& tensor) {
      return tensor.vocabulary && tensor.tied_names.empty();
    };
    std::vector<std::string> names;
    for (const auto& module : architecture.modules_) {
      const auto it = std::find_if(module->pre().begin(), module->pre().end(), is_embedding);
      if (it == module->pre().end()) continue;
      names = it->aliases;
      names.insert(names.begin(), it->name);
      break;
    }
    for (const auto& module : architecture.modules_) {
      auto& data = static_cast<ModuleData&>(*module);
      for (std::vector<ArchTensor>* tensors : {&data.pre_, &data.post_}) {
        for (ArchTensor& tensor : *tensors) {
          if (tensor.tied_names == std::vector<std::string>{kTiedToEmbedding}) {
            tensor.tied_names = names;
          }
        }
      }
    }
  }

  static constexpr const char* kTiedToEmbedding = "{embedding}";

  const KnownArchitecture& known_;
  const json& family_;
  Models inputs_;
  std::vector<std::string> forms_;
  std::map<std::string, std::string> endings_;
  std::map<std::string, int64_t> counts_;
  int choices_ = 0;
};

}  // namespace

const KnownArchitecture* FindKnown(const std::string& name, const std::string& model_type) {
  const auto [begin, end] = AllTables().architectures.equal_range(name);
  for (auto it = begin; it != end; ++it) {
    if (it->second.model_type == model_type) return &it->second;
  }
  return begin != end && std::next(begin) == end ? &begin->second : nullptr;
}

bool SameTensors(const KnownArchitecture& a, const KnownArchitecture& b) {
  return a.family == b.family && a.head == b.head;
}

absl::StatusOr<ArchitecturePtr> MakeKnown(const KnownArchitecture& known, Models inputs) {
  return FamilyReader(known, inputs).Read();
}

}  // namespace pewter
