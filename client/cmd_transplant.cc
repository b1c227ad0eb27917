// pewter transplant-tokens: a model with another one's tokenizer. It is a recipe of a few lines,
// which the output keeps.
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/recipe_arguments.h"
#include "client/run_arguments.h"
#include "merge/pewter.h"

namespace pewter::client {

namespace {

struct Arguments {
  std::string model;
  std::string donor;
  std::string method = "omp";
  int k = 64;
  bool cosine = false;
  std::string weights = "distance_proportional";
  std::string subwords = "mean";
  std::string prefix = "no", byte = "no";
  bool magikarp = false;
  double noise = 0, scale = 0;  // 0: none
  bool batch_given = false;
  PlanArguments plan;
  RunArguments run;
};

std::string RecipeText(const Arguments& arguments) {
  const auto quoted = [](const std::string& text) {
    return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
  };
  // As a source these words mean something else.
  const bool word = arguments.donor == "base" || arguments.donor == "union";
  std::string text = absl::StrCat(
      "merge_method: passthrough\nmodels:\n  - model: ", quoted(arguments.model),
      "\ntokenizer:\n  source: ",
      quoted(word ? absl::StrCat("./", arguments.donor) : arguments.donor),
      "\n  approximate:\n    method: ", arguments.method, "\n    k: ", arguments.k, "\n");
  const auto add = [&](const char* key, const auto& value) {
    absl::StrAppend(&text, "    ", key, ": ", value, "\n");
  };
  if (arguments.cosine) add("cosine_similarity", "true");
  if (arguments.method == "common_interpolation") add("weight_scheme", arguments.weights);
  if (arguments.method == "subword") add("subword_method", arguments.subwords);
  if (arguments.prefix != "no") add("prefix_match", arguments.prefix);
  if (arguments.byte != "no") add("byte_match", arguments.byte);
  if (arguments.magikarp) add("magikarp", "true");
  if (arguments.noise != 0) add("new_vocab_noise", Json(arguments.noise).dump());
  if (arguments.scale != 0) add("new_vocab_scale", Json(arguments.scale).dump());
  return text;
}

// Messages without places in a recipe that the user has not written.
std::string WithoutPlaces(absl::string_view message) {
  constexpr absl::string_view kPlace = "recipe:";
  std::string text(message);
  for (size_t at = 0; (at = text.find(kPlace.data(), at)) != std::string::npos;) {
    size_t end = at + kPlace.size();
    while (end < text.size() && (absl::ascii_isdigit(text[end]) || text[end] == ':')) ++end;
    if (text.substr(end, 1) == " ") ++end;
    text.erase(at, end - at);
  }
  return text;
}

absl::StatusOr<int> RunTransplant(const Arguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const Recipe recipe, ParseRecipe(RecipeText(arguments)));
  ASSIGN_OR_RETURN(const PlanOptions options, arguments.plan.ToOptions());
  arguments.plan.mergekit.Explain(out);
  if (arguments.batch_given) {
    out.Note("--batch-size changes nothing: rows are made in batches that fit into memory");
  }
  const absl::StatusOr<Plan> plan = MakePlan(recipe, options);
  if (!plan.ok()) {
    return absl::Status(plan.status().code(), WithoutPlaces(plan.status().message()));
  }
  for (const std::string& warning : plan->warnings) out.Warn(WithoutPlaces(warning));
  return arguments.run.Run(*plan, "Transplanted into", out);
}

}  // namespace

CommandBody DeclareTransplantTokens(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  app.add_option("model", arguments->model, "The model that gets other tokens")
      ->required()
      ->type_name(kModelType);
  app.add_option("donor", arguments->donor, "The model whose tokenizer it gets")
      ->required()
      ->type_name(kModelType);
  arguments->run.DeclareOutput(app, "out", "Folder to write the model to");
  constexpr char kRows[] = "New rows";
  const auto choice = [&](const char* name, std::string& value, const char* help, const char* type,
                          std::vector<std::string> words) {
    app.add_option(name, value, help)
        ->type_name(type)
        ->check(CLI::IsMember(std::move(words)).description(""))
        ->capture_default_str()
        ->group(kRows);
  };
  choice("-a,--approximation-method", arguments->method,
         "omp, mp_rope, common_interpolation, landmark_pca, stb, subword, mean, john_hewitt, zero "
         "or randn",
         "HOW",
         {"omp", "mp_rope", "common_interpolation", "landmark_pca", "stb", "subword", "mean",
          "john_hewitt", "zero", "randn"});
  app.add_option("-k,--k", arguments->k, "Rows of shared tokens that a new row is made from")
      ->type_name("N")
      ->check(InRange(1, 1024))
      ->capture_default_str()
      ->group(kRows);
  app.add_flag("-c,--cosine-similarity,!--no-cosine-similarity", arguments->cosine,
               "common_interpolation: the nearest by angle, not by distance")
      ->group(kRows);
  choice("-w,--weight-scheme", arguments->weights,
         "common_interpolation: distance_proportional, barycentric or least_squares", "HOW",
         {"distance_proportional", "barycentric", "least_squares"});
  choice("-s,--subword-method", arguments->subwords,
         "subword: mean, sum, weighted_mean or first_last", "HOW",
         {"mean", "sum", "weighted_mean", "first_last"});
  app.add_option("--new-vocab-noise", arguments->noise,
                 "Standard deviation of noise that is added to new rows (-nvn)")
      ->type_name("NUMBER")
      ->group(kRows);
  app.add_option("--new-vocab-scale", arguments->scale, "Factor of new rows (-nvs)")
      ->type_name("NUMBER")
      ->group(kRows);
  constexpr char kTokens[] = "Which tokens are shared";
  for (const auto& [name, value, help] :
       {std::tuple{"--prefix-match", &arguments->prefix,
                   "A new token gets the row of the longest known one that it begins with: in "
                   "lm_head, embed, yes (both), no (-pm)"},
        {"--byte-match", &arguments->byte,
         "A and <0x41> get each other's row: in lm_head, embed, yes (both), no (-bm)"}}) {
    app.add_option(name, *value, help)
        ->type_name("WHERE")
        ->check(CLI::IsMember({"lm_head", "embed", "yes", "no"}).description(""))
        ->capture_default_str()
        ->group(kTokens);
  }
  app.add_flag("--magikarp,!--no-magikarp", arguments->magikarp,
               "Tokens that look untrained are shared with nobody; those that are untrained in "
               "both models get zeros")
      ->group(kTokens);
  arguments->run.Declare(app);
  arguments->plan.Declare(app);
  app.add_option_function<int>(
         "--batch-size", [arguments](int) { arguments->batch_given = true; },
         "Accepted, without effect")
      ->group("Options of mergekit");
  app.footer(
      "Rows of tokens that both have are kept; others are made. As a recipe: `tokenizer: {source:\n"
      "DONOR, approximate: {...}}`, which works for merges, too.\n"
      "\nExamples:\n"
      "  pewter transplant-tokens ./model ./donor ./out\n"
      "  pewter transplant-tokens ./model ./donor ./out -a common_interpolation -k 8 -w "
      "barycentric");
  return [arguments](Output& out) { return RunTransplant(*arguments, out); };
}

}  // namespace pewter::client
