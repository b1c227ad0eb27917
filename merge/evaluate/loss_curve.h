// LossCurve: what happens on the straight line between two models, lambda A + (1 - lambda) B.
//
// The barrier of a curve is how far its highest point lies above the mean of its two ends (Verma &
// Elbayad, arXiv 2403.00986, section 4); measured from the straight line between the ends it is
// another (Frankle et al., arXiv 1912.05671). Both agree where the ends do. Losses are in nats.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace pewter {

struct CurvePoint {
  double lambda = 0;  // the share of A
  double loss = 0;
  double accuracy = 0;  // of 1
};

struct LossCurve {
  std::string label;               // "not aligned"
  std::vector<CurvePoint> points;  // by lambda, from 0 (B) to 1 (A); at least two
};

struct Barrier {
  double above_mean = 0;  // of the ends
  double at = 0;          // the lambda of the highest point, the first of several
  double above_line = 0;  // at most, of any point
  double middle = 0;      // the loss at lambda = 1/2, between the two nearest points
};
Barrier BarrierOf(const LossCurve& curve);

// 0, ..., 1 in even steps; `count` is at least 2.
std::vector<double> EvenLambdas(int count);

// What a reader wants to see of one pair of models.
struct CurveReport {
  std::string a, b;
  std::vector<LossCurve> curves;
};
// An object with each curve's points and barriers.
nlohmann::ordered_json CurveJson(const CurveReport& report);
// A picture, complete in itself.
std::string CurveSvg(const CurveReport& report);
// A page with the pictures and the numbers, complete in itself. `data`: what the losses are of.
std::string CurveHtml(absl::string_view data, absl::Span<const CurveReport> reports);

}  // namespace pewter
