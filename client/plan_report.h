// What `pewter plan` and `pewter merge --dry-run` show of a plan.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/output.h"
#include "merge/pewter.h"

namespace pewter::client {

struct PlanReportOptions {
  bool every_tensor = false;  // else tensors that differ only by numbers in their names share a row
  // Names or shell patterns: explain the tensors that match one of them, and nothing else.
  std::vector<std::string> tensors = {};
};

// Text (the fingerprint alone when quiet) or JSON, which always has everything. NotFound when
// `options` names a tensor that the output does not have.
absl::Status PrintPlan(Output& out, const Plan& plan, const PlanReportOptions& options);

Json PlanToJson(const Plan& plan);
std::string PlanToText(const Plan& plan, const PlanReportOptions& options);

// "model.layers.*.mlp.up_proj.weight": runs of digits between dots become a star.
std::string NamePattern(absl::string_view tensor);
std::string ParamToString(const ParamValue& value);

}  // namespace pewter::client
