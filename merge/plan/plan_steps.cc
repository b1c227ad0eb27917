#include "merge/plan/plan_steps.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "base/status.h"
#include "kernels/backends.h"
#include "merge/plan/sizing.h"

namespace pewter {
namespace {

// Part of the fingerprint: raised when the same recipe and inputs give other bytes.
constexpr absl::string_view kPlanFormat = "pewter-plan-1";

absl::Status SetFingerprint(const std::vector<std::pair<std::string, std::string>>& overrides,
                            Plan& plan) {
  Sha256 digest;
  const auto add = [&](absl::string_view text) {
    digest.Update(absl::StrCat(text.size(), ":"));
    digest.Update(text);
  };
  const auto add_stat = [&](const ObjectStat& stat) {
    if (stat.etag.empty()) {
      add(absl::StrCat(stat.size, " ", stat.mtime_ns));
    } else {
      add(stat.etag);
    }
  };
  const PlanOptions& options = plan.options;
  add(kPlanFormat);
  add(plan.recipe_text);
  for (const auto& [key, value] : overrides) {
    add(key);
    add(value);
  }
  // Reductions of a GPU and of a CPU agree within a tolerance only.
  add(options.device == "cpu" ? "cpu" : "gpu");
  add(absl::StrCat(options.seed, " ", options.allow_mixed, " ", options.truncate_vocabularies, " ",
                   options.shard_bytes, " ", options.copy_tokenizer, " ",
                   options.write_model_card));
  add(absl::StrCat(static_cast<int>(options.raw_names), " ", options.name_by_name));
  for (const InputFile& file : plan.files) {
    add_stat(file.stat);
    for (const HeaderRange& range : file.header) add(absl::StrCat(range.crc32c));
  }
  for (const std::string& data : plan.data_digests) add(data);
  for (const PlanFile& file : plan.aux_files) {
    add(file.name);
    add(file.text);
    if (file.model < 0) continue;
    ASSIGN_OR_RETURN(const ObjectStat stat,
                     plan.models[file.model].checkpoint->store().Stat(file.name));
    add_stat(stat);
  }
  add(plan.config_json);
  for (const PlanShard& shard : plan.shards) {
    add(shard.file);
    add(shard.header);
  }
  plan.fingerprint = digest.Finish();
  return absl::OkStatus();
}

}  // namespace

absl::Status ResolveOptions(PlanOptions& options) {
  if (options.memory_bytes < 0 || options.threads < 0 || options.shard_bytes <= 0) {
    return absl::InvalidArgumentError(
        "memory and threads must not be negative, and a shard needs at least one byte");
  }
  if (options.memory_bytes == 0) {
    const int64_t ram = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
    options.memory_bytes = std::min(int64_t{4} << 30, ram / 4);
  }
  if (options.threads == 0) {
    options.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(options.device));
  options.device = device.ToString();
  return absl::OkStatus();
}

int AddModel(absl::string_view kind, std::string ref, std::shared_ptr<const Checkpoint> checkpoint,
             Plan& plan) {
  const std::vector<InputFile>& files = checkpoint->files();
  for (const std::string& warning : checkpoint->warnings()) {
    plan.warnings.push_back(absl::StrCat(kind, " ", ref, ": ", warning));
  }
  plan.models.push_back({.ref = std::move(ref),
                         .checkpoint = std::move(checkpoint),
                         .file_base = static_cast<int>(plan.files.size())});
  plan.files.insert(plan.files.end(), files.begin(), files.end());
  return static_cast<int>(plan.models.size()) - 1;
}

absl::Status FinishPlan(const std::vector<std::pair<std::string, std::string>>& overrides,
                        Plan& plan) {
  ASSIGN_OR_RETURN(const Sizing sizing, SizeRun(plan));
  plan.peak_bytes = sizing.peak_bytes;
  RETURN_IF_ERROR(SetFingerprint(overrides, plan));
  if (!plan.options.strict || plan.warnings.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("warnings are errors (strict): ", absl::StrJoin(plan.warnings, "; ")));
}

std::string Listed(const std::vector<std::string>& names) {
  constexpr size_t kNamesShown = 5;
  if (names.size() <= kNamesShown) return absl::StrJoin(names, ", ");
  return absl::StrCat(absl::StrJoin(names.begin(), names.begin() + kNamesShown, ", "), " and ",
                      names.size() - kNamesShown, " more");
}

absl::StatusOr<bool> EqualBytes(const TensorSource& a, const TensorSource& b) {
  constexpr int64_t kChunk = int64_t{1} << 17;
  const int64_t width = ByteWidth(a.dtype());
  const int64_t elements = a.shape().elements();
  std::vector<std::byte> from_a(std::min(kChunk, elements) * width);
  std::vector<std::byte> from_b(from_a.size());
  for (int64_t first = 0; first < elements; first += kChunk) {
    const int64_t count = std::min(kChunk, elements - first);
    RETURN_IF_ERROR(a.Read(first, count, {from_a.data(), size_t(count * width)}, nullptr));
    RETURN_IF_ERROR(b.Read(first, count, {from_b.data(), size_t(count * width)}, nullptr));
    if (std::memcmp(from_a.data(), from_b.data(), count * width) != 0) return false;
  }
  return true;
}

}  // namespace pewter
