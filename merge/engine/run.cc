#include "merge/engine/run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/failpoint.h"
#include "base/reason.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/engine/alignments.h"
#include "merge/engine/buffer_pool.h"
#include "merge/engine/manifest.h"
#include "merge/engine/memory_budget.h"
#include "merge/engine/shard_writer.h"
#include "merge/engine/stages.h"
#include "merge/engine/tensor_run.h"
#include "merge/engine/tile_scheduler.h"
#include "merge/evaluate/evaluation.h"
#include "merge/plan/sizing.h"
#include "store/housekeeping.h"
#include "store/read_ahead.h"

namespace pewter {
namespace {

// Tensors of one shard that are merged at a time: enough that lanes have work while a small
// tensor's pass ends.
constexpr int kTensorsInFlight = 4;
constexpr int64_t kMostManifestBytes = int64_t{256} << 20;

absl::Status Stopped() { return absl::CancelledError("the merge was stopped"); }

double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

// Counts and reports, at most ten times a second.
class ProgressMeter {
 public:
  ProgressMeter(const Plan& plan, Observer* observer) : observer_(observer) {
    progress_.phase = Phase::kMerging;
    progress_.tensors_total = static_cast<int64_t>(plan.tensors.size());
    if (!plan.stages.empty()) {
      progress_.stage = progress_.stages = static_cast<int>(plan.stages.size()) + 1;
    }
    for (const PlanShard& shard : plan.shards) progress_.bytes_total += shard.bytes;
  }

  void Add(int64_t Progress::*counter, int64_t amount) {
    std::lock_guard lock(mutex_);
    progress_.*counter += amount;
    Report(/*always=*/false);
  }
  // Reused shards count as written but not for the rate.
  void Reuse(int64_t bytes, int64_t tensors) {
    std::lock_guard lock(mutex_);
    ++progress_.shards_reused;
    progress_.bytes_written += bytes;
    progress_.tensors_done += tensors;
    rate_bytes_ = progress_.bytes_written;
  }
  void Current(const std::string& tensor) {
    std::lock_guard lock(mutex_);
    progress_.current = tensor;
  }
  void Enter(Phase phase) {
    std::lock_guard lock(mutex_);
    progress_.phase = phase;
    Report(/*always=*/true);
  }
  double seconds() const { return Seconds(Clock::now() - start_); }

 private:
  using Clock = std::chrono::steady_clock;

  void Report(bool always) {
    if (observer_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    if (!always && now - reported_ < std::chrono::milliseconds(100)) return;
    reported_ = now;
    progress_.seconds = Seconds(now - start_);
    if (const double span = Seconds(now - rate_from_); span >= 0.5) {
      const double rate = static_cast<double>(progress_.bytes_written - rate_bytes_) / span;
      // Half old, half new: steady to look at, and follows within a few seconds.
      progress_.bytes_per_second =
          progress_.bytes_per_second == 0 ? rate : (progress_.bytes_per_second + rate) / 2;
      rate_from_ = now;
      rate_bytes_ = progress_.bytes_written;
    }
    progress_.seconds_left =
        progress_.bytes_per_second > 0
            ? static_cast<double>(progress_.bytes_total - progress_.bytes_written) /
                  progress_.bytes_per_second
            : -1;
    observer_->OnProgress(progress_);
  }

  Observer* const observer_;
  std::mutex mutex_;
  Progress progress_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point reported_, rate_from_ = start_;
  int64_t rate_bytes_ = 0;
};

// Tells the stores of a plan's inputs what will be read next: tensors in the order of a walk over
// them, some ahead of the one that is reached. Thread-safe.
class ReadAnnouncer {
 public:
  // `tensors`: the walk; must outlive the announcer.
  template <class Index>
  ReadAnnouncer(const Plan& plan, const std::vector<Index>& tensors)
      : count_(tensors.size()), tensor_([&plan, &tensors](size_t place) -> const PlanTensor& {
          return plan.tensors[tensors[place]];
        }) {}

  void Reach(size_t place) {
    std::lock_guard lock(mutex_);
    for (; announced_ < std::min(count_, place + kAhead); ++announced_) {
      const PlanTensor& tensor = tensor_(announced_);
      ReadIntents& intents = intents_[announced_];
      for (const PlanInput& input : tensor.inputs) input.source->WillRead(intents);
      if (tensor.base) tensor.base->source->WillRead(intents);
    }
  }
  void Leave(size_t place) {
    ReadIntents done;  // goes after the lock
    std::lock_guard lock(mutex_);
    done.swap(intents_[place]);
    intents_.erase(place);
  }

 private:
  // Small tensors take a round trip each.
  static constexpr size_t kAhead = 32;

  const size_t count_;
  const std::function<const PlanTensor&(size_t)> tensor_;
  std::mutex mutex_;
  size_t announced_ = 0;                   // guarded by mutex_
  std::map<size_t, ReadIntents> intents_;  // by place; guarded by mutex_
};

bool IsWeights(absl::string_view key) {
  return key.find('/') == absl::string_view::npos &&
         (absl::StartsWith(key, "model") || absl::StartsWith(key, "adapter_model")) &&
         absl::EndsWith(key, ".safetensors");
}

class Run {
 public:
  Run(const Plan& plan, const RunOptions& options)
      : plan_(plan), options_(options), meter_(plan, options.observer) {}

  absl::StatusOr<Manifest> Execute();

 private:
  absl::Status MayWrite(WriteKind kind) const {
    return options_.may_write == nullptr ? absl::OkStatus() : options_.may_write(kind);
  }
  absl::Status PrepareOutput();
  absl::Status ReuseShard(int index, const ShardRecord& record);
  absl::Status CheckSpace(const std::vector<ObjectEntry>& entries) const;
  absl::Status Unpublish(const std::vector<ObjectEntry>& entries);
  absl::Status Align();
  absl::Status MergeShards();
  // Of tensors whose results go to `writer`; null while they are measured.
  TensorRun::Environment EnvironmentOf(ShardWriter* writer);
  absl::Status MeasureTensors();
  absl::Status MergeShard(int index);
  absl::Status CheckInputsUnchanged();
  absl::Status Publish();
  absl::Status EvaluateOutput();
  absl::Status WriteAux(const std::string& name, absl::string_view text);
  std::string StateJson() const;
  absl::Status SaveState();
  // The manifest that is there then.
  absl::StatusOr<std::string> PublishManifest(const std::string& json);

  const Plan& plan_;
  const RunOptions& options_;
  ProgressMeter meter_;
  std::shared_ptr<ObjectStore> output_;
  std::unique_ptr<TileScheduler> scheduler_;
  std::unique_ptr<BufferPool> buffers_;
  std::string device_description_;
  Sizing sizing_;
  std::atomic<int64_t> candidate_bytes_ = 0;
  std::unique_ptr<MemoryBudget> task_memory_;
  std::vector<double> measured_;
  std::mutex mutex_;
  RunState state_;  // guarded by mutex_ while shards are merged
  int64_t shards_reused_ = 0;
  std::vector<OutputFile> aux_files_;
  std::string evaluation_json_;
};

absl::Status Run::PrepareOutput() {
  ASSIGN_OR_RETURN(output_, OpenStore(options_.output));
  ASSIGN_OR_RETURN(const std::vector<ObjectEntry> entries, output_->List(""));
  const bool has_state = std::any_of(entries.begin(), entries.end(), [](const ObjectEntry& entry) {
    return entry.key == kStateFile;
  });
  const bool has_manifest =
      std::any_of(entries.begin(), entries.end(),
                  [](const ObjectEntry& entry) { return entry.key == kManifestFile; });
  state_.fingerprint = plan_.fingerprint;
  if (options_.mode == OutputMode::kOverwrite) {
    RETURN_IF_ERROR(CheckSpace(entries));
    RETURN_IF_ERROR(Unpublish(entries));
  } else if (options_.mode == OutputMode::kResume && has_state) {
    ASSIGN_OR_RETURN(const RunState found, RunState::Read(*output_));
    if (found.fingerprint != plan_.fingerprint) {
      return absl::FailedPreconditionError(absl::StrCat(
          options_.output,
          " holds an unfinished run of another plan (the recipe, the inputs or options "
          "have changed); use --overwrite to start again"));
    }
    state_.artefacts = found.artefacts;
    for (const auto& [index, record] : found.shards) {
      // A shard that does not check out is merged again.
      if (ReuseShard(index, record).ok()) state_.shards[index] = record;
    }
  } else if (!entries.empty()) {
    if (has_state) {
      return absl::AlreadyExistsError(
          absl::StrCat(options_.output,
                       " holds an unfinished run; use --resume to go on with "
                       "it or --overwrite to start again"));
    }
    return absl::AlreadyExistsError(absl::StrCat(
        options_.output, has_manifest ? " already holds a finished model" : " is not empty",
        "; choose another output or use --overwrite"));
  }
  if (options_.mode != OutputMode::kOverwrite) RETURN_IF_ERROR(CheckSpace(entries));
  // Also shows, before any work, that the output can be written, and that a manifest can be created
  // in the end; of runs that begin together one gets the folder.
  if (options_.mode == OutputMode::kResume && has_state) return SaveState();
  const absl::Status begun = WriteNewText(*output_, kStateFile, StateJson());
  if (!absl::IsAlreadyExists(begun)) return begun;
  return absl::AlreadyExistsError(
      absl::StrCat("another run has just begun to write to ", options_.output));
}

absl::Status Run::ReuseShard(int index, const ShardRecord& record) {
  const absl::Status mismatch = absl::DataLossError("not the shard that the state file describes");
  if (index < 0 || index >= static_cast<int>(plan_.shards.size())) return mismatch;
  const PlanShard& shard = plan_.shards[index];
  ASSIGN_OR_RETURN(const ObjectStat stat, output_->Stat(shard.file));
  if (record.file.name != shard.file || stat.size != shard.bytes || record.file.sha256.empty())
    return mismatch;
  ASSIGN_OR_RETURN(const std::string sha256, Sha256OfObject(*output_, shard.file, stat.size));
  if (sha256 != record.file.sha256) return mismatch;
  ++shards_reused_;
  meter_.Reuse(shard.bytes, static_cast<int64_t>(shard.tensors.size()));
  return absl::OkStatus();
}

// What the run is to write there must fit, as far as anybody can say before it begins.
absl::Status Run::CheckSpace(const std::vector<ObjectEntry>& entries) const {
  const std::optional<int64_t> free = FreeBytes(*output_);
  if (!free) return absl::OkStatus();
  int64_t needed = 0, reclaimed = 0;
  for (size_t i = 0; i < plan_.shards.size(); ++i) {
    if (!state_.shards.contains(static_cast<int>(i))) needed += plan_.shards[i].bytes;
  }
  if (options_.mode == OutputMode::kOverwrite) {
    for (const ObjectEntry& entry : entries) {
      if (IsWeights(entry.key)) reclaimed += entry.stat.size;
    }
  }
  if (needed <= *free + reclaimed) return absl::OkStatus();
  return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                        options_.output, ": the disk is too full: the output takes ", needed,
                        " bytes (", FormatBytes(needed), "), ", *free + reclaimed, " (",
                        FormatBytes(*free + reclaimed), ") are free")),
                    kDiskFull);
}

absl::Status Run::Unpublish(const std::vector<ObjectEntry>& entries) {
  // Asked before each: a run that is late must not take away what its successor has written.
  const auto remove = [&](absl::string_view key) -> absl::Status {
    RETURN_IF_ERROR(MayWrite(WriteKind::kPart));
    RETURN_IF_ERROR(output_->Remove(key));
    return Reach(Failpoint::kUnpublished);
  };
  // First what makes it a model, then its weights; other files of the user stay.
  for (const char* name : {kManifestFile, "model.safetensors.index.json", "config.json",
                           "adapter_config.json", kStateFile}) {
    RETURN_IF_ERROR(remove(name));
  }
  for (const ObjectEntry& entry : entries) {
    const absl::string_view key = entry.key;
    const bool evaluation = absl::StartsWith(key, "evaluation") &&
                            (absl::EndsWith(key, ".json") || absl::EndsWith(key, ".html") ||
                             absl::EndsWith(key, ".svg"));
    // What was found out of other models or data would be taken for what this run looks for.
    const bool found = absl::StrContains(key, ".safetensors") &&
                       (absl::StartsWith(key, "statistics") || absl::StartsWith(key, "alignment"));
    if (IsWeights(key) || evaluation || found) RETURN_IF_ERROR(remove(key));
  }
  return absl::OkStatus();
}

std::string Run::StateJson() const {
  return options_.hash_output ? state_.ToJson() : RunState{state_.fingerprint, {}, {}}.ToJson();
}

absl::Status Run::SaveState() {
  RETURN_IF_ERROR(MayWrite(WriteKind::kPart));
  return WriteText(*output_, kStateFile, StateJson());
}

absl::StatusOr<std::string> Run::PublishManifest(const std::string& json) {
  RETURN_IF_ERROR(MayWrite(WriteKind::kManifest));
  RETURN_IF_ERROR(Reach(Failpoint::kBeforeCommit));
  const absl::Status published = WriteNewText(*output_, kManifestFile, json);
  if (published.ok()) return json;
  if (!absl::IsAlreadyExists(published)) return published;
  // By a run of the same plan, whose bytes are the same: this one, before it was killed and
  // resumed, or a second one.
  ASSIGN_OR_RETURN(const ModelOrigin theirs, OriginOfModel(*output_));
  if (theirs.fingerprint == plan_.fingerprint && theirs.job == options_.job) {
    return ReadText(*output_, kManifestFile, kMostManifestBytes);
  }
  return absl::AlreadyExistsError(absl::StrCat("another run has published another model at ",
                                               options_.output, " in the meantime"));
}

absl::Status Run::MergeShard(int index) {
  const PlanShard& shard = plan_.shards[index];
  ASSIGN_OR_RETURN(std::unique_ptr<ObjectWriter> object, output_->Create(shard.file));
  ShardWriter writer(shard, std::move(object),
                     {.window_bytes = sizing_.window_bytes,
                      .hash = options_.hash_output,
                      .advanced =
                          [this](int64_t bytes) {
                            meter_.Add(&Progress::bytes_written, bytes);
                            scheduler_->Wake();
                          },
                      .failed = [this](const absl::Status& status) { scheduler_->Abort(status); }});
  TensorRun::Environment environment = EnvironmentOf(&writer);
  ReadAnnouncer announcer(plan_, shard.tensors);
  size_t next = 0;
  std::mutex order_mutex;  // guards `next`; held while a task waits for memory, so that they come
                           // in order
  std::mutex mutex;
  absl::Status status;
  std::map<size_t, ShardRecord> parts;  // by place of the tensor, so that warnings keep plan order
  const auto coordinate = [&] {
    while (true) {
      std::unique_lock order(order_mutex);
      const size_t i = next++;
      if (i >= shard.tensors.size()) return;
      const PlanTensor& tensor = plan_.tensors[shard.tensors[i]];
      const auto memory = task_memory_->Acquire(tensor.task == nullptr ? 0 : tensor.task->bytes());
      order.unlock();
      meter_.Current(tensor.name);
      announcer.Reach(i);
      TensorRun run(tensor, shard.tensors[i], environment);
      absl::Status merged = run.Run();
      if (merged.ok()) merged = Reach(Failpoint::kTensorDone);
      announcer.Leave(i);
      std::lock_guard lock(mutex);
      if (!merged.ok()) {
        if (status.ok()) status = merged;
        scheduler_->Abort(merged);
        return;
      }
      parts[i] = {.ranges = run.TakeRanges(), .warnings = run.warnings()};
      if (!run.report().empty()) parts[i].reports[tensor.name] = run.report();
      meter_.Add(&Progress::tensors_done, 1);
    }
  };
  {
    std::vector<std::jthread> coordinators;
    // A task has one lane to itself.
    const size_t wanted =
        sizing_.task_bytes > 0 ? std::max(kTensorsInFlight, sizing_.lanes) : kTensorsInFlight;
    const size_t count = std::min(wanted, shard.tensors.size());
    for (size_t i = 0; i < count; ++i) coordinators.emplace_back(coordinate);
  }
  RETURN_IF_ERROR(status);
  RETURN_IF_ERROR(Reach(Failpoint::kBeforeShard));
  RETURN_IF_ERROR(MayWrite(WriteKind::kPart));
  ShardRecord record{.file = {.name = shard.file, .bytes = shard.bytes}};
  ASSIGN_OR_RETURN(record.file.sha256, writer.Finish());
  RETURN_IF_ERROR(Reach(Failpoint::kShardDone));
  for (auto& [place, part] : parts) {
    record.ranges.insert(record.ranges.end(), part.ranges.begin(), part.ranges.end());
    for (std::string& warning : part.warnings) {
      if (options_.observer != nullptr) options_.observer->OnWarning(warning);
      record.warnings.push_back(std::move(warning));
    }
  }
  for (auto& [place, part] : parts) record.reports.merge(part.reports);
  record.ranges = JoinRanges(std::move(record.ranges));
  std::lock_guard lock(mutex_);
  state_.shards[index] = std::move(record);
  RETURN_IF_ERROR(SaveState());
  return Reach(Failpoint::kShardRecorded);
}

TensorRun::Environment Run::EnvironmentOf(ShardWriter* writer) {
  return {.scheduler = *scheduler_,
          .buffers = *buffers_,
          .writer = writer,
          .candidate_bytes = candidate_bytes_,
          .tile_elements = sizing_.tile_elements,
          .seed = plan_.options.seed,
          .allow_nonfinite = options_.allow_nonfinite,
          .report = plan_.report,
          .measured = measured_,
          .on_read = [this](int64_t bytes) { meter_.Add(&Progress::bytes_read, bytes); }};
}

absl::Status Run::Align() {
  return FindAlignments(
      plan_, {.output = output_,
              .written = state_.artefacts,
              .current =
                  [this](const std::string& what) {
                    meter_.Current(what);
                    meter_.Enter(Phase::kMerging);
                  },
              .write = [this](const std::string& name, absl::string_view text) -> absl::Status {
                RETURN_IF_ERROR(WriteAux(name, text));
                state_.artefacts[name] = Sha256::Of(text);
                return SaveState();
              },
              .stop = options_.stop});
}

absl::Status Run::MeasureTensors() {
  if (plan_.measure == nullptr) return absl::OkStatus();
  TensorRun::Environment environment = EnvironmentOf(/*writer=*/nullptr);
  std::vector<size_t> measured;
  for (size_t i = 0; i < plan_.tensors.size(); ++i) {
    if (plan_.tensors[i].measured) measured.push_back(i);
  }
  const std::unique_ptr<Measure> measure = plan_.measure();
  while (!measure->done()) {
    ReadAnnouncer announcer(plan_, measured);
    std::atomic<size_t> next{0};
    std::mutex mutex;
    absl::Status status;
    const auto see = [&] {
      for (size_t i = next++; i < measured.size(); i = next++) {
        const PlanTensor& tensor = plan_.tensors[measured[i]];
        const auto memory =
            task_memory_->Acquire(tensor.task == nullptr ? 0 : tensor.task->bytes());
        announcer.Reach(i);
        const absl::Status seen =
            TensorRun(tensor, static_cast<int64_t>(measured[i]), environment).Measure(*measure);
        announcer.Leave(i);
        if (seen.ok()) continue;
        std::lock_guard lock(mutex);
        if (status.ok()) status = seen;
        next = measured.size();
      }
    };
    {
      std::vector<std::jthread> threads;
      const size_t wanted = std::max(kTensorsInFlight, sizing_.lanes);
      for (size_t i = 0; i < std::min(wanted, measured.size()); ++i) threads.emplace_back(see);
    }
    RETURN_IF_ERROR(status);
    RETURN_IF_ERROR(measure->EndRound());
  }
  measured_ = measure->Found();
  return absl::OkStatus();
}

absl::Status Run::MergeShards() {
  ASSIGN_OR_RETURN(sizing_, SizeRun(plan_));
  if (sizing_.read_ahead_bytes > 0) ReadAhead::Shared().SetCapacity(sizing_.read_ahead_bytes);
  // Of the eighth that lanes, windows and candidates leave.
  output_->LimitWriters(plan_.options.memory_bytes / 8 / sizing_.open_shards);
  candidate_bytes_ = sizing_.candidate_bytes;
  task_memory_ = std::make_unique<MemoryBudget>(sizing_.task_bytes);
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(plan_.options.device));
  ASSIGN_OR_RETURN(std::unique_ptr<kernels::Backend> allocator,
                   kernels::OpenBackend(device, /*threads=*/1));
  device_description_ = allocator->description();
  buffers_ = std::make_unique<BufferPool>(std::move(allocator),
                                          sizing_.window_bytes * sizing_.open_shards);
  ASSIGN_OR_RETURN(scheduler_, TileScheduler::Create(device, sizing_.lanes, options_.stop));
  RETURN_IF_ERROR(MeasureTensors());

  std::atomic<int> next{0};
  std::mutex mutex;
  absl::Status status;
  const auto merge_next = [&] {
    for (int i = next++; i < static_cast<int>(plan_.shards.size()); i = next++) {
      {
        std::lock_guard lock(mutex_);
        if (state_.shards.contains(i)) continue;
      }
      const absl::Status merged = options_.stop.stop_requested() ? Stopped() : MergeShard(i);
      if (merged.ok()) continue;
      std::lock_guard lock(mutex);
      if (status.ok()) status = merged;
      return;
    }
  };
  {
    std::vector<std::jthread> shard_threads;
    for (int i = 0; i < sizing_.open_shards; ++i) shard_threads.emplace_back(merge_next);
  }
  scheduler_.reset();
  return status;
}

absl::Status Run::CheckInputsUnchanged() {
  for (const InputFile& file : plan_.files) {
    ASSIGN_OR_RETURN(const ObjectStat now, file.store->Stat(file.key));
    if (now.size != file.stat.size || now.mtime_ns != file.stat.mtime_ns ||
        now.etag != file.stat.etag) {
      return absl::FailedPreconditionError(absl::StrCat(
          file.Describe(), " changed while it was being merged; run again with --overwrite"));
    }
  }
  return absl::OkStatus();
}

absl::Status Run::WriteAux(const std::string& name, absl::string_view text) {
  RETURN_IF_ERROR(MayWrite(WriteKind::kPart));
  RETURN_IF_ERROR(WriteText(*output_, name, text));
  OutputFile file{.name = name, .bytes = static_cast<int64_t>(text.size())};
  if (options_.hash_output) file.sha256 = Sha256::Of(text);
  aux_files_.push_back(std::move(file));
  return Reach(Failpoint::kAuxWritten);
}

absl::Status Run::Publish() {
  constexpr int64_t kLargestCopy = int64_t{1} << 30;
  for (const PlanFile& file : plan_.aux_files) {
    if (file.model < 0) {
      RETURN_IF_ERROR(WriteAux(file.name, file.text));
    } else {
      ASSIGN_OR_RETURN(
          const std::string text,
          ReadText(plan_.models[file.model].checkpoint->store(), file.name, kLargestCopy));
      RETURN_IF_ERROR(WriteAux(file.name, text));
    }
  }
  if (!plan_.config_json.empty()) RETURN_IF_ERROR(WriteAux(plan_.config_file, plan_.config_json));
  if (!plan_.index_json.empty())
    RETURN_IF_ERROR(WriteAux("model.safetensors.index.json", plan_.index_json));
  return absl::OkStatus();
}

absl::Status Run::EvaluateOutput() {
  if (plan_.evaluation == nullptr) return absl::OkStatus();
  meter_.Enter(Phase::kEvaluating);
  buffers_.reset();
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(plan_.options.device));
  ASSIGN_OR_RETURN(const auto backend, kernels::OpenBackend(device, plan_.options.threads));
  const ForwardOptions forward{
      .backend = backend.get(), .memory_bytes = plan_.options.memory_bytes, .stop = options_.stop};
  ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open({.path = options_.output}, output_));
  ASSIGN_OR_RETURN(const ForwardModel merged, MakeForwardModel(std::move(checkpoint)));
  const EvaluationPlan& plan = *plan_.evaluation;
  ASSIGN_OR_RETURN(const Evaluation found, Evaluate(merged, plan.data, plan.metric, forward));
  ASSIGN_OR_RETURN(const std::vector<CurveReport> curves, ComputeCurves(plan, forward));
  for (const auto& [name, text] : EvaluationFiles(plan, found, curves)) {
    if (name == kEvaluationFile) evaluation_json_ = text;
    RETURN_IF_ERROR(WriteAux(name, text));
  }
  return absl::OkStatus();
}

absl::StatusOr<Manifest> Run::Execute() {
  RETURN_IF_ERROR(CheckStagesFolder(plan_, options_));
  RETURN_IF_ERROR(PrepareOutput());
  RETURN_IF_ERROR(Reach(Failpoint::kAfterBegin));
  const absl::Cleanup unbind = [this] {
    UnbindStages(plan_);
    ForgetAlignments(plan_);
  };
  ASSIGN_OR_RETURN(const std::vector<std::string> stages, MergeStages(plan_, options_));
  RETURN_IF_ERROR(Align());
  RETURN_IF_ERROR(MergeShards());
  RETURN_IF_ERROR(CheckInputsUnchanged());
  meter_.Enter(Phase::kPublishing);
  // The observer may have stopped the run just now: a worker that lost its lease must not publish.
  if (options_.stop.stop_requested()) return Stopped();
  RETURN_IF_ERROR(Reach(Failpoint::kBeforePublish));
  RETURN_IF_ERROR(Publish());
  RETURN_IF_ERROR(EvaluateOutput());
  Manifest manifest{.fingerprint = plan_.fingerprint,
                    .shards_reused = shards_reused_,
                    .seconds = meter_.seconds(),
                    .warnings = plan_.warnings,
                    .evaluation_json = std::move(evaluation_json_)};
  for (const auto& [index, shard] : state_.shards) {
    manifest.bytes_written += shard.file.bytes;
    manifest.warnings.insert(manifest.warnings.end(), shard.warnings.begin(), shard.warnings.end());
  }
  manifest.json = ManifestJson({.plan = plan_,
                                .shards = state_.shards,
                                .aux_files = aux_files_,
                                .device = device_description_,
                                .threads = plan_.options.threads,
                                .seconds = manifest.seconds,
                                .shards_reused = shards_reused_,
                                .job = options_.job,
                                .stage_manifests = stages});
  ASSIGN_OR_RETURN(manifest.json, PublishManifest(manifest.json));
  // The model is there: what fails now leaves something behind, and is no failure of the run.
  absl::Status cleaned = Reach(Failpoint::kAfterCommit);
  cleaned.Update(output_->Remove(kStateFile));
  cleaned.Update(RemoveStages(plan_, stages, options_));
  if (!cleaned.ok()) {
    manifest.warnings.push_back(
        absl::StrCat("the model is complete; cleaning up failed: ", cleaned.message()));
    if (options_.observer != nullptr) options_.observer->OnWarning(manifest.warnings.back());
  }
  meter_.Enter(Phase::kDone);
  return manifest;
}

}  // namespace

absl::StatusOr<Manifest> RunPlan(const Plan& plan, const RunOptions& options) {
  return Run(plan, options).Execute();
}

}  // namespace pewter
