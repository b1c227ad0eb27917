#include "merge/recipe/stages.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "merge/recipe/referenced_models.h"
#include "merge/recipe/yaml.h"

namespace pewter {
namespace {

constexpr size_t kMaxName = 100;

// It names a folder and stands where a path of a model may stand.
absl::Status CheckName(const Recipe& recipe) {
  const std::string& name = recipe.name;
  const bool good = std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.';
  });
  if (good && name[0] != '.' && name.size() <= kMaxName) return absl::OkStatus();
  return RecipeError(recipe.name_at,
                     absl::StrCat("`name` must be at most ", kMaxName,
                                  " letters, digits, '-', '_' and '.', and not begin with '.'"));
}

class StageOrder {
 public:
  explicit StageOrder(const std::vector<Recipe>& documents) : documents_(documents) {}

  // Every document after those that it depends on.
  absl::StatusOr<std::vector<int>> Sort() {
    RETURN_IF_ERROR(IndexNames());
    marks_.resize(documents_.size(), Mark::kNew);
    used_.resize(documents_.size(), false);
    for (int i = 0; i < static_cast<int>(documents_.size()); ++i) RETURN_IF_ERROR(Visit(i));
    return order_;
  }

  // Whether another document depends on it.
  bool used(int document) const { return used_[document]; }

 private:
  enum class Mark { kNew, kOpen, kDone };

  absl::Status IndexNames() {
    const Recipe* unnamed = nullptr;
    for (int i = 0; i < static_cast<int>(documents_.size()); ++i) {
      const Recipe& document = documents_[i];
      if (document.name.empty()) {
        if (unnamed != nullptr) {
          return RecipeError(document.at,
                             absl::StrCat("two documents without a `name` (the other is at ",
                                          unnamed->at.ToString(),
                                          "); only the one that makes the output has none"));
        }
        unnamed = &document;
        continue;
      }
      RETURN_IF_ERROR(CheckName(document));
      const auto [entry, added] = index_.try_emplace(document.name, i);
      if (!added) {
        return RecipeError(
            document.name_at,
            absl::StrCat("two documents are called \"", document.name, "\"; the other is at ",
                         documents_[entry->second].name_at.ToString()));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Visit(int document) {
    if (marks_[document] == Mark::kDone) return absl::OkStatus();
    marks_[document] = Mark::kOpen;
    path_.push_back(document);
    for (const ModelRef& model : ModelsOfDocument(documents_[document])) {
      const auto stage = index_.find(model.path);
      if (stage == index_.end()) continue;
      if (!model.revision.empty()) {
        return RecipeError(model.at, absl::StrCat("\"", model.path,
                                                  "\" is a document of this recipe, which has no "
                                                  "revision (",
                                                  model.revision, " was asked for)"));
      }
      if (marks_[stage->second] == Mark::kOpen) return Circle(stage->second, model.at);
      used_[stage->second] = true;
      RETURN_IF_ERROR(Visit(stage->second));
    }
    path_.pop_back();
    marks_[document] = Mark::kDone;
    order_.push_back(document);
    return absl::OkStatus();
  }

  absl::Status Circle(int first, TextPosition at) const {
    std::vector<std::string> names;
    for (auto it = std::find(path_.begin(), path_.end(), first); it != path_.end(); ++it) {
      names.push_back(documents_[*it].name);
    }
    names.push_back(documents_[first].name);
    return RecipeError(at, absl::StrCat("documents depend on each other in a circle: ",
                                        absl::StrJoin(names, " <- ")));
  }

  const std::vector<Recipe>& documents_;
  std::map<std::string, int> index_;
  std::vector<Mark> marks_;
  std::vector<bool> used_;
  std::vector<int> path_;
  std::vector<int> order_;
};

}  // namespace

absl::StatusOr<Recipe> LinkStages(std::vector<Recipe> documents) {
  StageOrder stages(documents);
  ASSIGN_OR_RETURN(const std::vector<int> order, stages.Sort());

  int output = -1;
  std::vector<std::string> ends;
  for (int i : order) {
    if (documents[i].name.empty()) output = i;
    if (!stages.used(i)) ends.push_back(documents[i].name);
  }
  if (output < 0 && ends.size() > 1) {
    return RecipeError(documents[0].at,
                       absl::StrCat("which document makes the output? No other depends on any of ",
                                    absl::StrJoin(ends, ", "), "; leave out the `name` of one"));
  }
  if (output < 0) output = order.back();

  Recipe result = documents[output];
  for (int i : order) {
    if (i == output) continue;
    const Recipe& stage = documents[i];
    result.warnings.insert(result.warnings.end(), stage.warnings.begin(), stage.warnings.end());
    if (!stages.used(i)) {
      result.warnings.push_back(absl::StrCat(stage.name_at.ToString(), ": nothing depends on \"",
                                             stage.name, "\"; it is merged and kept"));
    }
    result.stages.push_back(stage);
  }
  return result;
}

}  // namespace pewter
