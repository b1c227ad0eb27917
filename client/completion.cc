#include "client/completion.h"

#include <cctype>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/commands.h"
#include "merge/methods/adapter_method.h"

namespace pewter::client {

namespace {

// A command with the words that lead to it: {"jobs", "list"}.
struct Node {
  const CLI::App* app = nullptr;
  std::vector<std::string> path;
};

std::vector<const CLI::App*> Subcommands(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

void Collect(const CLI::App& app, std::vector<std::string> path, std::vector<Node>& nodes) {
  nodes.push_back({&app, path});
  for (const CLI::App* nested : Subcommands(app)) {
    std::vector<std::string> longer = path;
    longer.push_back(nested->get_name());
    Collect(*nested, longer, nodes);
  }
}

std::vector<Node> AllCommands(const CLI::App& app) {
  std::vector<Node> nodes;
  Collect(app, {}, nodes);
  return nodes;
}

std::vector<const CLI::Option*> Flags(const CLI::App& app) {
  return app.get_options([](const CLI::Option* option) { return option->nonpositional(); });
}

std::vector<const CLI::Option*> Positionals(const CLI::App& app) {
  return app.get_options([](const CLI::Option* option) { return option->get_positional(); });
}

// "--memory", "-j": every spelling.
std::vector<std::string> Spellings(const CLI::Option& option) {
  std::vector<std::string> names;
  for (const std::string& name : option.get_snames()) names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) names.push_back("--" + name);
  return names;
}

bool TakesValue(const CLI::Option& option) { return option.get_items_expected_max() > 0; }

// What may stand for a value.
struct Values {
  bool files = false;
  std::vector<std::string> words;
  std::string command;  // prints one a line
};

Values ValuesOf(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  if (type == kFileType || type == kPathType || type == kModelType) return {.files = true};
  if (type == kJobType) return {.command = "pewter jobs list -q 2>/dev/null"};
  Values values;
  if (type == kMethodType) {
    values.words = MethodNames();
  } else if (absl::StrContains(type, '|')) {
    // "auto|cpu|cuda:N": words in capitals stand for something.
    for (const std::string& word : std::vector<std::string>(absl::StrSplit(type, '|'))) {
      if (std::none_of(word.begin(), word.end(), absl::ascii_isupper)) values.words.push_back(word);
    }
  }
  return values;
}

std::string SingleQuoted(absl::string_view text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

// Bash ---------------------------------------------------------------------------------------

std::string BashReply(const Values& values) {
  if (!values.command.empty()) {
    return absl::StrCat("COMPREPLY=($(compgen -W \"$(", values.command, ")\" -- \"$cur\"))");
  }
  if (values.files) return "COMPREPLY=($(compgen -f -- \"$cur\")); compopt -o filenames";
  if (values.words.empty()) return ":";
  return absl::StrCat("COMPREPLY=($(compgen -W ", SingleQuoted(absl::StrJoin(values.words, " ")),
                      " -- \"$cur\"))");
}

// Zsh ----------------------------------------------------------------------------------------

std::string ZshAction(const Values& values) {
  if (!values.command.empty()) return absl::StrCat("(${(f)\"$(", values.command, ")\"})");
  if (values.files) return "_files";
  if (values.words.empty()) return " ";
  return absl::StrCat("(", absl::StrJoin(values.words, " "), ")");
}

// In a spec of _arguments, ':' ends a field and brackets end a description.
std::string ZshText(absl::string_view text) {
  return absl::StrReplaceAll(text, {{":", "\\:"}, {"[", "\\["}, {"]", "\\]"}});
}

std::string ZshFunction(const Node& node) {
  const std::string name =
      absl::StrCat("_pewter", node.path.empty() ? "" : "_", absl::StrJoin(node.path, "_"));
  std::vector<std::string> specs;
  for (const CLI::Option* option : Flags(*node.app)) {
    const std::vector<std::string> names = Spellings(*option);
    // Only --set, --label and the like may come again.
    const bool repeats = option->get_expected_max() > 1;
    for (const std::string& spelling : names) {
      std::string spec = repeats ? "*" : absl::StrCat("(", absl::StrJoin(names, " "), ")");
      absl::StrAppend(&spec, spelling, "[", ZshText(option->get_description()), "]");
      if (TakesValue(*option)) {
        absl::StrAppend(
            &spec, ":",
            ZshText(absl::AsciiStrToLower(
                option->get_lnames().empty() ? spelling : option->get_lnames().front())),
            ":", ZshAction(ValuesOf(*option)));
      }
      specs.push_back(SingleQuoted(spec));
    }
  }
  std::string text = absl::StrCat(name, "() {\n");
  const auto nested = Subcommands(*node.app);
  if (nested.empty()) {
    int index = 1;
    for (const CLI::Option* option : Positionals(*node.app)) {
      const bool repeats = option->get_expected_max() > 1;
      specs.push_back(SingleQuoted(absl::StrCat(repeats ? "*" : absl::StrCat(index++), ":",
                                                ZshText(option->get_name()), ":",
                                                ZshAction(ValuesOf(*option)))));
    }
    absl::StrAppend(&text, "  _arguments -s \\\n    ", absl::StrJoin(specs, " \\\n    "), "\n}\n");
    return text;
  }
  specs.push_back("'1:command:->command'");
  specs.push_back("'*::argument:->argument'");
  absl::StrAppend(&text, "  local state line\n  _arguments -C \\\n    ",
                  absl::StrJoin(specs, " \\\n    "),
                  "\n  case $state in\n    command)\n      local -a commands=(\n");
  for (const CLI::App* command : nested) {
    absl::StrAppend(
        &text, "        ",
        SingleQuoted(absl::StrCat(command->get_name(), ":", ZshText(command->get_description()))),
        "\n");
  }
  absl::StrAppend(&text, "      )\n      _describe command commands ;;\n    argument)\n",
                  "      case $line[1] in\n");
  for (const CLI::App* command : nested) {
    absl::StrAppend(&text, "        ", command->get_name(), ") ", name, "_", command->get_name(),
                    " ;;\n");
  }
  absl::StrAppend(&text, "      esac ;;\n  esac\n}\n");
  return text;
}

// Fish ---------------------------------------------------------------------------------------

// True on the command line of exactly this command.
std::string FishCondition(const Node& node) {
  std::vector<std::string> terms;
  for (const std::string& word : node.path) {
    terms.push_back(absl::StrCat("__fish_seen_subcommand_from ", word));
  }
  std::vector<std::string> nested;
  for (const CLI::App* command : Subcommands(*node.app)) nested.push_back(command->get_name());
  if (!nested.empty()) {
    terms.push_back(absl::StrCat("not __fish_seen_subcommand_from ", absl::StrJoin(nested, " ")));
  }
  return absl::StrJoin(terms, "; and ");
}

std::string FishValues(const Values& values) {
  if (values.files) return " -r -F";
  if (!values.command.empty()) {
    return absl::StrCat(" -x -a ", SingleQuoted(absl::StrCat("(", values.command, ")")));
  }
  if (values.words.empty()) return " -x";
  return absl::StrCat(" -x -a ", SingleQuoted(absl::StrJoin(values.words, " ")));
}

}  // namespace

std::string BashCompletion(const CLI::App& app) {
  const std::vector<Node> nodes = AllCommands(app);
  std::string path_cases, value_cases, word_cases;
  for (const Node& node : nodes) {
    const std::string path = absl::StrJoin(node.path, " ");
    if (!node.path.empty()) {
      const std::vector<std::string> before(node.path.begin(), node.path.end() - 1);
      absl::StrAppend(&path_cases, "      ",
                      SingleQuoted(absl::StrCat(absl::StrJoin(before, " "), "|", node.path.back())),
                      ") path=", SingleQuoted(path), " ;;\n");
    }
    std::vector<std::string> flags;
    for (const CLI::Option* option : Flags(*node.app)) {
      const std::vector<std::string> names = Spellings(*option);
      flags.insert(flags.end(), names.begin(), names.end());
      if (!TakesValue(*option)) continue;
      std::vector<std::string> patterns;
      for (const std::string& name : names) {
        patterns.push_back(SingleQuoted(absl::StrCat(path, "|", name)));
      }
      absl::StrAppend(&value_cases, "    ", absl::StrJoin(patterns, " | "), ") ",
                      BashReply(ValuesOf(*option)), "; return ;;\n");
    }
    Values words;
    for (const CLI::App* nested : Subcommands(*node.app)) words.words.push_back(nested->get_name());
    if (words.words.empty() && !Positionals(*node.app).empty()) {
      words = ValuesOf(*Positionals(*node.app).front());
    }
    absl::StrAppend(&word_cases, "    ", SingleQuoted(path), ")\n      if [[ $cur == -* ]]; then ",
                    BashReply({.words = flags}), "; else ", BashReply(words), "; fi ;;\n");
  }
  return absl::StrCat(
      "# bash completion for pewter: eval \"$(pewter completion bash)\"\n"
      "_pewter() {\n"
      "  local cur=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} path='' i\n"
      "  COMPREPLY=()\n"
      "  for ((i = 1; i < COMP_CWORD; ++i)); do\n"
      "    case \"$path|${COMP_WORDS[i]}\" in\n",
      path_cases,
      "    esac\n"
      "  done\n"
      "  case \"$path|$previous\" in\n",
      value_cases,
      "  esac\n"
      "  case \"$path\" in\n",
      word_cases,
      "  esac\n"
      "}\n"
      "complete -F _pewter pewter\n");
}

std::string ZshCompletion(const CLI::App& app) {
  std::string text =
      "#compdef pewter\n"
      "# zsh completion for pewter: pewter completion zsh > \"${fpath[1]}/_pewter\"\n";
  for (const Node& node : AllCommands(app)) absl::StrAppend(&text, ZshFunction(node));
  // Also works when it is sourced rather than found in fpath.
  absl::StrAppend(&text,
                  "if [ \"$funcstack[1]\" = _pewter ]; then _pewter \"$@\"; "
                  "else compdef _pewter pewter; fi\n");
  return text;
}

std::string FishCompletion(const CLI::App& app) {
  std::string text = "# fish completion for pewter: pewter completion fish | source\n";
  for (const Node& node : AllCommands(app)) {
    const std::string start =
        absl::StrCat("complete -c pewter -n ", SingleQuoted(FishCondition(node)));
    for (const CLI::App* nested : Subcommands(*node.app)) {
      absl::StrAppend(&text, start, " -f -a ", nested->get_name(), " -d ",
                      SingleQuoted(nested->get_description()), "\n");
    }
    for (const CLI::Option* option : Flags(*node.app)) {
      absl::StrAppend(&text, start);
      for (const std::string& name : option->get_snames()) absl::StrAppend(&text, " -s ", name);
      for (const std::string& name : option->get_lnames()) absl::StrAppend(&text, " -l ", name);
      if (TakesValue(*option)) absl::StrAppend(&text, FishValues(ValuesOf(*option)));
      absl::StrAppend(&text, " -d ", SingleQuoted(option->get_description()), "\n");
    }
    if (Subcommands(*node.app).empty() && !Positionals(*node.app).empty()) {
      const Values values = ValuesOf(*Positionals(*node.app).front());
      if (!values.files) absl::StrAppend(&text, start, " -f", FishValues(values), "\n");
    }
  }
  return text;
}

}  // namespace pewter::client
