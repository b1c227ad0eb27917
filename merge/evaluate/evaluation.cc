#include "merge/evaluate/evaluation.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/forward/interpolation.h"

namespace pewter {

absl::Status CheckCurves(const EvaluationPlan& plan, const ForwardOptions& options) {
  for (const ModelPair& pair : plan.pairs) {
    RETURN_IF_ERROR(CheckEvaluation(pair.a, plan.data, plan.metric, options));
    for (const ModelPair::View& view : pair.views) {
      RETURN_IF_ERROR(
          CheckEvaluation(Interpolate(pair.a, view.b, 0.5), plan.data, plan.metric, options));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<CurveReport>> ComputeCurves(const EvaluationPlan& plan,
                                                       const ForwardOptions& options) {
  std::vector<CurveReport> reports;
  for (const ModelPair& pair : plan.pairs) {
    CurveReport& report = reports.emplace_back();
    report.a = pair.a.name;
    for (const ModelPair::View& view : pair.views) {
      report.b = view.b.name;
      LossCurve& curve = report.curves.emplace_back();
      curve.label = view.label;
      for (const double lambda : EvenLambdas(plan.points)) {
        ASSIGN_OR_RETURN(const Evaluation found, Evaluate(Interpolate(pair.a, view.b, lambda),
                                                          plan.data, plan.metric, options));
        curve.points.push_back({.lambda = lambda, .loss = found.loss, .accuracy = found.accuracy});
      }
    }
  }
  return reports;
}

std::vector<std::pair<std::string, std::string>> EvaluationFiles(
    const EvaluationPlan& plan, const Evaluation& merged, const std::vector<CurveReport>& curves) {
  nlohmann::ordered_json lines = nlohmann::ordered_json::array();
  for (const CurveReport& report : curves) lines.push_back(CurveJson(report));
  const nlohmann::ordered_json all = {{"data", plan.data->name()},
                                      {"data_digest", plan.data->digest()},
                                      {"metric", MetricName(plan.metric)},
                                      {"value", merged.value()},
                                      {"loss", merged.loss},
                                      {"perplexity", merged.perplexity},
                                      {"accuracy", merged.accuracy},
                                      {"predictions", merged.tokens},
                                      {"lines", std::move(lines)}};
  std::vector<std::pair<std::string, std::string>> files = {
      {kEvaluationFile,
       all.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n"}};
  if (curves.empty()) return files;
  files.emplace_back("evaluation.html", CurveHtml(plan.data->name(), curves));
  for (size_t i = 0; i < curves.size(); ++i) {
    files.emplace_back(i == 0 ? "evaluation.svg" : absl::StrCat("evaluation-", i + 1, ".svg"),
                       CurveSvg(curves[i]));
  }
  return files;
}

}  // namespace pewter
