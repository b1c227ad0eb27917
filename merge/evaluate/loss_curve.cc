#include "merge/evaluate/loss_curve.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

namespace pewter {

Barrier BarrierOf(const LossCurve& curve) {
  const CurvePoint &first = curve.points.front(), &last = curve.points.back();
  const auto highest =
      std::max_element(curve.points.begin(), curve.points.end(),
                       [](const CurvePoint& a, const CurvePoint& b) { return a.loss < b.loss; });
  Barrier barrier{.above_mean = highest->loss - (first.loss + last.loss) / 2,
                  .at = highest->lambda};
  for (const CurvePoint& point : curve.points) {
    const double line = (1 - point.lambda) * first.loss + point.lambda * last.loss;
    barrier.above_line = std::max(barrier.above_line, point.loss - line);
  }
  const auto after = std::find_if(curve.points.begin() + 1, curve.points.end() - 1,
                                  [](const CurvePoint& point) { return point.lambda >= 0.5; });
  const CurvePoint &left = *(after - 1), &right = *after;
  const double share = (0.5 - left.lambda) / (right.lambda - left.lambda);
  barrier.middle = left.loss + share * (right.loss - left.loss);
  return barrier;
}

std::vector<double> EvenLambdas(int count) {
  std::vector<double> lambdas(count);
  for (int i = 0; i < count; ++i) lambdas[i] = static_cast<double>(i) / (count - 1);
  return lambdas;
}

nlohmann::ordered_json CurveJson(const CurveReport& report) {
  nlohmann::ordered_json curves = nlohmann::ordered_json::array();
  for (const LossCurve& curve : report.curves) {
    const Barrier barrier = BarrierOf(curve);
    nlohmann::ordered_json points = nlohmann::ordered_json::array();
    for (const CurvePoint& point : curve.points) {
      points.push_back(
          {{"lambda", point.lambda}, {"loss", point.loss}, {"accuracy", point.accuracy}});
    }
    curves.push_back({{"label", curve.label},
                      {"barrier", barrier.above_mean},
                      {"barrier_at", barrier.at},
                      {"barrier_above_line", barrier.above_line},
                      {"loss_at_half", barrier.middle},
                      {"points", std::move(points)}});
  }
  return {{"a", report.a}, {"b", report.b}, {"curves", std::move(curves)}};
}

}  // namespace pewter
