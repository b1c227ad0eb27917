#include "client/plan_report.h"

#include <fnmatch.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/dtype_names.h"
#include "base/nearest.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/align/aligner.h"

namespace pewter::client {

namespace {

constexpr size_t kNamesShown = 5;  // of tensors that nothing reads

Json ToJson(const ParamValues& params) {
  Json json = Json::object();
  for (const auto& [name, value] : params) {
    std::visit([&json, &name = name](const auto& v) { json[name] = v; }, value);
  }
  return json;
}

Json ToJson(const Shape& shape) {
  return std::vector<int64_t>(shape.extents().begin(), shape.extents().end());
}

Json ToJson(const ParamOrigins& origins) {
  Json json = Json::object();
  for (const auto& [name, origin] : origins) {
    Json& one = json[name] = {{"level", origin.level}};
    if (origin.at.line != 0) one["line"] = origin.at.line, one["column"] = origin.at.column;
    if (!origin.filter.empty()) one["filter"] = origin.filter;
    if (origin.t) one["gradient_at"] = *origin.t;
  }
  return json;
}

Json LayerToJson(int64_t layer) { return layer < 0 ? Json() : Json(layer); }

Json ToJson(const PlanInput& input, const Plan& plan) {
  const bool made = input.tensor.empty();
  return {{"model", made ? Json() : Json(plan.models[input.model].ref)},
          {"tensor", made ? Json() : Json(input.tensor)},
          {"layer", LayerToJson(input.layer)},
          {"views", input.views},
          {"parameters", ToJson(input.params)},
          {"parameter_origins", ToJson(input.origins)}};
}

std::string MethodName(const PlanTensor& tensor) {
  if (tensor.task != nullptr) return tensor.task->name();
  return tensor.method == nullptr ? "copy" : tensor.method->name;
}

// "t=0.5 weight=0.3,0.7": parameters of the tensor, then those of the inputs in their order.
std::string DescribeParams(const PlanTensor& tensor) {
  std::vector<std::string> parts;
  for (const auto& [name, value] : tensor.params) {
    parts.push_back(absl::StrCat(name, "=", ParamToString(value)));
  }
  std::map<std::string, std::vector<std::string>> of_inputs;
  for (const PlanInput& input : tensor.inputs) {
    for (const auto& [name, value] : input.params) of_inputs[name].push_back(ParamToString(value));
  }
  for (const auto& [name, values] : of_inputs) {
    parts.push_back(absl::StrCat(name, "=", absl::StrJoin(values, ",")));
  }
  return absl::StrJoin(parts, " ");
}

std::string Dtypes(const PlanTensor& tensor) { return std::string(SafetensorsName(tensor.dtype)); }

// Tensors that differ only by the numbers in their names.
struct Group {
  int64_t tensors = 0;
  int64_t bytes = 0;
  int inputs = 0;
  std::set<std::string> params;
};

std::string GroupTable(const Plan& plan) {
  using Key = std::tuple<std::string, std::string, std::string, std::string>;
  std::map<Key, Group> groups;
  std::vector<const std::pair<const Key, Group>*> order;
  for (const PlanTensor& tensor : plan.tensors) {
    const auto [at, added] = groups.try_emplace(
        Key(NamePattern(tensor.name), tensor.shape.ToString(), Dtypes(tensor), MethodName(tensor)));
    if (added) order.push_back(&*at);
    Group& group = at->second;
    ++group.tensors;
    group.bytes += tensor.bytes;
    group.inputs = static_cast<int>(tensor.inputs.size()) + (tensor.base.has_value() ? 1 : 0);
    group.params.insert(DescribeParams(tensor));
  }
  Table table({"TENSORS", "COUNT", "SHAPE", "DTYPE", "SIZE", "METHOD", "INPUTS", "PARAMETERS"});
  table.RightAlign(1).RightAlign(4).RightAlign(6);
  for (const auto* entry : order) {
    const auto& [pattern, shape, dtype, method] = entry->first;
    const Group& group = entry->second;
    table.Add({pattern, FormatCount(group.tensors), shape, dtype, FormatBytes(group.bytes), method,
               absl::StrCat(group.inputs),
               group.params.size() == 1
                   ? *group.params.begin()
                   : absl::StrCat("(", group.params.size(), " settings: see --full)")});
  }
  return table.ToString();
}

// " t=0.5 (slice, recipe:4:17)".
std::string ExplainParams(const ParamValues& params, const ParamOrigins& origins) {
  std::string text;
  for (const auto& [name, value] : params) {
    absl::StrAppend(&text, "  ", name, "=", ParamToString(value));
    if (const auto origin = origins.find(name); origin != origins.end()) {
      absl::StrAppend(&text, " (", origin->second.ToString(), ")");
    }
  }
  return text;
}

std::string ExplainTensor(const Plan& plan, const PlanTensor& tensor) {
  std::string text =
      absl::StrCat(tensor.name, "  ", tensor.shape.ToString(), " ", Dtypes(tensor), "  ",
                   MethodName(tensor), ExplainParams(tensor.params, tensor.origins), "\n");
  const auto add_input = [&](const PlanInput& input, absl::string_view role) {
    const bool made = input.tensor.empty();
    absl::StrAppend(&text, "    ", role, made ? "not read" : plan.models[input.model].ref);
    if (!made && input.tensor != tensor.name) absl::StrAppend(&text, ": ", input.tensor);
    if (!input.views.empty()) absl::StrAppend(&text, "  [", absl::StrJoin(input.views, "; "), "]");
    absl::StrAppend(&text, ExplainParams(input.params, input.origins), "\n");
  };
  if (tensor.base.has_value()) add_input(*tensor.base, "base ");
  for (const PlanInput& input : tensor.inputs) add_input(input, "");
  for (const PlanInput& input : tensor.statistics) add_input(input, "statistics ");
  if (tensor.result_dtype != tensor.dtype) {
    absl::StrAppend(&text, "    rounded to ", SafetensorsName(tensor.result_dtype), ", then to ",
                    SafetensorsName(tensor.dtype), "\n");
  }
  for (const std::string& note : tensor.notes) absl::StrAppend(&text, "    ", note, "\n");
  return text;
}

std::string TensorTable(const Plan& plan) {
  std::string text;
  for (const PlanTensor& tensor : plan.tensors) absl::StrAppend(&text, ExplainTensor(plan, tensor));
  return text;
}

// Those that match one of the names or patterns; NotFound for one that matches none.
absl::StatusOr<std::string> ExplainMatching(const Plan& plan,
                                            absl::Span<const std::string> patterns) {
  std::string text;
  std::vector<bool> matched(patterns.size(), false);
  std::vector<std::string> names;
  for (const PlanTensor& tensor : plan.tensors) {
    names.push_back(tensor.name);
    bool shown = false;
    for (size_t i = 0; i < patterns.size(); ++i) {
      if (fnmatch(patterns[i].c_str(), tensor.name.c_str(), 0) != 0) continue;
      matched[i] = true;
      if (!shown) absl::StrAppend(&text, ExplainTensor(plan, tensor));
      shown = true;
    }
  }
  for (size_t i = 0; i < patterns.size(); ++i) {
    if (matched[i]) continue;
    return absl::NotFoundError(
        absl::StrCat("the output has no tensor ", patterns[i], DidYouMean(patterns[i], names)));
  }
  return text;
}

// Where layers come from, runs of layers in one row; empty when every layer keeps its number.
std::string LayerTable(const Plan& plan) {
  using Origin = std::vector<std::pair<int, int64_t>>;      // model, its layer minus the output's
  std::map<std::string, std::map<int64_t, Origin>> stacks;  // by the names' part before the number
  bool renumbered = false;
  for (const PlanTensor& tensor : plan.tensors) {
    if (tensor.layer < 0) continue;
    Origin origin;
    const auto add = [&](const PlanInput& input) {
      origin.emplace_back(input.model, input.layer - tensor.layer);
      renumbered = renumbered || input.layer != tensor.layer;
    };
    if (tensor.base) add(*tensor.base);
    for (const PlanInput& input : tensor.inputs) add(input);
    const std::string stack = tensor.name.substr(0, tensor.name.find_first_of("0123456789"));
    Origin& known = stacks[stack][tensor.layer];
    if (origin.size() > known.size()) known = std::move(origin);
  }
  std::set<Origin> different;
  for (const auto& [stack, layers] : stacks) {
    for (const auto& [layer, origin] : layers) different.insert(origin);
  }
  if (!renumbered && different.size() <= 1) return "";
  Table table({"LAYERS", "FROM"});
  for (const auto& [stack, layers] : stacks) {
    for (auto first = layers.begin(); first != layers.end();) {
      auto next = first;
      int64_t last = first->first;
      for (++next; next != layers.end() && next->second == first->second; ++next)
        last = next->first;
      const auto range = [](int64_t a, int64_t b) {
        return a == b ? absl::StrCat(a) : absl::StrCat(a, "-", b);
      };
      table.Add({absl::StrCat(stack, range(first->first, last)),
                 absl::StrJoin(first->second, ", ", [&](std::string* out, const auto& part) {
                   absl::StrAppend(out, plan.models[part.first].ref, " ",
                                   range(first->first + part.second, last + part.second));
                 })});
      first = next;
    }
  }
  return absl::StrCat(table.ToString(), "\n");
}

}  // namespace

std::string ParamToString(const ParamValue& value) {
  if (const bool* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  if (const double* number = std::get_if<double>(&value)) return absl::StrFormat("%g", *number);
  if (const int64_t* number = std::get_if<int64_t>(&value)) return absl::StrCat(*number);
  return std::get<std::string>(value);
}

std::string NamePattern(absl::string_view tensor) {
  std::vector<std::string> parts = absl::StrSplit(tensor, '.');
  for (std::string& part : parts) {
    if (!part.empty() && std::all_of(part.begin(), part.end(),
                                     [](unsigned char c) { return std::isdigit(c) != 0; })) {
      part = "*";
    }
  }
  return absl::StrJoin(parts, ".");
}

Json PlanToJson(const Plan& plan) {
  Json models = Json::array();
  for (size_t i = 0; i < plan.models.size(); ++i) {
    const PlanModel& model = plan.models[i];
    Json files = Json::array();
    for (const InputFile& file : model.checkpoint->files()) {
      files.push_back({{"file", file.Describe()}, {"bytes", file.stat.size}});
    }
    models.push_back({{"model", model.ref},
                      {"raw", model.checkpoint->raw()},
                      {"tensors", model.checkpoint->tensor_names().size()},
                      {"files", std::move(files)}});
  }
  Json tensors = Json::array();
  for (const PlanTensor& tensor : plan.tensors) {
    Json inputs = Json::array();
    for (const PlanInput& input : tensor.inputs) inputs.push_back(ToJson(input, plan));
    Json statistics = Json::array();
    for (const PlanInput& input : tensor.statistics) statistics.push_back(ToJson(input, plan));
    Json parts = Json::array();
    for (const PlanPart& part : tensor.parts) {
      parts.push_back({{"name", part.name}, {"shape", ToJson(part.shape)}});
    }
    tensors.push_back({{"name", tensor.name},
                       {"parts", std::move(parts)},
                       {"dtype", SafetensorsName(tensor.dtype)},
                       {"shape", ToJson(tensor.shape)},
                       {"bytes", tensor.bytes},
                       {"shard", plan.shards[tensor.shard].file},
                       {"layer", LayerToJson(tensor.layer)},
                       {"method", MethodName(tensor)},
                       {"result_dtype", SafetensorsName(tensor.result_dtype)},
                       {"notes", tensor.notes},
                       {"parameters", ToJson(tensor.params)},
                       {"parameter_origins", ToJson(tensor.origins)},
                       {"base", tensor.base.has_value() ? ToJson(*tensor.base, plan) : Json()},
                       {"inputs", std::move(inputs)},
                       {"statistics", std::move(statistics)}});
  }
  Json shards = Json::array();
  for (const PlanShard& shard : plan.shards) {
    shards.push_back(
        {{"file", shard.file}, {"bytes", shard.bytes}, {"tensors", shard.tensors.size()}});
  }
  Json other_files = Json::array();
  for (const PlanFile& file : plan.aux_files) other_files.push_back(file.name);
  Json unused = Json::object();
  for (const auto& [model, names] : plan.unused_tensors) unused[model] = names;
  Json stages = Json::array();
  for (const PlanStage& stage : plan.stages) {
    Json json = {{"name", stage.name}, {"used", stage.used}};
    json.update(PlanToJson(*stage.plan));
    stages.push_back(std::move(json));
  }
  Json alignments = Json::array();
  for (const PlanAlignment& alignment : plan.alignments) {
    alignments.push_back({{"model", plan.models[alignment.model].ref},
                          {"reference", plan.models[alignment.reference].ref},
                          {"method", alignment.aligner->name()},
                          {"keeps_function", alignment.aligner->caveat().empty()},
                          {"file", alignment.file}});
  }
  return {{"stages", std::move(stages)},
          {"alignments", std::move(alignments)},
          {"method", plan.method},
          {"architecture", plan.architecture},
          {"device", plan.options.device},
          {"threads", plan.options.threads},
          {"seed", plan.options.seed},
          {"memory_bytes", plan.options.memory_bytes},
          {"peak_bytes", plan.peak_bytes},
          {"read_bytes", plan.read_bytes},
          {"write_bytes", plan.write_bytes},
          {"models", std::move(models)},
          {"shards", std::move(shards)},
          {"other_files", std::move(other_files)},
          {"tensors", std::move(tensors)},
          {"unused_tensors", std::move(unused)},
          {"absent_tensors", plan.absent_tensors},
          {"warnings", plan.warnings},
          {"fingerprint", plan.fingerprint}};
}

std::string PlanToText(const Plan& plan, const PlanReportOptions& options) {
  std::string text;
  for (size_t i = 0; i < plan.stages.size(); ++i) {
    const PlanStage& stage = plan.stages[i];
    absl::StrAppend(&text, "Stage ", i + 1, " of ", plan.stages.size() + 1, ": ", stage.name,
                    stage.used ? "" : " (nothing depends on it)", "\n\n",
                    PlanToText(*stage.plan, options), "\n");
  }
  if (!plan.stages.empty()) {
    absl::StrAppend(&text, "Stage ", plan.stages.size() + 1, " of ", plan.stages.size() + 1,
                    ": the output\n\n");
  }
  absl::StrAppend(&text, "Method        ", plan.method, "\nArchitecture  ", plan.architecture,
                  "\n\n");
  for (const PlanAlignment& alignment : plan.alignments) {
    absl::StrAppend(&text, "Aligned       ", plan.models[alignment.model].ref, " with ",
                    plan.models[alignment.reference].ref, " (", alignment.aligner->name(),
                    alignment.aligner->caveat().empty() ? "" : ", another function", ", ",
                    alignment.file, ")\n");
  }
  if (!plan.alignments.empty()) absl::StrAppend(&text, "\n");
  Table models({"INPUT", "FILES", "TENSORS", "SIZE"});
  models.RightAlign(1).RightAlign(2).RightAlign(3);
  for (const PlanModel& model : plan.models) {
    int64_t bytes = 0;
    for (const InputFile& file : model.checkpoint->files()) bytes += file.stat.size;
    models.Add({model.ref, FormatCount(model.checkpoint->files().size()),
                FormatCount(model.checkpoint->tensor_names().size()), FormatBytes(bytes)});
  }
  absl::StrAppend(&text, models.ToString(), "\n", LayerTable(plan),
                  options.every_tensor ? TensorTable(plan) : GroupTable(plan), "\n");
  Table shards({"OUTPUT", "TENSORS", "SIZE"});
  shards.RightAlign(1).RightAlign(2);
  for (const PlanShard& shard : plan.shards) {
    shards.Add({shard.file, FormatCount(shard.tensors.size()), FormatBytes(shard.bytes)});
  }
  absl::StrAppend(&text, shards.ToString());
  if (!plan.aux_files.empty()) {
    absl::StrAppend(
        &text, Wrap(absl::StrCat("and ", absl::StrJoin(plan.aux_files, ", ",
                                                       [](std::string* out, const PlanFile& file) {
                                                         *out += file.name;
                                                       })),
                    100, 0));
  }
  for (const auto& [model, names] : plan.unused_tensors) {
    if (names.empty()) continue;
    const std::vector<std::string> first(
        names.begin(),
        names.begin() + static_cast<int64_t>(options.every_tensor
                                                 ? names.size()
                                                 : std::min(names.size(), kNamesShown)));
    absl::StrAppend(&text, "\nNot read from ", model, ": ", FormatCount(names.size(), "tensor"),
                    "\n  ", absl::StrJoin(first, "\n  "), "\n");
    if (first.size() < names.size()) absl::StrAppend(&text, "  ... (--full shows all)\n");
  }
  if (!plan.absent_tensors.empty()) {
    const bool all = options.every_tensor || plan.absent_tensors.size() <= kNamesShown;
    absl::StrAppend(
        &text, "\nOptional, and in no model: ", FormatCount(plan.absent_tensors.size(), "tensor"),
        "\n", all ? absl::StrCat("  ", absl::StrJoin(plan.absent_tensors, "\n  "), "\n") : "");
  }
  absl::StrAppend(&text, "\nReads         ", FormatBytes(plan.read_bytes), "\nWrites        ",
                  FormatBytes(plan.write_bytes), "\nPeak memory   ", FormatBytes(plan.peak_bytes),
                  " (limit ", FormatBytes(plan.options.memory_bytes), ")\nDevice        ",
                  plan.options.device, ", ", FormatCount(plan.options.threads, "thread"),
                  "\nWarnings      ", plan.warnings.size(), "\nFingerprint   ", plan.fingerprint,
                  "\n");
  return text;
}

absl::Status PrintPlan(Output& out, const Plan& plan, const PlanReportOptions& options) {
  if (out.json()) {
    out.Print(PlanToJson(plan));
  } else if (!options.tensors.empty()) {
    ASSIGN_OR_RETURN(const std::string text, ExplainMatching(plan, options.tensors));
    out.Text(text);
  } else if (out.quiet()) {
    out.Text(absl::StrCat(plan.fingerprint, "\n"));
  } else {
    out.Text(PlanToText(plan, options));
  }
  return absl::OkStatus();
}

}  // namespace pewter::client
