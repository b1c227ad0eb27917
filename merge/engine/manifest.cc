#include "merge/engine/manifest.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status.h"
#include "base/version.h"
#include "merge/align/aligner.h"
#include "nlohmann/json.hpp"

namespace pewter {
namespace {

using nlohmann::ordered_json;

// Of a manifest, and of the state of a run.
constexpr int64_t kMaxOwnFile = int64_t{256} << 20;

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
    for (const HeaderRange& range : file.header) {
      ranges.push_back({static_cast<int>(i), range.offset, range.bytes, range.crc32c});
    }
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
                          {"warnings", shard.warnings},
                          {"reports", shard.reports}});
  }
  ordered_json state = {{"fingerprint", fingerprint}, {"shards", std::move(shard_list)}};
  if (!artefacts.empty()) state["artefacts"] = artefacts;
  return state.dump();
}

absl::StatusOr<RunState> RunState::FromJson(absl::string_view text) {
  try {
    const ordered_json json = ordered_json::parse(text.begin(), text.end());
    RunState state;
    state.fingerprint = json.at("fingerprint");
    if (const auto it = json.find("artefacts"); it != json.end()) {
      state.artefacts = it->get<std::map<std::string, std::string>>();
    }
    for (const ordered_json& item : json.at("shards")) {
      ShardRecord shard;
      const ordered_json& file = item.at("file");
      shard.file = {file.at("name"), file.at("bytes"), file.value("sha256", "")};
      for (const ordered_json& range : item.at("ranges")) {
        shard.ranges.push_back({range.at(0), range.at(1), range.at(2), range.at(3)});
      }
      shard.warnings = item.at("warnings").get<std::vector<std::string>>();
      shard.reports = item.at("reports").get<std::map<std::string, TensorReport>>();
      state.shards[item.at("index").get<int>()] = std::move(shard);
    }
    return state;
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(absl::StrCat(kStateFile, " is damaged (", error.what(),
                                            "); use --overwrite to start again"));
  }
}

absl::StatusOr<RunState> RunState::Read(ObjectStore& store) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(store, kStateFile, kMaxOwnFile));
  return FromJson(text);
}

absl::StatusOr<std::string> Sha256OfObject(ObjectStore& store, absl::string_view key,
                                           int64_t size) {
  constexpr int64_t kChunk = 1 << 20;
  std::vector<std::byte> chunk(kChunk);
  const auto intent = store.WillRead(key, 0, size);
  Sha256 sha;
  for (int64_t offset = 0; offset < size; offset += kChunk) {
    const absl::Span<std::byte> part =
        absl::MakeSpan(chunk).subspan(0, std::min(kChunk, size - offset));
    RETURN_IF_ERROR(store.ReadInto(key, offset, part));
    sha.Update(part);
  }
  return sha.Finish();
}

absl::StatusOr<std::optional<std::string>> FindFinished(ObjectStore& store,
                                                        absl::string_view fingerprint,
                                                        FileCheck check) {
  auto text = ReadText(store, kManifestFile, kMaxOwnFile);
  if (absl::IsNotFound(text.status())) return std::nullopt;
  RETURN_IF_ERROR(text.status());
  try {
    const ordered_json manifest = ordered_json::parse(*text);
    if (manifest.at("fingerprint").get<std::string>() != fingerprint) return std::nullopt;
    for (const ordered_json& item : manifest.at("files")) {
      const OutputFile file{item.at("name"), item.at("bytes"), item.at("sha256")};
      const auto stat = store.Stat(file.name);
      bool same = stat.ok() && stat->size == file.bytes;
      if (same && check == FileCheck::kDigests) {
        same = Sha256OfObject(store, file.name, file.bytes).value_or("") == file.sha256;
      }
      if (!same) {
        return absl::DataLossError(
            absl::StrCat(store.Describe(file.name), " is not as ", kManifestFile, " says"));
      }
    }
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(
        absl::StrCat(store.Describe(kManifestFile), " is damaged (", error.what(), ")"));
  }
  return *std::move(text);
}

absl::StatusOr<ModelOrigin> OriginOfModel(ObjectStore& store) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(store, kManifestFile, kMaxOwnFile));
  try {
    const ordered_json manifest = ordered_json::parse(text);
    ModelOrigin origin{.fingerprint = manifest.at("fingerprint"), .job = ""};
    if (const auto run = manifest.find("run"); run != manifest.end()) {
      origin.job = run->value("job", "");
    }
    return origin;
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(
        absl::StrCat(store.Describe(kManifestFile), " is damaged (", error.what(), ")"));
  }
}

absl::StatusOr<std::vector<OutputFile>> OutputFilesOf(absl::string_view manifest_json) {
  std::vector<OutputFile> files;
  try {
    const ordered_json manifest = ordered_json::parse(manifest_json.begin(), manifest_json.end());
    for (const ordered_json& file : manifest.at("files")) {
      files.push_back({file.at("name"), file.at("bytes"), file.value("sha256", "")});
    }
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(absl::StrCat(kManifestFile, " is damaged (", error.what(), ")"));
  }
  return files;
}

std::vector<std::string> FilesOfManifest(absl::string_view manifest_json) {
  const ordered_json manifest =
      ordered_json::parse(manifest_json.begin(), manifest_json.end(), nullptr, false);
  std::vector<std::string> names;
  for (const ordered_json& file : manifest.at("files")) names.push_back(file.at("name"));
  names.push_back(kManifestFile);
  return names;
}

absl::Status RemoveModel(ObjectStore& store, absl::string_view manifest_json) {
  ASSIGN_OR_RETURN(const std::vector<OutputFile> files, OutputFilesOf(manifest_json));
  RETURN_IF_ERROR(store.Remove(kManifestFile));
  for (const OutputFile& file : files) RETURN_IF_ERROR(store.Remove(file.name));
  return absl::OkStatus();
}

namespace {

// Of the output's files.
size_t TensorCount(const Plan& plan) {
  size_t count = 0;
  for (const PlanTensor& tensor : plan.tensors) count += std::max<size_t>(tensor.parts.size(), 1);
  return count;
}

// What the recipe does not say and the plan decided.
ordered_json DecisionsJson(const Plan& plan) {
  ordered_json tensors = ordered_json::object();
  ordered_json defaults = ordered_json::object();
  const auto add_defaults = [&](const ParamValues& params, const ParamOrigins& origins) {
    for (const auto& [name, origin] : origins) {
      if (origin.level != absl::string_view("default") || defaults.contains(name)) continue;
      std::visit([&, &name = name](const auto& value) { defaults[name] = value; }, params.at(name));
    }
  };
  for (const PlanTensor& tensor : plan.tensors) {
    if (!tensor.notes.empty()) tensors[tensor.name] = tensor.notes;
    add_defaults(tensor.params, tensor.origins);
    for (const PlanInput& input : tensor.inputs) add_defaults(input.params, input.origins);
  }
  return {{"defaults", std::move(defaults)},
          {"tensors", std::move(tensors)},
          {"absent_tensors", plan.absent_tensors}};
}

}  // namespace

std::string ManifestJson(const ManifestInput& input) {
  const Plan& plan = input.plan;
  ordered_json files = ordered_json::array();
  std::vector<std::string> warnings = plan.warnings;
  for (const auto& [index, shard] : input.shards) {
    files.push_back(FileJson(shard.file));
    warnings.insert(warnings.end(), shard.warnings.begin(), shard.warnings.end());
  }
  for (const OutputFile& file : input.aux_files) files.push_back(FileJson(file));
  ordered_json manifest = {
      {"format", 1},
      {"pewter_version", kVersion},
      {"fingerprint", plan.fingerprint},
      {"method", plan.method},
      {"architecture", plan.architecture},
      {"recipe", plan.recipe_text},
      {"seed", plan.options.seed},
      {"tensors", TensorCount(plan)},
      {"bytes", plan.write_bytes},
      {"inputs", InputsJson(plan, input.shards)},
      {"files", std::move(files)},
      {"decisions", DecisionsJson(plan)},
      {"warnings", warnings},
      {"run",
       {{"finished", absl::FormatTime(absl::RFC3339_sec, absl::Now(), absl::UTCTimeZone())},
        {"seconds", input.seconds},
        {"device", input.device},
        {"threads", input.threads},
        {"memory_bytes", plan.options.memory_bytes},
        {"shards_reused", input.shards_reused}}},
  };
  if (!input.job.empty()) manifest["run"]["job"] = input.job;
  for (const PlanAlignment& alignment : plan.alignments) {
    ordered_json json = {{"model", plan.models[alignment.model].ref},
                         {"reference", plan.models[alignment.reference].ref},
                         {"method", alignment.aligner->name()},
                         {"keeps_function", alignment.aligner->caveat().empty()},
                         {"file", alignment.file}};
    if (const auto found = alignment.slot->Get(); found != nullptr && !found->report.empty()) {
      json["report"] = ordered_json::parse(found->report, nullptr, /*allow_exceptions=*/false);
    }
    manifest["alignments"].push_back(std::move(json));
  }
  for (const auto& [index, shard] : input.shards) {
    for (const auto& [tensor, report] : shard.reports) manifest["report"][tensor] = report;
  }
  for (size_t i = 0; i < input.stage_manifests.size(); ++i) {
    ordered_json stage = {{"name", plan.stages[i].name}};
    stage.update(
        ordered_json::parse(input.stage_manifests[i], nullptr, /*allow_exceptions=*/false));
    manifest["stages"].push_back(std::move(stage));
  }
  return manifest.dump(2, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace) +
         "\n";
}

}  // namespace pewter
