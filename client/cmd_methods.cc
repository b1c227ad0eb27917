// pewter methods: the table of methods, or one of them in full.
#include <memory>
#include <string>
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
  if (out.json()) {
    Json methods = Json::array();
    for (const MergeMethod* method : Methods()) methods.push_back(MethodToJson(*method));
    for (const AdapterMethod* adapter : AdapterMethods()) methods.push_back(MethodToJson(*adapter));
    out.Print(methods);
  } else if (out.quiet()) {
    for (const std::string& one : MethodNames()) out.Text(absl::StrCat(one, "\n"));
  } else {
    Table table({"METHOD", "BASE MODEL", "PARAMETERS", "SUMMARY"});
    for (const MergeMethod* method : Methods()) {
      table.Add({method->name, BaseName(method->base), Parameters(*method), method->summary});
    }
    Table adapters({"METHOD", "PARAMETERS", "SUMMARY"});
    for (const AdapterMethod* adapter : AdapterMethods()) {
      adapters.Add({adapter->method.name, Parameters(adapter->method), adapter->method.summary});
    }
    out.Text(absl::StrCat(table.ToString(),
                          "\nOf LoRA adapters, with `output: {format: lora}`:\n\n",
                          adapters.ToString(), "\npewter methods NAME explains one.\n"));
  }
  return kExitDone;
}

}  // namespace

CommandBody DeclareMethods(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  CLI::Option* name =
      app.add_option("name", arguments->name, "Method to explain")->type_name(kMethodType);
  CLI::Option* markdown =
      app.add_flag("--markdown", arguments->markdown, "Print docs/methods.md: all of them in full")
          ->excludes(name);
  app.add_flag("--schema", arguments->schema, "Print a JSON Schema of recipes, for editors")
      ->excludes(name)
      ->excludes(markdown);
  app.footer(
      "Examples:\n"
      "  pewter methods\n"
      "  pewter methods ties");
  return [arguments](Output& out) { return RunMethods(*arguments, out); };
}

}  // namespace pewter::client
