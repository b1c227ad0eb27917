// pewter methods: the table of methods, or one of them in full.
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/method_report.h"
#include "client/recipe_schema.h"
#include "merge/methods/adapter_method.h"
#include "merge/methods/method.h"

namespace pewter::client {

namespace {

struct Arguments {
  std::string name;
  bool adapters = false;
  bool markdown = false;
  bool schema = false;
};

std::string Parameters(const MergeMethod& method) {
  std::vector<std::string> params;
  for (const Param& param : method.params) {
    if (!param.no_effect) params.push_back(param.name);
  }
  return params.empty() ? "-" : absl::StrJoin(params, ",");
}

// What the name means for models, for adapters, or for either.
absl::StatusOr<int> Explain(const std::string& name, Output& out) {
  const auto adapter = FindAdapterMethod(name);
  const auto method = FindMethod(name);
  if (!method.ok() && !adapter.ok()) return method.status();
  if (out.quiet()) {
    out.Text(absl::StrCat(name, "\n"));
  } else if (out.json()) {
    Json json = method.ok() ? MethodToJson(**method) : MethodToJson(**adapter);
    if (method.ok() && adapter.ok()) json["adapters"] = MethodToJson(**adapter);
    out.Print(json);
  } else {
    std::vector<std::string> texts;
    if (method.ok()) texts.push_back(MethodToText(**method));
    if (adapter.ok()) texts.push_back(MethodToText(**adapter));
    out.Text(absl::StrJoin(texts, "\n"));
  }
  return kExitDone;
}

const MergeMethod& Common(const MergeMethod& method) { return method; }
const MergeMethod& Common(const AdapterMethod& method) { return method.method; }

template <class Method>
void List(absl::Span<const Method* const> methods, Output& out) {
  constexpr bool kAdapters = std::is_same_v<Method, AdapterMethod>;
  if (out.json()) {
    Json json = Json::array();
    for (const Method* method : methods) json.push_back(MethodToJson(*method));
    out.Print(json);
    return;
  }
  if (out.quiet()) {
    for (const Method* method : methods) out.Text(absl::StrCat(Common(*method).name, "\n"));
    return;
  }
  Table table({"METHOD", "BASE MODEL", "PARAMETERS", "SUMMARY"});
  for (const Method* method : methods) {
    const MergeMethod& common = Common(*method);
    table.Add(
        {common.name, kAdapters ? "-" : BaseName(common.base), Parameters(common), common.summary});
  }
  out.Text(absl::StrCat(table.ToString(), "\npewter methods NAME explains one",
                        kAdapters ? ".\n"
                                  : "; pewter methods --adapters lists those that merge LoRA "
                                    "adapters into one.\n"));
}

absl::StatusOr<int> RunMethods(const Arguments& arguments, Output& out) {
  const std::string& name = arguments.name;
  if (arguments.markdown) {
    out.Text(MethodsToMarkdown());
    return kExitDone;
  }
  if (arguments.schema) {
    out.Text(RecipeSchema().dump(2) + "\n");
    return kExitDone;
  }
  if (!name.empty()) return Explain(name, out);
  if (arguments.adapters) {
    List(AdapterMethods(), out);
  } else {
    List(Methods(), out);
  }
  return kExitDone;
}

}  // namespace

CommandBody DeclareMethods(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  CLI::Option* name =
      app.add_option("name", arguments->name, "Method to explain")->type_name(kMethodType);
  CLI::Option* adapters =
      app.add_flag("--adapters", arguments->adapters,
                   "List the methods that merge LoRA adapters (`output: {format: lora}`)")
          ->excludes(name);
  CLI::Option* markdown =
      app.add_flag("--markdown", arguments->markdown, "Print docs/methods.md: all of them in full")
          ->excludes(name)
          ->excludes(adapters);
  app.add_flag("--schema", arguments->schema, "Print a JSON Schema of recipes, for editors")
      ->excludes(name)
      ->excludes(adapters)
      ->excludes(markdown);
  app.footer(
      "Examples:\n"
      "  pewter methods\n"
      "  pewter methods ties");
  return [arguments](Output& out) { return RunMethods(*arguments, out); };
}

}  // namespace pewter::client
