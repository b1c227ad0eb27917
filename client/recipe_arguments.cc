#include "client/recipe_arguments.h"

#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "base/units.h"
#include "client/commands.h"

namespace pewter::client {

namespace {

constexpr size_t kMaxRecipeBytes = 16 << 20;

// For CLI11: checks that a value is a number of bytes and leaves it as it is.
CLI::Validator IsByteCount() {
  return CLI::Validator(
      [](std::string& text) {
        const auto bytes = ParseBytes(text);
        if (!bytes.ok()) return std::string(bytes.status().message());
        return *bytes > 0 ? std::string() : std::string("must be more than 0");
      },
      "");
}

}  // namespace

CLI::Validator InRange(int min, int max) {
  CLI::Validator range = CLI::Range(min, max);
  return range.description("");  // which would stand in the help as a part of the type
}

absl::StatusOr<std::vector<std::pair<std::string, std::string>>> SplitAssignments(
    absl::string_view option, const std::vector<std::string>& assignments) {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const std::string& assignment : assignments) {
    const size_t equals = assignment.find('=');
    if (equals == 0 || equals == std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(option, " ", assignment, ": expected key=value"));
    }
    pairs.emplace_back(assignment.substr(0, equals), assignment.substr(equals + 1));
  }
  return pairs;
}

void RecipeArguments::Declare(CLI::App& app) {
  app.add_option("recipe", path, "Recipe (mergekit's YAML); - reads it from standard input")
      ->required()
      ->type_name(kFileType);
  app.add_option("--set", set,
                 "Change the recipe: a dotted key and a YAML value, as in parameters.t=0.3 or "
                 "dtype=bfloat16; may be given several times")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
}

absl::StatusOr<std::string> RecipeArguments::ReadText() const {
  const bool standard_input = path == "-";
  const std::unique_ptr<FILE, int (*)(FILE*)> file(
      standard_input ? stdin : std::fopen(path.c_str(), "rb"),
      standard_input ? [](FILE*) { return 0; } : &std::fclose);
  if (file == nullptr) {
    return absl::ErrnoToStatus(errno, absl::StrCat("cannot open recipe ", path));
  }
  std::string text;
  char chunk[1 << 16];
  errno = 0;
  while (const size_t count = std::fread(chunk, 1, sizeof chunk, file.get())) {
    text.append(chunk, count);
    if (text.size() > kMaxRecipeBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "recipe ", path, " is larger than 16 MiB: is it a recipe, or a file of weights?"));
    }
  }
  if (std::ferror(file.get())) {
    // A folder opens, but does not read.
    if (errno == EISDIR) {
      return absl::InvalidArgumentError(
          absl::StrCat("recipe ", path, " is a folder; a recipe is a YAML file"));
    }
    return absl::ErrnoToStatus(errno, absl::StrCat("cannot read recipe ", path));
  }
  return text;
}

absl::StatusOr<Recipe> RecipeArguments::Parse(absl::string_view text) const {
  ASSIGN_OR_RETURN(const auto overrides, SplitAssignments("--set", set));
  absl::StatusOr<Recipe> recipe = ParseRecipe(text, overrides);
  if (!recipe.ok()) return NameFile(recipe.status());
  return recipe;
}

absl::Status RecipeArguments::NameFile(const absl::Status& status) const {
  if (status.ok()) return status;
  std::vector<std::string> lines;  // one for each problem
  for (const absl::string_view line : absl::StrSplit(status.message(), '\n')) {
    lines.push_back(NameFile(line));
  }
  return absl::Status(status.code(), absl::StrJoin(lines, "\n"));
}

std::string RecipeArguments::NameFile(absl::string_view message) const {
  constexpr absl::string_view kPlaceholder = "recipe:";
  if (!absl::StartsWith(message, kPlaceholder) || message.size() == kPlaceholder.size() ||
      !std::isdigit(static_cast<unsigned char>(message[kPlaceholder.size()]))) {
    return std::string(message);
  }
  message.remove_prefix(kPlaceholder.size());
  return absl::StrCat(path == "-" ? "standard input" : path, ":", message);
}

constexpr char kResources[] = "Resources";
constexpr char kResult[] = "Result";

void PlanArguments::DeclareCopy(CLI::App& app) {
  app.add_option("--memory", memory,
                 "Most memory to use, as in 4GiB; default: 4 GiB or a quarter of RAM, the smaller")
      ->type_name("BYTES")
      ->check(IsByteCount())
      ->group(kResources);
  app.add_option("-j,--threads", threads, "Threads; default: one for each core")
      ->type_name("N")
      ->check(InRange(1, 4096))
      ->group(kResources);
  app.add_option("--shard-size", shard_size,
                 "Most bytes of weights in one output file; default: 5GB")
      ->type_name("BYTES")
      ->check(IsByteCount())
      ->group(kResult);
  app.add_flag("--strict", strict, "Take warnings as errors")->group(kResult);
  app.add_flag_callback(
         "--no-copy-tokenizer", [this] { copy_tokenizer = false; },
         "Leave out the tokenizer's files")
      ->group(kResult);
}

void PlanArguments::DeclareRawNames(CLI::App& app) {
  CLI::Option* intersection =
      app.add_flag("-i,--tensor-intersection", tensor_intersection,
                   "Raw checkpoints: merge the tensors that all of them have, leave out the others")
          ->group(kResult);
  app.add_flag("-u,--tensor-union", tensor_union,
               "Raw checkpoints: merge every tensor, each from those that have it")
      ->excludes(intersection)
      ->group(kResult);
}

void PlanArguments::Declare(CLI::App& app) {
  app.add_option("--device", device,
                 "auto, cpu, cuda or cuda:N; auto takes a GPU when there is one")
      ->type_name("DEVICE")
      ->capture_default_str()
      ->group(kResources);
  DeclareCopy(app);
  app.add_option("--seed,--random-seed", seed, "Seed of methods that draw random masks")
      ->type_name("N")
      ->capture_default_str()
      ->group(kResult);
  app.add_flag("--allow-crimes", allow_crimes, "Let the architectures of the models differ")
      ->group(kResult);
  app.add_flag("--unsafe-truncate-embeddings", truncate_embeddings,
               "Cut vocabularies of different size to the rows that all models have, whatever "
               "tokens these stand for")
      ->group(kResult);
  app.add_flag_callback(
         "--no-write-model-card", [this] { write_model_card = false; }, "Leave out README.md")
      ->group(kResult);
  mergekit.Declare(app, *this);
}

absl::StatusOr<PlanOptions> PlanArguments::ToOptions() const {
  PlanOptions options{.threads = threads,
                      .device = device,
                      .seed = seed,
                      .strict = strict,
                      .allow_mixed = allow_crimes,
                      .truncate_vocabularies = truncate_embeddings,
                      .raw_names = tensor_intersection ? RawNames::kIntersection
                                   : tensor_union      ? RawNames::kUnion
                                                       : RawNames::kSame,
                      .copy_tokenizer = copy_tokenizer,
                      .write_model_card = write_model_card};
  if (!memory.empty()) {
    ASSIGN_OR_RETURN(options.memory_bytes, ParseBytes(memory));
  }
  if (shard_bytes > 0) options.shard_bytes = shard_bytes;
  if (!shard_size.empty()) {
    ASSIGN_OR_RETURN(options.shard_bytes, ParseBytes(shard_size));
    // mergekit's --out-shard-size 5B means five billion.
    if (options.shard_bytes < 1024) {
      return absl::InvalidArgumentError(absl::StrCat("--shard-size ", shard_size, " is ",
                                                     options.shard_bytes,
                                                     " bytes; write 5GB for five billion"));
    }
  }
  return options;
}

absl::StatusOr<Plan> PlanArguments::MakePlanOf(const RecipeArguments& arguments,
                                               Output& out) const {
  ASSIGN_OR_RETURN(const std::string text, arguments.ReadText());
  ASSIGN_OR_RETURN(const Recipe recipe, arguments.Parse(text));
  ASSIGN_OR_RETURN(const PlanOptions options, ToOptions());
  mergekit.Explain(out);
  absl::StatusOr<Plan> plan = MakePlan(recipe, options);
  if (!plan.ok()) return arguments.NameFile(plan.status());
  for (const std::string& warning : plan->warnings) out.Warn(arguments.NameFile(warning));
  return plan;
}

}  // namespace pewter::client
