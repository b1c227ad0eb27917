// What `pewter plan` and `pewter merge --dry-run` show of a plan.
#pragma once

#include <string>

#include "client/output.h"
#include "merge/pewter.h"

namespace pewter::client {

struct PlanReportOptions {
  bool every_tensor = false;  // else tensors that differ only by numbers in their names share a row
};

// Text (the fingerprint alone when quiet) or JSON, which always has everything.
void PrintPlan(Output& out, const Plan& plan, const PlanReportOptions& options);

Json PlanToJson(const Plan& plan);
std::string PlanToText(const Plan& plan, const PlanReportOptions& options);

// "model.layers.*.mlp.up_proj.weight": runs of digits between dots become a star.
std::string NamePattern(absl::string_view tensor);
std::string ParamToString(const ParamValue& value);

}  // namespace pewter::client
