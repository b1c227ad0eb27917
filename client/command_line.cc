#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "client/commands.h"

namespace pewter::client {

namespace {

// mergekit's options of one dash and several letters, which CLI11 takes for several options.
constexpr char kTransplant[] = "transplant-tokens";
constexpr std::pair<const char*, const char*> kLongDashes[] = {
    {"-nc", "--no-cosine-similarity"}, {"-pm", "--prefix-match"},     {"-bm", "--byte-match"},
    {"-nvn", "--new-vocab-noise"},     {"-nvs", "--new-vocab-scale"},
};

constexpr Command kCommands[] = {
    {"merge", "Merge models into a new one, on this machine", &DeclareMerge},
    {"plan", "Check a recipe and show what merging it would read, compute and write", &DeclarePlan},
    {"moe", "Make a mixture of experts from dense models", &DeclareMoe},
    {"align", "Give a model's features the order of another one's", &DeclareAlign},
    {"extract-lora", "Write what a fine-tune changed in its base as a LoRA adapter",
     &DeclareExtractLora},
    {"methods", "List merge methods, or explain one", &DeclareMethods},
    {"convert", "Write a model as safetensors, also from a PyTorch file", &DeclareConvert},
    {"inspect", "Show what a model, an adapter or a merge result holds", &DeclareInspect},
    {"diff", "Compare the weights of two models", &DeclareDiff},
    {"eval", "Loss, perplexity and accuracy of a model on labelled data", &DeclareEval},
    {"shuffle-layers", "Stack layers of several models that are drawn at random",
     &DeclareShuffleLayers},
    {"submit", "Have a server merge", &DeclareSubmit},
    {"jobs", "List, show, follow, cancel and delete jobs of a server", &DeclareJobs},
    {"upload", "Send models to a server", &DeclareUpload},
    {"download", "Bring the model of a job or an upload from a server", &DeclareDownload},
    {"artifacts", "List and delete models that a server keeps", &DeclareArtifacts},
    {"store", "Try an object store, and tidy it up", &DeclareStore},
    {kTransplant, "Give a model the tokenizer of another one", &DeclareTransplantTokens},
    {"completion", "Print completions for a shell", &DeclareCompletion},
};

// Commands that run something take the options about output; those that only group others do not.
void AddOutputOptions(CLI::App& app, OutputOptions& output) {
  const auto nested = app.get_subcommands([](CLI::App*) { return true; });
  for (CLI::App* command : nested) AddOutputOptions(*command, output);
  if (!nested.empty()) return;
  constexpr char kGroup[] = "Output";
  app.add_option("-o,--output", output.format, "Format of results; default: text")
      ->type_name("text|json")
      ->check(CLI::Validator(
          [](std::string& text) {
            return text == "text" || text == "json" ? std::string()
                                                    : "expected text or json, not " + text;
          },
          ""))
      ->group(kGroup);
  app.add_flag("-q,--quiet", output.quiet, "No progress or notes; results are names only")
      ->group(kGroup);
}

}  // namespace

absl::Span<const Command> Commands() { return kCommands; }

CommandBody DeclareGroup(CLI::App& app, const std::vector<Subcommand>& subcommands) {
  app.require_subcommand(1);
  auto body = std::make_shared<CommandBody>();
  for (const Subcommand& subcommand : subcommands) {
    CLI::App* const command = app.add_subcommand(subcommand.name, subcommand.summary);
    command->callback([body, run = subcommand.declare(*command)] { *body = run; });
  }
  return [body](Output& out) { return (*body)(out); };
}

CommandLine::CommandLine() : app("Merges neural networks: model checkpoints in, one model out.") {
  app.name("pewter");
  app.require_subcommand(1);
  app.get_formatter()->label("SUBCOMMAND", "COMMAND");
  app.get_formatter()->label("Subcommands", "Commands");
  app.get_formatter()->label("OPTIONS", "options");
  app.set_help_flag("-h,--help", "Show this help");
  app.footer(
      "Start with:\n"
      "  pewter methods                   what can be merged how\n"
      "  pewter plan recipe.yaml          check a recipe\n"
      "  pewter merge recipe.yaml ./out   run it\n"
      "\nExit codes: 0 done, 1 failed, 2 bad usage or recipe, 3 not found or not permitted,\n"
      "130 interrupted.");
  for (const Command& command : Commands()) {
    CLI::App* subcommand = app.add_subcommand(command.name, command.summary);
    // Footers are inherited; each command has its own.
    subcommand->footer("");
    subcommand->callback([this, run = command.declare(*subcommand)] { body = run; });
  }
  AddOutputOptions(app, output);
}

void CommandLine::Parse(std::vector<std::string> words) {
  const bool transplant = !words.empty() && words.front() == kTransplant;
  for (std::string& word : words) {
    for (const auto& [dash, name] : kLongDashes) {
      if (transplant && word == dash) word = name;
    }
  }
  std::reverse(words.begin(), words.end());  // CLI11 takes them from the end
  app.parse(std::move(words));
}

}  // namespace pewter::client
