#include "client/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/units.h"

namespace pewter::client {

namespace {

constexpr auto kRedraw = std::chrono::milliseconds(100);
constexpr auto kLineEvery = std::chrono::seconds(5);
constexpr int kBarColumns = 24;

double Fraction(const Progress& progress) {
  if (progress.phase == Phase::kDone) return 1;
  if (progress.bytes_total <= 0) return 0;
  return std::clamp(static_cast<double>(progress.bytes_written) / progress.bytes_total, 0.0, 1.0);
}

// What a bar and a line have in common, most important first.
std::vector<std::string> Details(const Progress& progress) {
  std::vector<std::string> parts;
  if (progress.stages > 0) {
    parts.push_back(absl::StrCat("stage ", progress.stage, " of ", progress.stages));
    if (!progress.stage_name.empty())
      absl::StrAppend(&parts.back(), " (", progress.stage_name, ")");
  }
  if (progress.bytes_total > 0) {
    parts.push_back(absl::StrFormat("%3.0f%%", 100 * Fraction(progress)));
  }
  if (progress.bytes_per_second > 0) parts.push_back(FormatRate(progress.bytes_per_second));
  if (progress.seconds_left >= 0 && progress.phase == Phase::kMerging) {
    parts.push_back(absl::StrCat(FormatSeconds(progress.seconds_left), " left"));
  }
  if (progress.tensors_total > 0) {
    parts.push_back(absl::StrCat(progress.tensors_done, "/", progress.tensors_total, " tensors"));
  }
  if (progress.bytes_total > 0) {
    parts.push_back(absl::StrCat(FormatBytes(progress.bytes_written), " of ",
                                 FormatBytes(progress.bytes_total)));
  }
  return parts;
}

absl::string_view TitleOf(const Progress& progress, absl::string_view title) {
  return title.empty() ? PhaseName(progress.phase) : title;
}

}  // namespace

ProgressStyle ChooseProgressStyle(const Output& out, FILE* stream) {
  if (out.quiet()) return ProgressStyle::kNone;
  const char* terminal = std::getenv("TERM");
  if (isatty(fileno(stream)) && terminal != nullptr && absl::string_view(terminal) != "dumb") {
    return ProgressStyle::kBar;
  }
  return out.json() ? ProgressStyle::kNone : ProgressStyle::kLines;
}

ProgressDisplay::ProgressDisplay(ProgressStyle style, bool print_warnings, FILE* stream,
                                 absl::string_view title)
    : style_(style), print_warnings_(print_warnings), stream_(stream), title_(title) {
  if (style_ != ProgressStyle::kNone) {
    drawer_ = std::jthread([this](std::stop_token stop) { DrawUntilStopped(stop); });
  }
}

ProgressDisplay::~ProgressDisplay() { Finish(); }

void ProgressDisplay::OnProgress(const Progress& progress) {
  std::lock_guard lock(mutex_);
  latest_ = progress;
}

void ProgressDisplay::OnWarning(absl::string_view message) {
  if (print_warnings_) Say(absl::StrCat("warning: ", message));
}

void ProgressDisplay::Say(absl::string_view line) {
  Pause([&] {
    absl::FPrintF(stream_, "%s\n", line);
    std::fflush(stream_);
  });
}

void ProgressDisplay::Pause(const std::function<void()>& print) {
  std::lock_guard lock(mutex_);
  EraseBar();
  print();
}

void ProgressDisplay::Finish() {
  if (drawer_.joinable()) {
    drawer_.request_stop();
    drawer_.join();
  }
  std::lock_guard lock(mutex_);
  EraseBar();
  latest_.reset();
}

void ProgressDisplay::DrawUntilStopped(std::stop_token stop) {
  std::condition_variable_any wake;
  std::unique_lock lock(mutex_);
  while (!stop.stop_requested()) {
    wake.wait_for(lock, stop, style_ == ProgressStyle::kBar ? kRedraw : kLineEvery,
                  [] { return false; });
    if (!stop.stop_requested()) Draw();
  }
}

void ProgressDisplay::Draw() {
  if (!latest_.has_value()) return;
  if (style_ == ProgressStyle::kBar) {
    absl::FPrintF(stream_, "\r%s\x1b[K", RenderBar(*latest_, Columns(), title_));
    drawn_ = true;
  } else {
    absl::FPrintF(stream_, "%s\n", RenderLine(*latest_, title_));
  }
  std::fflush(stream_);
}

void ProgressDisplay::EraseBar() {
  if (!drawn_) return;
  absl::FPrintF(stream_, "\r\x1b[K");
  std::fflush(stream_);
  drawn_ = false;
}

int ProgressDisplay::Columns() const {
  winsize size{};
  return ioctl(fileno(stream_), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string RenderBar(const Progress& progress, int columns, absl::string_view title) {
  const int filled = static_cast<int>(Fraction(progress) * kBarColumns);
  std::string bar = absl::StrCat(TitleOf(progress, title), " [", std::string(filled, '='),
                                 filled < kBarColumns ? ">" : "",
                                 std::string(std::max(0, kBarColumns - filled - 1), ' '), "]");
  // One column stays free: a cursor behind the last one makes some terminals scroll.
  const int limit = columns - 1;
  for (const std::string& part : Details(progress)) {
    if (DisplayWidth(bar) + 2 + DisplayWidth(part) > limit) break;
    absl::StrAppend(&bar, "  ", part);
  }
  if (DisplayWidth(bar) > limit) bar.resize(std::max(0, limit));
  return bar;
}

std::string RenderLine(const Progress& progress, absl::string_view title) {
  std::vector<std::string> parts = Details(progress);
  if (!parts.empty()) parts.front().erase(0, parts.front().find_first_not_of(' '));
  return absl::StrCat(TitleOf(progress, title), ": ", absl::StrJoin(parts, ", "));
}

}  // namespace pewter::client
