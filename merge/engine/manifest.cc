#include "merge/engine/manifest.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status.h"
#include "base/version.h"
#include "nlohmann/json.hpp"

namespace pewter {
namespace {

using nlohmann::ordered_json;

ordered_json FileJson(const OutputFile& file) {
  ordered_json json = {{"name", file.name}, {"bytes", file.bytes}};
  if (!file.sha256.empty()) json["sha256"] = file.sha256;
  return json;
}

// Models' files with what identifies them.
ordered_json InputsJson(const Plan& plan, const std::map<int, ShardRecord>& shards) {
  std::vector<ReadRange> ranges;
  for (size_t i = 0; i < plan.files.size(); ++i) {
    const InputFile& file = plan.files[i];
    ranges.push_back({static_cast<int>(i), 0, file.data_begin, file.header_crc32c});
  }
  for (const auto& [index, shard] : shards) {
    ranges.insert(ranges.end(), shard.ranges.begin(), shard.ranges.end());
  }
  ranges = JoinRanges(std::move(ranges));

  ordered_json models = ordered_json::array();
  for (size_t m = 0; m < plan.models.size(); ++m) {
    const int end = m + 1 < plan.models.size() ? plan.models[m + 1].file_base
                                               : static_cast<int>(plan.files.size());
    ordered_json files = ordered_json::array();
    for (int i = plan.models[m].file_base; i < end; ++i) {
      const InputFile& file = plan.files[i];
      ordered_json json = {{"file", file.Describe()}, {"bytes", file.stat.size}};
      if (!file.stat.etag.empty()) json["etag"] = file.stat.etag;
      if (file.stat.mtime_ns != 0) json["mtime_ns"] = file.stat.mtime_ns;
      ordered_json read = ordered_json::array();
      for (const ReadRange& range : ranges) {
        if (range.file != i) continue;
        const std::string crc = absl::StrFormat("%08x", range.crc32c);
        if (range.offset == 0 && range.bytes == file.stat.size) {
          json["crc32c"] = crc;
        } else {
          read.push_back({{"offset", range.offset}, {"bytes", range.bytes}, {"crc32c", crc}});
        }
      }
      if (!read.empty()) json["read"] = std::move(read);
      files.push_back(std::move(json));
    }
    ordered_json model = {{"model", plan.models[m].ref}, {"files", std::move(files)}};
    if (const auto unused = plan.unused_tensors.find(plan.models[m].ref);
        unused != plan.unused_tensors.end()) {
      model["unused_tensors"] = unused->second;
    }
    models.push_back(std::move(model));
  }
  return models;
}

}  // namespace

std::string RunState::ToJson() const {
  ordered_json shard_list = ordered_json::array();
  for (const auto& [index, shard] : shards) {
    ordered_json ranges = ordered_json::array();
    for (const ReadRange& range : shard.ranges) {
      ranges.push_back({range.file, range.offset, range.bytes, range.crc32c});
    }
    shard_list.push_back({{"index", index},
                          {"file", FileJson(shard.file)},
                          {"ranges", std::move(ranges)},
                          {"warnings", shard.warnings}});
  }
  return ordered_json({{"fingerprint", fingerprint}, {"shards", std::move(shard_list)}}).dump();
}

absl::StatusOr<RunState> RunState::FromJson(absl::string_view text) {
  try {
    const ordered_json json = ordered_json::parse(text.begin(), text.end());
    RunState state;
    state.fingerprint = json.at("fingerprint");
    for (const ordered_json& item : json.at("shards")) {
      ShardRecord shard;
      const ordered_json& file = item.at("file");
      shard.file = {file.at("name"), file.at("bytes"), file.value("sha256", "")};
      for (const ordered_json& range : item.at("ranges")) {
        shard.ranges.push_back({range.at(0), range.at(1), range.at(2), range.at(3)});
      }
      shard.warnings = item.at("warnings").get<std::vector<std::string>>();
      state.shards[item.at("index").get<int>()] = std::move(shard);
    }
    return state;
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(absl::StrCat(kStateFile, " is damaged (", error.what(),
                                            "); use --overwrite to start again"));
  }
}

std::string ManifestJson(const ManifestInput& input) {
  const Plan& plan = input.plan;
  ordered_json files = ordered_json::array();
  std::vector<std::string> warnings = plan.warnings;
  for (const auto& [index, shard] : input.shards) {
    files.push_back(FileJson(shard.file));
    warnings.insert(warnings.end(), shard.warnings.begin(), shard.warnings.end());
  }
  for (const OutputFile& file : input.aux_files) files.push_back(FileJson(file));
  const ordered_json manifest = {
      {"format", 1},
      {"pewter_version", kVersion},
      {"fingerprint", plan.fingerprint},
      {"method", plan.method},
      {"architecture", plan.architecture},
      {"recipe", plan.recipe_text},
      {"seed", plan.options.seed},
      {"tensors", plan.tensors.size()},
      {"bytes", plan.write_bytes},
      {"inputs", InputsJson(plan, input.shards)},
      {"files", std::move(files)},
      {"warnings", warnings},
      {"run",
       {{"finished", absl::FormatTime(absl::RFC3339_sec, absl::Now(), absl::UTCTimeZone())},
        {"seconds", input.seconds},
        {"device", input.device},
        {"threads", input.threads},
        {"memory_bytes", plan.options.memory_bytes},
        {"shards_reused", input.shards_reused}}},
  };
  return manifest.dump(2, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace) +
         "\n";
}

}  // namespace pewter
