// The picture and the page of a CurveReport (loss_curve.h).
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "merge/evaluate/loss_curve.h"

namespace pewter {
namespace {

// In units of the picture; the frame is what the curves are drawn in.
constexpr double kWidth = 760, kHeight = 440;
constexpr double kLeft = 64, kRight = 740, kTop = 28, kBottom = 388;
constexpr double kLegendLine = 20;
// Okabe & Ito's colours, told apart by all eyes.
constexpr const char* kColours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                    "#56b4e9", "#e69f00", "#f0e442", "#555555"};

std::string Escaped(absl::string_view text) {
  return absl::StrReplaceAll(
      text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"}});
}

// The vertical axis: round numbers around all losses.
struct Scale {
  double low = 0, high = 1, step = 1;

  double Y(double loss) const { return kBottom - (loss - low) / (high - low) * (kBottom - kTop); }
};

Scale MakeScale(const CurveReport& report) {
  double least = INFINITY, most = -INFINITY;
  for (const LossCurve& curve : report.curves) {
    for (const CurvePoint& point : curve.points) {
      if (!std::isfinite(point.loss)) continue;
      least = std::min(least, point.loss);
      most = std::max(most, point.loss);
    }
  }
  if (!(least <= most)) least = most = 0;
  const double rough = std::max(most - least, 1e-6 * std::max(1.0, std::abs(most))) / 5;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  Scale scale;
  scale.step = power * (rough <= power ? 1 : rough <= 2 * power ? 2 : rough <= 5 * power ? 5 : 10);
  scale.low = std::floor(least / scale.step) * scale.step;
  scale.high = std::max(std::ceil(most / scale.step) * scale.step, scale.low + scale.step);
  return scale;
}

double X(double lambda) { return kLeft + lambda * (kRight - kLeft); }

void AppendText(std::string& svg, double x, double y, absl::string_view anchor,
                absl::string_view text) {
  absl::StrAppendFormat(&svg, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y,
                        anchor, Escaped(text));
}

void AppendAxes(std::string& svg, const Scale& scale) {
  absl::StrAppend(&svg, "<g stroke=\"#8884\">\n");
  const int steps = static_cast<int>(std::lround((scale.high - scale.low) / scale.step));
  for (int i = 0; i <= steps; ++i) {
    const double y = scale.Y(scale.low + i * scale.step);
    absl::StrAppendFormat(&svg, "<path d=\"M%.1f %.1fH%.1f\"/>\n", kLeft, y, kRight);
  }
  for (int i = 0; i <= 4; ++i) {
    absl::StrAppendFormat(&svg, "<path d=\"M%.1f %.1fV%.1f\"/>\n", X(i / 4.0), kTop, kBottom);
  }
  absl::StrAppend(&svg, "</g>\n");
  const int decimals = std::max(0, static_cast<int>(-std::floor(std::log10(scale.step))));
  for (int i = 0; i <= steps; ++i) {
    const double loss = scale.low + i * scale.step;
    AppendText(svg, kLeft - 8, scale.Y(loss) + 4, "end", absl::StrFormat("%.*f", decimals, loss));
  }
  for (int i = 0; i <= 4; ++i)
    AppendText(svg, X(i / 4.0), kBottom + 18, "middle", absl::StrCat(i / 4.0));
}

// Points that are no number break the line.
void AppendCurve(std::string& svg, const LossCurve& curve, const Scale& scale,
                 absl::string_view colour) {
  std::string path;
  bool drawing = false;
  for (const CurvePoint& point : curve.points) {
    if (!std::isfinite(point.loss)) {
      drawing = false;
      continue;
    }
    absl::StrAppendFormat(&path, "%s%.1f %.1f", drawing ? "L" : "M", X(point.lambda),
                          scale.Y(point.loss));
    drawing = true;
  }
  absl::StrAppend(&svg, "<path fill=\"none\" stroke-width=\"2\" stroke=\"", colour, "\" d=\"", path,
                  "\"/>\n<g fill=\"", colour, "\">\n");
  for (const CurvePoint& point : curve.points) {
    if (!std::isfinite(point.loss)) continue;
    absl::StrAppendFormat(&svg,
                          "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.5\"><title>%s</title></circle>\n",
                          X(point.lambda), scale.Y(point.loss),
                          Escaped(absl::StrFormat("%s: lambda %g, loss %.4f", curve.label,
                                                  point.lambda, point.loss)));
  }
  absl::StrAppend(&svg, "</g>\n");
}

absl::string_view ColourOf(size_t curve) { return kColours[curve % std::size(kColours)]; }

std::string TitleOf(const CurveReport& report) {
  return absl::StrCat("Loss between ", report.b, " and ", report.a);
}

void AppendTables(std::string& html, const CurveReport& report) {
  absl::StrAppend(&html,
                  "<table>\n<tr><th>curve<th>barrier<th>at &lambda;<th>above the line<th>loss at "
                  "&frac12;<th>B<th>A\n");
  for (const LossCurve& curve : report.curves) {
    const Barrier barrier = BarrierOf(curve);
    absl::StrAppendFormat(&html, "<tr><td>%s<td>%.3f<td>%g<td>%.3f<td>%.4f<td>%.4f<td>%.4f\n",
                          Escaped(curve.label), barrier.above_mean, barrier.at, barrier.above_line,
                          barrier.middle, curve.points.front().loss, curve.points.back().loss);
  }
  absl::StrAppend(&html, "</table>\n<table>\n<tr><th>curve<th>&lambda;<th>loss<th>accuracy\n");
  for (const LossCurve& curve : report.curves) {
    for (const CurvePoint& point : curve.points) {
      absl::StrAppendFormat(&html, "<tr><td>%s<td>%.4g<td>%.4f<td>%.4f\n", Escaped(curve.label),
                            point.lambda, point.loss, point.accuracy);
    }
  }
  absl::StrAppend(&html, "</table>\n");
}

}  // namespace

std::string CurveSvg(const CurveReport& report) {
  const Scale scale = MakeScale(report);
  const double height = kHeight + kLegendLine * static_cast<double>(report.curves.size());
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" font-family=\"sans-serif\" "
      "font-size=\"13\" fill=\"currentColor\" role=\"img\">\n<title>%s</title>\n",
      kWidth, height, Escaped(TitleOf(report)));
  AppendAxes(svg, scale);
  AppendText(svg, kLeft, kTop - 10, "start", "loss (nats)");
  AppendText(svg, kLeft, kBottom + 38, "start", absl::StrCat("B: ", report.b));
  AppendText(svg, (kLeft + kRight) / 2, kBottom + 18 + kLegendLine, "middle", "lambda");
  AppendText(svg, kRight, kBottom + 38, "end", absl::StrCat("A: ", report.a));
  for (size_t i = 0; i < report.curves.size(); ++i) {
    const LossCurve& curve = report.curves[i];
    AppendCurve(svg, curve, scale, ColourOf(i));
    const double y = kHeight + kLegendLine * static_cast<double>(i);
    absl::StrAppendFormat(&svg, "<path stroke-width=\"3\" stroke=\"%s\" d=\"M%.1f %.1fh24\"/>\n",
                          ColourOf(i), kLeft, y);
    AppendText(svg, kLeft + 32, y + 4, "start",
               absl::StrFormat("%s: barrier %.3f", curve.label, BarrierOf(curve).above_mean));
  }
  absl::StrAppend(&svg, "</svg>\n");
  return svg;
}

std::string CurveHtml(absl::string_view data, absl::Span<const CurveReport> reports) {
  std::string html = absl::StrCat(
      "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>Loss between models</title>\n<style>\n"
      ":root { color-scheme: light dark; font-family: sans-serif; }\n"
      "body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }\n"
      "table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }\n"
      "th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }\n"
      "th:first-child, td:first-child { text-align: left; }\n</style>\n"
      "<h1>Loss between models</h1>\n<p>Of &lambda;A + (1 &minus; &lambda;)B on ",
      Escaped(data), ".</p>\n");
  for (const CurveReport& report : reports) {
    absl::StrAppend(&html, "<h2>", Escaped(TitleOf(report)), "</h2>\n", CurveSvg(report));
    AppendTables(html, report);
  }
  absl::StrAppend(&html, "</html>\n");
  return html;
}

}  // namespace pewter
