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

absl::StatusOr<Alignment> Find(const Plan& plan, const PlanAlignment& alignment,
                               const AlignmentRun& run) {
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(plan.options.device));
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Backend> backend,
                   kernels::OpenBackend(device, plan.options.threads));
  const PlanModel &reference = plan.models[alignment.reference],
                  &model = plan.models[alignment.model];
  ASSIGN_OR_RETURN(
      Alignment found,
      alignment.aligner->Align(
          {.symmetry = *alignment.symmetry,
           .reference = *reference.checkpoint,
           .model = *model.checkpoint,
           .backend = *backend,
           .threads = plan.options.threads,
           .seed = plan.options.seed,
           .check = [&]() -> absl::Status {
             return run.stop.stop_requested() ? absl::CancelledError("the merge was stopped")
                                              : absl::OkStatus();
           },
           .store = run.output,
           .statistics = absl::StrReplaceAll(alignment.file, {{"alignment", "statistics"}})}));
  found.family = alignment.symmetry->family();
  found.reference = reference.ref;
  found.reference_fingerprint = AlignmentFingerprint(*alignment.symmetry, *reference.checkpoint);
  found.model = model.ref;
  found.model_fingerprint = AlignmentFingerprint(*alignment.symmetry, *model.checkpoint);
  return found;
}

// The model alone, before and after: a loss that moves by more than rounding explains is our bug or
// a fault of the alignment, and the merge is not made.
absl::Status Verify(const Plan& plan, const PlanAlignment& alignment, const AlignmentRun& run,
                    Alignment& found) {
  constexpr double kTolerance = 1e-4;  // relative
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(plan.options.device));
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Backend> backend,
                   kernels::OpenBackend(device, plan.options.threads));
  const ForwardOptions options{
      .backend = backend.get(), .memory_bytes = plan.options.memory_bytes, .stop = run.stop};
  const auto& checkpoint = plan.models[alignment.model].checkpoint;
  ASSIGN_OR_RETURN(const ForwardModel model, MakeForwardModel(checkpoint));
  const auto slot = std::make_shared<AlignmentSlot>();
  slot->Set(std::make_shared<const Alignment>(found));
  ASSIGN_OR_RETURN(const ForwardModel aligned, AlignedModel(alignment.symmetry, checkpoint, slot));
  ASSIGN_OR_RETURN(const Metric metric, DefaultMetric(model));
  ASSIGN_OR_RETURN(const Evaluation before, Evaluate(model, alignment.verify, metric, options));
  ASSIGN_OR_RETURN(const Evaluation after, Evaluate(aligned, alignment.verify, metric, options));
  if (!(std::abs(after.loss - before.loss) <= kTolerance * std::abs(before.loss))) {
    return absl::FailedPreconditionError(
        absl::StrCat("the aligned model does not compute what the model does: its loss on ",
                     alignment.verify->name(), " is ", after.loss, ", the model's ", before.loss));
  }
  auto report = nlohmann::json::parse(found.report.empty() ? "{}" : found.report);
  report["verified"] = {{"data", alignment.verify->name()},
                        {"predictions", before.tokens},
                        {"loss", before.loss},
                        {"loss_aligned", after.loss}};
  found.report = report.dump();
  return absl::OkStatus();
}

}  // namespace

absl::Status FindAlignments(const Plan& plan, const AlignmentRun& run) {
  for (const PlanAlignment& alignment : plan.alignments) {
    const std::string what = absl::StrCat("alignment of ", plan.models[alignment.model].ref,
                                          " with ", plan.models[alignment.reference].ref);
    run.current(what);
    absl::StatusOr<Alignment> found = ReadWritten(alignment, run);
    if (!found.ok()) found = Find(plan, alignment, run);
    if (!found.ok()) return Annotate(found.status(), what);
    RETURN_IF_ERROR(Annotate(CheckAlignment(*alignment.symmetry, *found), what));
    if (alignment.verify != nullptr) {
      RETURN_IF_ERROR(Annotate(Verify(plan, alignment, run, *found), what));
    }
    ASSIGN_OR_RETURN(const std::string file, SerializeAlignment(*found));
    RETURN_IF_ERROR(run.write(alignment.file, file));
    alignment.slot->Set(std::make_shared<const Alignment>(*std::move(found)));
  }
  return absl::OkStatus();
}

void ForgetAlignments(const Plan& plan) {
  for (const PlanAlignment& alignment : plan.alignments) alignment.slot->Set(nullptr);
}

}  // namespace pewter
