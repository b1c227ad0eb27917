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
#include "merge/methods/method.h"

namespace pewter::client {

namespace {

struct Arguments {
  std::string name;
  bool markdown = false;
  bool schema = false;
};

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
  if (!name.empty()) {
    ASSIGN_OR_RETURN(const MergeMethod* method, FindMethod(name));
    if (out.json()) {
      out.Print(MethodToJson(*method));
    } else {
      out.Text(out.quiet() ? absl::StrCat(method->name, "\n") : MethodToText(*method));
    }
    return kExitDone;
  }
  if (out.json()) {
    Json methods = Json::array();
    for (const MergeMethod* method : Methods()) methods.push_back(MethodToJson(*method));
    out.Print(methods);
  } else if (out.quiet()) {
    for (const MergeMethod* method : Methods()) out.Text(absl::StrCat(method->name, "\n"));
  } else {
    Table table({"METHOD", "BASE MODEL", "PARAMETERS", "SUMMARY"});
    for (const MergeMethod* method : Methods()) {
      std::vector<std::string> params;
      for (const Param& param : method->params) {
        if (!param.no_effect) params.push_back(param.name);
      }
      table.Add({method->name, BaseName(method->base),
                 params.empty() ? "-" : absl::StrJoin(params, ","), method->summary});
    }
    out.Text(absl::StrCat(table.ToString(), "\npewter methods NAME explains one.\n"));
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
