#include "merge/engine/alignments.h"

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/digest.h"
#include "base/status.h"
#include "kernels/backends.h"
#include "merge/align/aligned_model.h"
#include "merge/align/aligner.h"
#include "merge/align/alignment.h"
#include "merge/align/data_aligner.h"
#include "merge/engine/manifest.h"
#include "merge/forward/evaluate.h"

namespace pewter {
namespace {

absl::StatusOr<Alignment> ReadWritten(const PlanAlignment& plan, const AlignmentRun& run) {
  const auto digest = run.written.find(plan.file);
  if (digest == run.written.end()) return absl::NotFoundError("not written yet");
  ASSIGN_OR_RETURN(const ObjectStat stat, run.output->Stat(plan.file));
  ASSIGN_OR_RETURN(const std::string sha256, Sha256OfObject(*run.output, plan.file, stat.size));
  if (sha256 != digest->second) return absl::DataLossError("not the file that was written");
  ASSIGN_OR_RETURN(Alignment alignment, ReadAlignment(*run.output, plan.file));
  RETURN_IF_ERROR(CheckAlignment(*plan.symmetry, alignment));
  return alignment;
}

// What finds and verifies the alignments of one plan.
class Finder {
 public:
  Finder(const Plan& plan, const AlignmentRun& run) : plan_(plan), run_(run) {}

  absl::Status Open() {
    ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(plan_.options.device));
    ASSIGN_OR_RETURN(backend_, kernels::OpenBackend(device, plan_.options.threads));
    ASSIGN_OR_RETURN(host_, kernels::OpenBackend({}, plan_.options.threads));
    return absl::OkStatus();
  }

  absl::Status FindOne(const PlanAlignment& alignment) const {
    absl::StatusOr<Alignment> found = ReadWritten(alignment, run_);
    if (!found.ok()) found = Align(alignment);
    RETURN_IF_ERROR(found.status());
    RETURN_IF_ERROR(CheckAlignment(*alignment.symmetry, *found));
    if (alignment.verify != nullptr) RETURN_IF_ERROR(Verify(alignment, *found));
    ASSIGN_OR_RETURN(const std::string file, SerializeAlignment(*found));
    RETURN_IF_ERROR(run_.write(alignment.file, file));
    if (alignment.statistics != nullptr) {
      ASSIGN_OR_RETURN(auto statistics, CollectPair(RunOf(alignment), alignment.statistics,
                                                    Grams::kAll, plan_.options.memory_bytes));
      alignment.slot->SetStatistics(std::move(statistics));
    }
    alignment.slot->Set(std::make_shared<const Alignment>(*std::move(found)));
    return absl::OkStatus();
  }

 private:
  AlignerRun RunOf(const PlanAlignment& alignment) const {
    return {.symmetry = *alignment.symmetry,
            .reference = *plan_.models[alignment.reference].checkpoint,
            .model = *plan_.models[alignment.model].checkpoint,
            .backend = *backend_,
            .host = *host_,
            .threads = plan_.options.threads,
            .seed = plan_.options.seed,
            .check = [this]() -> absl::Status {
              return run_.stop.stop_requested() ? absl::CancelledError("the merge was stopped")
                                                : absl::OkStatus();
            },
            .store = run_.output,
            .statistics = absl::StrReplaceAll(alignment.file, {{"alignment", "statistics"}})};
  }

  absl::StatusOr<Alignment> Align(const PlanAlignment& alignment) const {
    const PlanModel &reference = plan_.models[alignment.reference],
                    &model = plan_.models[alignment.model];
    ASSIGN_OR_RETURN(Alignment found, alignment.aligner->Align(RunOf(alignment)));
    found.family = alignment.symmetry->family();
    found.reference = reference.ref;
    found.reference_fingerprint = AlignmentFingerprint(*alignment.symmetry, *reference.checkpoint);
    found.model = model.ref;
    found.model_fingerprint = AlignmentFingerprint(*alignment.symmetry, *model.checkpoint);
    return found;
  }

  // The model alone, before and after: where the alignment is a symmetry, a loss that moves by more
  // than rounding explains is our bug or a fault of the alignment, and the merge is not made.
  // Where it is none, both are told.
  absl::Status Verify(const PlanAlignment& alignment, Alignment& found) const {
    constexpr double kTolerance = 1e-4;  // relative
    const ForwardOptions options{
        .backend = backend_.get(), .memory_bytes = plan_.options.memory_bytes, .stop = run_.stop};
    const auto& checkpoint = plan_.models[alignment.model].checkpoint;
    ASSIGN_OR_RETURN(const ForwardModel model, MakeForwardModel(checkpoint));
    ASSIGN_OR_RETURN(const ForwardModel aligned,
                     AlignedModel(alignment.symmetry, checkpoint, found));
    ASSIGN_OR_RETURN(const Metric metric, DefaultMetric(model));
    ASSIGN_OR_RETURN(const Evaluation before, Evaluate(model, alignment.verify, metric, options));
    ASSIGN_OR_RETURN(const Evaluation after, Evaluate(aligned, alignment.verify, metric, options));
    const bool same = std::abs(after.loss - before.loss) <= kTolerance * std::abs(before.loss);
    if (!same && found.keeps_function()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the aligned model does not compute what the model does: its loss on ",
          alignment.verify->name(), " is ", after.loss, ", the model's ", before.loss));
    }
    auto report = nlohmann::json::parse(found.report.empty() ? "{}" : found.report);
    report["verified"] = {{"data", alignment.verify->name()},
                          {"predictions", before.tokens},
                          {"loss", before.loss},
                          {"loss_aligned", after.loss},
                          {"keeps_function", found.keeps_function()}};
    found.report = report.dump();
    return absl::OkStatus();
  }

  const Plan& plan_;
  const AlignmentRun& run_;
  std::unique_ptr<kernels::Backend> backend_, host_;
};

}  // namespace

absl::Status FindAlignments(const Plan& plan, const AlignmentRun& run) {
  if (plan.alignments.empty()) return absl::OkStatus();
  Finder finder(plan, run);
  RETURN_IF_ERROR(finder.Open());
  for (const PlanAlignment& alignment : plan.alignments) {
    const std::string what = absl::StrCat("alignment of ", plan.models[alignment.model].ref,
                                          " with ", plan.models[alignment.reference].ref);
    run.current(what);
    RETURN_IF_ERROR(Annotate(finder.FindOne(alignment), what));
  }
  return absl::OkStatus();
}

void ForgetAlignments(const Plan& plan) {
  for (const PlanAlignment& alignment : plan.alignments) {
    alignment.slot->Set(nullptr);
    alignment.slot->SetStatistics(nullptr);
  }
}

}  // namespace pewter
