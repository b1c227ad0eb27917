// Recipe: the text that the user wrote, parsed but unresolved. The grammar is mergekit's YAML.
//
// A text of several documents (`---`) is one recipe: the output's, which has the other documents as
// its stages. A stage has a name, and a model of that name is what the stage makes.
//
// Parsing checks types and structure, with line and column in every message; it reads no model.
// Keys that nobody reads and settings without effect are collected as `warnings` (with a suggestion
// where one is near). Values are plain data and may be copied freely.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/dtype.h"

namespace pewter {

// 1-based; 0 for a value that was set from the command line.
struct TextPosition {
  int line = 0;
  int column = 0;
  // "recipe:12:7", or "--set".
  std::string ToString() const;
};

// PATH[@REVISION][+ADAPTER[@REVISION]], or the mapping form.
struct ModelRef {
  // Local path, file://, s3://, artifact://, hf://, or a hub id that is looked up in the local hub
  // cache.
  std::string path;
  std::string revision;
  std::string adapter;  // LoRA; empty for none
  std::string adapter_revision;
  std::string override_architecture;
  TextPosition at;
  // "path@rev+adapter@rev": identity within a recipe and the name in messages.
  std::string ToString() const;
  friend bool operator==(const ModelRef& a, const ModelRef& b) {
    return a.ToString() == b.ToString();
  }
};
// The string form. InvalidArgument when it has more than one '+', more than one '@' in a part, or
// an empty part.
absl::StatusOr<ModelRef> ParseModelRef(absl::string_view text);

using ParamScalar = std::variant<bool, int64_t, double, std::string>;

// One value of a parameter: a scalar (one element) or a gradient (several), for the tensors whose
// name contains `filter` (empty or "*": all).
struct ParamCase {
  std::string filter;
  std::vector<ParamScalar> values;
  bool gradient = false;  // written as a list
  TextPosition at;
};
// Tried in order; the first whose filter matches counts. An empty gradient list says nothing: the
// next scope is asked.
struct ParamSetting {
  std::vector<ParamCase> cases;
  TextPosition at;
};
using ParamScope = std::map<std::string, ParamSetting>;

struct RecipeSource {
  ModelRef model;
  std::optional<std::pair<int64_t, int64_t>> layer_range;  // half open; absent: the whole model
  ParamScope parameters;
};

struct RecipeSlice {
  std::vector<RecipeSource> sources;
  std::optional<ModelRef> base_model;
  ParamScope parameters;
  TextPosition at;
};

// One component of a model ("default" where there is one only).
struct RecipeModule {
  std::string name;
  TextPosition at;
  std::vector<RecipeSlice> slices;  // `models:` is one slice whose sources have no layer_range
  bool from_models = false;         // written as `models:`
  ParamScope parameters;
};

// A token of the output that the recipe says something about.
struct RecipeToken {
  enum class Rows {
    kUsual,       // as for every other token
    kModel,       // the row that `model` has for it
    kZero,        // zeros
    kModelToken,  // the row that `model` has for another token, `other` or `other_id`
  };
  std::string token;
  Rows rows = Rows::kUsual;
  std::optional<ModelRef> model;
  std::string other;
  std::optional<int64_t> other_id;
  bool force = false;  // for models that have the token, too
  TextPosition at;
};

// How a model gets rows for tokens that it does not have, from the embeddings of the tokenizer's
// model (merge/plan/row_approximator.h). Names are mergekit-tokensurgeon's.
struct TokenApproximation {
  enum class Method {
    kOmp,
    kCommonInterpolation,
    kSubword,
    kMean,
    kZero,
    kRandn,
    kJohnHewitt,
    kLandmarkPca,
    kSparseTokenBasis,
    kMatchingPursuitRope,
  };
  enum class Weights { kDistance, kBarycentric, kLeastSquares };   // of kCommonInterpolation
  enum class Subwords { kMean, kSum, kWeightedMean, kFirstLast };  // of kSubword
  enum class Match { kNo, kEmbeddings, kHead, kBoth };             // tensors that it is done for

  Method method = Method::kOmp;
  int64_t k = 64;       // rows that a row is made from
  bool cosine = false;  // of kCommonInterpolation: nearest by angle, not by distance
  Weights weights = Weights::kDistance;
  Subwords subwords = Subwords::kMean;
  Match prefix = Match::kNo;  // the row of the longest known token that a token begins with
  Match byte = Match::kNo;    // the row of <0x41> for A, and the reverse
  bool magikarp = false;      // tokens that look untrained are shared with nobody
  double noise = 0;           // standard deviation of what is added to new rows
  double scale = 1;           // of new rows
  TextPosition at;
};

// The tokenizer that the output takes.
struct RecipeTokenizer {
  enum class Source { kUnion, kBase, kModel };
  Source source = Source::kUnion;
  std::optional<ModelRef> model;  // of kModel
  std::vector<RecipeToken> tokens;
  int64_t pad_to_multiple_of = 1;  // of the rows of vocabulary tensors
  std::optional<TokenApproximation> approximate;
  TextPosition at;
};

// A file of what is known of a model besides its weights.
struct RecipeStatistics {
  ModelRef model;
  ModelRef file;
};

// What the output and the models that it is made from are measured by.
struct RecipeEvaluation {
  ModelRef data;       // a file
  std::string metric;  // empty: the one that the model's head is for
  TextPosition metric_at;
  int64_t barrier_points = 0;  // of the line between two models; 0: none
  TextPosition at;
};

// The models are reordered so that their features lie where those of the reference do, before they
// are merged. Words are the recipe's.
struct RecipeAlign {
  enum class Method { kPermutation, kStaged, kCca };
  enum class Evidence { kActivations, kWeights };
  enum class Heads { kPermutation, kOrthogonal };
  enum class QueryKey { kOwn, kShared };
  enum class Stage { kWeights, kResidual };
  enum class Group { kFfn, kHeads, kResidual, kPooler, kOutputHead };

  ModelRef reference;  // need not be merged
  Method method = Method::kPermutation;
  Evidence evidence = Evidence::kWeights;  // kActivations where `calibration` is given
  std::vector<Group> groups;               // that may move; each once
  Heads heads = Heads::kPermutation;
  QueryKey query_key = QueryKey::kOwn;  // whose order queries and keys have inside heads
  std::optional<Stage> last_stage;      // of kStaged; absent: the last that `heads` allows
  std::vector<Group> mapped;            // of kCca: mapped linearly, not reordered; each once
  double gamma = 0.1;                   // of kCca: added to the features' variances
  std::optional<ModelRef> calibration;  // a file
  std::optional<ModelRef> objective;    // a file: stages are compared by the loss on it
  std::optional<ModelRef> verify;       // a file: aligned models must have their loss on it
  int restarts = 1;                     // ways through the groups, of which the best counts
  TextPosition at, method_at, evidence_at, groups_at, heads_at;
  // Of keys that mean something for some methods alone; absent where they are not given.
  std::optional<TextPosition> query_key_at, last_stage_at, mapped_at, gamma_at;
};

// What the output is.
enum class OutputFormat {
  kModel,
  kLora,  // an adapter in PEFT's layout; the inputs are adapters
};

struct Recipe {
  std::string text;                                            // verbatim; a stage's own document
  std::vector<std::pair<std::string, std::string>> overrides;  // applied to it
  TextPosition at;
  std::string
      name;  // of a stage; else empty, or as the one document that nothing depends on has it
  TextPosition name_at;
  // The other documents, each after those that it depends on; they have no stages themselves.
  std::vector<Recipe> stages;
  std::string merge_method;
  TextPosition merge_method_at;
  std::vector<RecipeModule> modules;  // in the order written
  bool has_modules_key = false;       // written as `modules:`; else the one module is "default"
  std::optional<ModelRef> base_model;
  std::optional<DType> dtype;
  std::optional<DType> out_dtype;
  OutputFormat output_format = OutputFormat::kModel;
  TextPosition output_format_at;
  bool report = false;  // `output: {report: true}`
  TextPosition report_at;
  ParamScope parameters;
  std::vector<RecipeStatistics> statistics;
  TextPosition statistics_at;
  std::optional<RecipeEvaluation> evaluation;
  std::optional<RecipeTokenizer> tokenizer;
  std::optional<RecipeAlign> align;
  std::optional<std::string> chat_template;  // "auto", a known name, or Jinja
  TextPosition chat_template_at;
  std::vector<std::string> warnings;  // of the stages too
};

// `overrides` are --set key=value: a dotted path ("parameters.t", "dtype", "models.0.model") and a
// YAML value, applied to the parsed text; of a stage as "STAGE/parameters.t". InvalidArgument names
// line and column: "recipe:12:7: ...". Hostile text is refused: more than 1 MiB, deep nesting,
// aliases that multiply.
absl::StatusOr<Recipe> ParseRecipe(
    absl::string_view text, const std::vector<std::pair<std::string, std::string>>& overrides = {});

}  // namespace pewter
