// pewter inspect: what a model, an adapter or a merge result holds, from headers and small files.
#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "base/units.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/recipe_paths.h"
#include "merge/checkpoint/architecture.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/lora_file.h"
#include "merge/recipe/recipe.h"
#include "store/object_store.h"

namespace pewter::client {

namespace {

constexpr int64_t kMaxJsonBytes = 64 << 20;
constexpr char kAdapterConfig[] = "adapter_config.json";
constexpr char kManifest[] = "pewter_manifest.json";

struct Arguments {
  std::string model;
  bool tensors = false;
};

// What was found, model or adapter alike.
struct Findings {
  std::string kind;
  std::string architecture;
  struct File {
    std::string name;
    int64_t bytes = 0;
  };
  std::vector<File> files;
  std::vector<TensorInfo> tensors;
  int64_t adapted_tensors = 0;
  Json config;          // model_type, ... or the adapter's settings; null for none
  Json manifest;        // of a result of ours; null for none
  std::string warning;  // of what could not be told
};

int64_t Parameters(const Findings& found) {
  int64_t count = 0;
  for (const TensorInfo& tensor : found.tensors) count += tensor.shape.elements();
  return count;
}

int64_t TensorBytes(const Findings& found) {
  int64_t bytes = 0;
  for (const TensorInfo& tensor : found.tensors) bytes += tensor.bytes;
  return bytes;
}

// A JSON object in a small file of the model's folder. NotFound when there is none.
absl::StatusOr<Json> ReadJson(ObjectStore& store, absl::string_view key) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(store, key, kMaxJsonBytes));
  Json json = Json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::DataLossError(absl::StrCat(store.Describe(key), ": not a JSON object"));
  }
  return json;
}

// The entries of `from` under `keys`, as far as they are there.
Json Pick(const Json& from, std::initializer_list<const char*> keys) {
  Json picked = Json::object();
  for (const char* key : keys) {
    if (const auto at = from.find(key); at != from.end() && !at->is_null()) picked[key] = *at;
  }
  return picked;
}

absl::StatusOr<Findings> InspectAdapter(std::shared_ptr<ObjectStore> store, const Json& config) {
  Findings found{.kind = "adapter"};
  found.config = Pick(config, {"peft_type", "base_model_name_or_path", "r", "lora_alpha",
                               "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern",
                               "alpha_pattern", "target_modules", "modules_to_save"});
  ASSIGN_OR_RETURN(TensorFile weights, ReadAdapterWeights(std::move(store)));
  found.files.push_back({weights.file.Describe(), weights.file.stat.size});
  found.tensors = std::move(weights.tensors);
  std::sort(found.tensors.begin(), found.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; });
  return found;
}

absl::StatusOr<Findings> InspectModel(const ModelRef& ref) {
  ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> model, Checkpoint::Open(ref));
  Findings found{.kind = model->raw() ? "raw checkpoint" : "model"};
  if (!ref.adapter.empty()) absl::StrAppend(&found.kind, " with adapter");
  for (const InputFile& file : model->files()) {
    found.files.push_back({file.Describe(), file.stat.size});
  }
  for (const std::string& name : model->tensor_names()) {
    found.tensors.push_back(*model->Find(name));
    if (model->Adapted(name)) ++found.adapted_tensors;
  }
  // A model that could not be merged can still be looked at.
  const auto architecture = ResolveArchitecture({model}, /*allow_mixed=*/false);
  if (architecture.ok()) {
    found.architecture = (*architecture)->name();
  } else {
    found.warning = std::string(architecture.status().message());
  }
  if (const Json config = Json::parse(model->config_json(), nullptr, false); config.is_object()) {
    found.config = Pick(config, {"model_type", "torch_dtype", "dtype", "num_hidden_layers",
                                 "hidden_size", "vocab_size", "tie_word_embeddings"});
  }
  absl::StatusOr<Json> manifest = ReadJson(model->store(), kManifest);
  if (manifest.ok()) {
    found.manifest = *std::move(manifest);
  } else if (!absl::IsNotFound(manifest.status())) {
    found.warning = std::string(manifest.status().message());
  }
  return found;
}

absl::StatusOr<Findings> Inspect(absl::string_view text) {
  ASSIGN_OR_RETURN(const ModelRef ref, ParseModelRef(text));
  if (ref.adapter.empty()) {
    // An adapter alone is no checkpoint, so it is recognised first.
    const std::string folder =
        PortableModelPath(ref.path, std::filesystem::current_path().string());
    const absl::StatusOr<std::shared_ptr<ObjectStore>> store =
        OpenStore(ref.revision.empty() ? folder : absl::StrCat(folder, "@", ref.revision));
    if (store.ok()) {
      const absl::StatusOr<Json> config = ReadJson(**store, kAdapterConfig);
      if (config.ok()) return InspectAdapter(*store, *config);
    }
  }
  return InspectModel(ref);
}

// Count and bytes for each dtype, as "BF16: 290 tensors, 2.1 GiB".
struct DtypeTotal {
  int64_t tensors = 0;
  int64_t parameters = 0;
  int64_t bytes = 0;
};

std::map<std::string, DtypeTotal> ByDtype(const Findings& found) {
  std::map<std::string, DtypeTotal> totals;
  for (const TensorInfo& tensor : found.tensors) {
    DtypeTotal& total = totals[std::string(SafetensorsName(tensor.dtype))];
    ++total.tensors;
    total.parameters += tensor.shape.elements();
    total.bytes += tensor.bytes;
  }
  return totals;
}

Json ToJson(const Findings& found, const Arguments& arguments) {
  Json files = Json::array();
  for (const Findings::File& file : found.files) {
    files.push_back({{"file", file.name}, {"bytes", file.bytes}});
  }
  Json dtypes = Json::object();
  for (const auto& [name, total] : ByDtype(found)) {
    dtypes[name] = {
        {"tensors", total.tensors}, {"parameters", total.parameters}, {"bytes", total.bytes}};
  }
  Json json = {{"model", arguments.model},
               {"kind", found.kind},
               {"architecture", found.architecture.empty() ? Json() : Json(found.architecture)},
               {"parameters", Parameters(found)},
               {"tensor_count", found.tensors.size()},
               {"adapted_tensors", found.adapted_tensors},
               {"bytes", TensorBytes(found)},
               {"dtypes", std::move(dtypes)},
               {"files", std::move(files)},
               {"config", found.config},
               {"manifest", found.manifest}};
  if (!found.warning.empty()) json["warning"] = found.warning;
  if (arguments.tensors) {
    Json tensors = Json::array();
    for (const TensorInfo& tensor : found.tensors) {
      const auto extents = tensor.shape.extents();
      tensors.push_back({{"name", tensor.name},
                         {"dtype", SafetensorsName(tensor.dtype)},
                         {"shape", std::vector<int64_t>(extents.begin(), extents.end())},
                         {"bytes", tensor.bytes}});
    }
    json["tensors"] = std::move(tensors);
  }
  return json;
}

std::string ScalarText(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

std::string ToText(const Findings& found, const Arguments& arguments) {
  Table facts({"MODEL", arguments.model});
  facts.Add({"Kind", found.kind});
  if (!found.architecture.empty()) facts.Add({"Architecture", found.architecture});
  facts.Add({"Parameters", FormatCount(Parameters(found))});
  facts.Add({"Tensors", FormatCount(found.tensors.size())});
  if (found.adapted_tensors > 0) {
    facts.Add({"Adapted", FormatCount(found.adapted_tensors, "tensor")});
  }
  facts.Add({"Size", FormatBytes(TensorBytes(found))});
  for (const auto& [key, value] : found.config.items()) facts.Add({key, ScalarText(value)});
  std::string text = facts.ToString();

  Table dtypes({"DTYPE", "TENSORS", "PARAMETERS", "SIZE"});
  dtypes.RightAlign(1).RightAlign(2).RightAlign(3);
  for (const auto& [name, total] : ByDtype(found)) {
    dtypes.Add({name, FormatCount(total.tensors), FormatCount(total.parameters),
                FormatBytes(total.bytes)});
  }
  absl::StrAppend(&text, "\n", dtypes.ToString(), "\n");

  Table files({"FILE", "SIZE"});
  files.RightAlign(1);
  for (const Findings::File& file : found.files) files.Add({file.name, FormatBytes(file.bytes)});
  absl::StrAppend(&text, files.ToString());

  if (found.manifest.is_object()) {
    absl::StrAppend(&text, "\nMerged by Pewter\n");
    for (const auto& [key, value] : found.manifest.items()) {
      if (value.is_primitive() && !value.is_null() && key != "recipe") {
        absl::StrAppend(&text, "  ", key, ": ", ScalarText(value), "\n");
      }
    }
    if (const auto recipe = found.manifest.find("recipe");
        recipe != found.manifest.end() && recipe->is_string()) {
      absl::StrAppend(&text, "  recipe:\n");
      for (absl::string_view line :
           absl::StrSplit(recipe->get_ref<const std::string&>(), '\n', absl::SkipEmpty())) {
        absl::StrAppend(&text, "    ", line, "\n");
      }
    }
  }
  if (arguments.tensors) {
    Table tensors({"TENSOR", "DTYPE", "SHAPE", "SIZE"});
    tensors.RightAlign(3);
    for (const TensorInfo& tensor : found.tensors) {
      tensors.Add({tensor.name, std::string(SafetensorsName(tensor.dtype)), tensor.shape.ToString(),
                   FormatBytes(tensor.bytes)});
    }
    absl::StrAppend(&text, "\n", tensors.ToString());
  }
  return text;
}

absl::StatusOr<int> RunInspect(const Arguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const Findings found, Inspect(arguments.model));
  if (!found.warning.empty()) out.Warn(found.warning);
  if (out.json()) {
    out.Print(ToJson(found, arguments));
  } else if (out.quiet()) {
    for (const TensorInfo& tensor : found.tensors) out.Text(absl::StrCat(tensor.name, "\n"));
  } else {
    out.Text(ToText(found, arguments));
  }
  return kExitDone;
}

}  // namespace

CommandBody DeclareInspect(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  app.add_option("model", arguments->model,
                 "Model or adapter: a folder, a .safetensors, .bin, .pt or .pth file, "
                 "hf://ORG/NAME, MODEL+ADAPTER")
      ->required()
      ->type_name(kModelType);
  app.add_flag("-t,--tensors", arguments->tensors, "List the tensors");
  app.footer(
      "Examples:\n"
      "  pewter inspect ./merged\n"
      "  pewter inspect hf://Qwen/Qwen2.5-0.5B -t");
  return [arguments](Output& out) { return RunInspect(*arguments, out); };
}

}  // namespace pewter::client
