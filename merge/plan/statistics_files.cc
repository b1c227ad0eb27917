#include "merge/plan/statistics_files.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/checkpoint/printable.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/forward/layer_sites.h"
#include "merge/forward/statistics_format.h"

namespace pewter {
namespace {

// The file's list of models; empty when there is none.
absl::StatusOr<std::vector<std::string>> ModelsOf(const InputFile& file) {
  ASSIGN_OR_RETURN(const SafetensorsHeader header,
                   ReadSafetensorsHeader(*file.store, file.key, file.stat.size));
  const auto found = header.metadata.find(kStatisticsModelsKey);
  if (found == header.metadata.end()) return std::vector<std::string>{};
  const nlohmann::json list =
      nlohmann::json::parse(found->second, nullptr, /*allow_exceptions=*/false);
  std::vector<std::string> models;
  if (list.is_array()) {
    for (const nlohmann::json& name : list) {
      if (name.is_string()) models.push_back(name.get<std::string>());
    }
  }
  if (models.empty() || models.size() != list.size()) {
    return absl::DataLossError(
        absl::StrCat(file.Describe(), ": the metadata's \"models\" is not a JSON list of names"));
  }
  return models;
}

}  // namespace

absl::StatusOr<StatisticsFile> StatisticsFile::Open(const RecipeStatistics& recipe) {
  StatisticsFile file;
  ASSIGN_OR_RETURN(file.checkpoint_, Checkpoint::Open(recipe.file));
  if (file.checkpoint_->files().size() != 1 ||
      !absl::EndsWith(file.checkpoint_->files()[0].key, ".safetensors")) {
    return file;
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> models, ModelsOf(file.checkpoint_->files()[0]));
  if (models.size() < 2) return file;
  const auto found = std::find(models.begin(), models.end(), recipe.model.ToString());
  if (found == models.end()) {
    std::vector<std::string> shown;
    for (const std::string& model : models) shown.push_back(Printable(model));
    return absl::FailedPreconditionError(absl::StrCat(file.checkpoint_->files()[0].Describe(),
                                                      " is about ", absl::StrJoin(shown, ", "),
                                                      " and not about ", recipe.model.ToString()));
  }
  file.model_ = static_cast<int>(found - models.begin());
  return file;
}

absl::StatusOr<StatisticsFile::Gram> StatisticsFile::FindGram(absl::string_view config_json,
                                                              absl::string_view weight) const {
  Gram gram;
  std::string site(absl::StripSuffix(weight, ".weight"));
  std::string name = GramName(site, model_, model_);
  const std::optional<LayerSite> known = FindLayerSite(config_json, weight);
  if (known) {
    gram.axis = known->input_axis;
    if (checkpoint_->Find(name) == nullptr) {
      site = known->site;
      name = GramName(site, model_, model_);
    }
  }
  const TensorInfo* const info = checkpoint_->Find(name);
  if (info == nullptr) return gram;
  const std::string where = checkpoint_->files()[checkpoint_->FileOf(name)].Describe();
  const auto wrong = [&](absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat(where, ": ", what));
  };
  if (info->shape.rank() != 2 || info->shape[0] != info->shape[1] || info->shape[0] == 0 ||
      !IsFloat(info->dtype)) {
    return wrong(absl::StrCat(name, " ", info->shape.ToString(),
                              " is not a square matrix of floating numbers"));
  }
  const std::string count_name = CountName(site);
  const TensorInfo* const count = checkpoint_->Find(count_name);
  if (count == nullptr || count->dtype != DType::kI64 || count->shape.elements() != 1) {
    return wrong(absl::StrCat("there is no ", count_name, ", a whole number (I64), beside ", name));
  }
  ASSIGN_OR_RETURN(const auto source, checkpoint_->OpenTensor(count_name, 0));
  int64_t rows = 0;
  RETURN_IF_ERROR(source->Read(0, 1, {reinterpret_cast<std::byte*>(&rows), sizeof(rows)}, nullptr));
  if (rows <= 0) return wrong(absl::StrCat(count_name, " is ", rows));
  gram.tensor = name;
  gram.width = info->shape[0];
  gram.rows = static_cast<double>(rows);
  return gram;
}

}  // namespace pewter
