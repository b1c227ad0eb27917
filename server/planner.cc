#include "server/planner.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/admission.h"
#include "server/convert.h"
#include "server/digest.h"
#include "server/errors.h"

namespace pewter::server {
namespace {

constexpr int kDefaultPage = 1000;
constexpr int kMaxPage = 5000;

}  // namespace

absl::StatusOr<v1::PlanMergeResponse> Planner::Plan(const v1::PlanMergeRequest& request) {
  RETURN_IF_ERROR(CheckPlanMerge(request, access_));
  v1::PlanMergeRequest bound = request;
  bound.clear_page_token();
  bound.clear_page_size();
  const std::string digest = DigestOf(bound);
  ASSIGN_OR_RETURN(const PageToken page, ParsePageToken(request.page_token(), digest));

  const int before = running_.fetch_add(1);
  const absl::Cleanup done = [this] { running_.fetch_sub(1); };
  if (before >= max_plans_) {
    return WithQuota(MakeError(absl::StatusCode::kResourceExhausted, "TOO_MANY_PLANS",
                               absl::StrCat(before,
                                            " plans are being made, as many as this server "
                                            "makes at a time; try again"),
                               {{"limit", absl::StrCat(max_plans_)}}),
                     "server", absl::Seconds(1));
  }

  v1::PlanMergeResponse response;
  const absl::StatusOr<Recipe> recipe = ToRecipe(request.recipe(), request.options());
  if (!recipe.ok()) {
    for (v1::Finding& finding : ToFindings(recipe.status())) {
      *response.add_findings() = std::move(finding);
    }
    return response;
  }
  const absl::StatusOr<pewter::Plan> plan = MakePlan(*recipe, ToPlanOptions(request.options()));
  if (!plan.ok()) {
    for (v1::Finding& finding : ToFindings(plan.status())) {
      *response.add_findings() = std::move(finding);
    }
    for (const std::string& warning : recipe->warnings) {
      *response.add_findings() = ToWarning(warning);
    }
    return response;
  }
  if (!page.version.empty() && page.version != plan->fingerprint) {
    return WithPrecondition(
        MakeError(absl::StatusCode::kFailedPrecondition, "PLAN_CHANGED",
                  "the inputs changed since the last page; begin with the first page"),
        "INPUTS", "recipe");
  }
  const int size =
      request.page_size() == 0 ? kDefaultPage : std::min(request.page_size(), kMaxPage);
  *response.mutable_plan() = ToPlanSummary(*plan, page.position, size);
  const int64_t end = page.position + response.plan().tensors_size();
  if (end < response.plan().tensors_total()) {
    response.set_next_page_token(
        FormatPageToken({.position = end, .version = plan->fingerprint}, digest));
  }
  return response;
}

}  // namespace pewter::server
