#include "merge/forward/statistics.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status.h"
#include "merge/forward/object_path.h"
#include "merge/forward/statistics_format.h"

namespace pewter {
namespace {

using nlohmann::json;

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("not a statistics file: ", what));
}

absl::StatusOr<std::string> MetadataOf(const SafetensorsHeader& header, const std::string& key) {
  const auto found = header.metadata.find(key);
  if (found == header.metadata.end()) return Malformed(absl::StrCat("metadata has no ", key));
  return found->second;
}

absl::StatusOr<std::vector<std::string>> NamesOf(const SafetensorsHeader& header,
                                                 const std::string& key) {
  ASSIGN_OR_RETURN(const std::string text, MetadataOf(header, key));
  const json names = json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  std::vector<std::string> result;
  if (!names.is_array()) return Malformed(absl::StrCat(key, " is not a list"));
  for (const json& name : names) {
    if (!name.is_string()) return Malformed(absl::StrCat(key, " is not a list of names"));
    result.push_back(name.get<std::string>());
  }
  return result;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const StatisticsReader>> StatisticsReader::Open(
    std::shared_ptr<ObjectStore> store, absl::string_view key) {
  std::shared_ptr<StatisticsReader> reader(new StatisticsReader);
  reader->name_ = store->Describe(key);
  reader->store_ = std::move(store);
  reader->key_ = std::string(key);
  RETURN_IF_ERROR(Annotate(reader->Load(), reader->name_));
  return reader;
}

absl::StatusOr<std::shared_ptr<const StatisticsReader>> StatisticsReader::Open(
    absl::string_view uri) {
  ASSIGN_OR_RETURN(ObjectPlace place, LocateObject(uri));
  return Open(std::move(place.store), place.key);
}

absl::Status StatisticsReader::Load() {
  ASSIGN_OR_RETURN(const ObjectStat stat, store_->Stat(key_));
  ASSIGN_OR_RETURN(SafetensorsHeader header, ReadSafetensorsHeader(*store_, key_, stat.size));
  ASSIGN_OR_RETURN(const std::string format, MetadataOf(header, kStatisticsFormatKey));
  if (format != kStatisticsFormat) {
    return Malformed(absl::StrCat("its format is ", format, " and not ", kStatisticsFormat));
  }
  ASSIGN_OR_RETURN(models_, NamesOf(header, kStatisticsModelsKey));
  ASSIGN_OR_RETURN(sites_, NamesOf(header, kStatisticsSitesKey));
  ASSIGN_OR_RETURN(data_digest_, MetadataOf(header, kStatisticsDataKey));
  for (TensorInfo& tensor : header.tensors) {
    std::string name = tensor.name;
    tensors_.emplace(std::move(name), std::move(tensor));
  }
  // Everything about shapes is checked here, so that Read only reads.
  const int models = static_cast<int>(models_.size());
  const auto is = [&](const std::string& name, DType dtype, absl::Span<const int64_t> extents) {
    const auto found = tensors_.find(name);
    return found != tensors_.end() && found->second.dtype == dtype &&
           found->second.shape.extents() == extents;
  };
  for (const std::string& site : sites_) {
    if (!is(CountName(site), DType::kI64, {})) return Malformed(absl::StrCat(site, ".count"));
    std::vector<int64_t> widths;
    for (int i = 0; i < models; ++i) {
      const auto sum = tensors_.find(SumName(site, i));
      if (sum == tensors_.end() || sum->second.shape.rank() != 1) {
        return Malformed(SumName(site, i));
      }
      widths.push_back(sum->second.shape[0]);
      for (const std::string& name : {SumName(site, i), SquareName(site, i)}) {
        if (!is(name, DType::kF64, {widths[i]})) return Malformed(name);
      }
    }
    for (int i = 0; i < models; ++i) {
      for (int j = i; j < models; ++j) {
        const std::string name = GramName(site, i, j);
        if (tensors_.contains(name) && !is(name, DType::kF64, {widths[i], widths[j]})) {
          return Malformed(name);
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> StatisticsReader::ReadValues(const TensorInfo& tensor) const {
  std::vector<double> values(tensor.shape.elements());
  RETURN_IF_ERROR(store_->ReadInto(
      key_, tensor.offset,
      absl::MakeSpan(reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(double))));
  return values;
}

absl::StatusOr<SiteMoments> StatisticsReader::Read(absl::string_view site) const {
  SiteMoments moments;
  moments.site = std::string(site);
  const auto count = tensors_.find(CountName(site));
  if (count == tensors_.end()) {
    return absl::NotFoundError(absl::StrCat(name_, " has no site ", site));
  }
  RETURN_IF_ERROR(store_->ReadInto(
      key_, count->second.offset, absl::MakeSpan(reinterpret_cast<std::byte*>(&moments.count), 8)));
  const int models = static_cast<int>(models_.size());
  moments.grams.resize(models);
  for (int i = 0; i < models; ++i) {
    ASSIGN_OR_RETURN(std::vector<double> sums, ReadValues(tensors_.find(SumName(site, i))->second));
    ASSIGN_OR_RETURN(std::vector<double> squares,
                     ReadValues(tensors_.find(SquareName(site, i))->second));
    moments.sums.push_back(std::move(sums));
    moments.squares.push_back(std::move(squares));
    moments.grams[i].resize(models);
    for (int j = i; j < models; ++j) {
      const auto gram = tensors_.find(GramName(site, i, j));
      if (gram == tensors_.end()) continue;
      ASSIGN_OR_RETURN(moments.grams[i][j], ReadValues(gram->second));
    }
  }
  return moments;
}

}  // namespace pewter
