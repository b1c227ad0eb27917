// ProgressDisplay: shows how a merge goes on, be it a local one or a job of a server, or how bytes
// are sent.
//
// On a terminal one bar that is redrawn; otherwise a line every few seconds, none for a merge that
// takes less. Drawing happens in a thread of its own, so observers never wait for the terminal:
// snapshots replace each other.
#pragma once

#include <cstdio>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/string_view.h"
#include "client/output.h"
#include "merge/engine/observer.h"

namespace pewter::client {

enum class ProgressStyle { kNone, kLines, kBar };

// kBar when `stream` is a terminal that can redraw; without one kLines, or kNone for JSON output.
ProgressStyle ChooseProgressStyle(const Output& out, FILE* stream);

// Thread-safe.
class ProgressDisplay final : public Observer {
 public:
  // `title` is what is going on where the phase does not say it: "uploading".
  ProgressDisplay(ProgressStyle style, bool print_warnings, FILE* stream,
                  absl::string_view title = "");
  ~ProgressDisplay() override;

  void OnProgress(const Progress& progress) override;
  void OnWarning(absl::string_view message) override;
  // A line that stays, above the bar.
  void Say(absl::string_view line);
  // Calls `print` while no bar is in its way.
  void Pause(const std::function<void()>& print);
  // Takes the bar away. Nothing is drawn afterwards.
  void Finish();

 private:
  void DrawUntilStopped(std::stop_token stop);
  void Draw();          // mutex_ held
  void EraseBar();      // mutex_ held
  int Columns() const;  // of the terminal

  const ProgressStyle style_;
  const bool print_warnings_;
  FILE* const stream_;
  const std::string title_;
  std::mutex mutex_;
  std::optional<Progress> latest_;
  bool drawn_ = false;   // a bar stands on the terminal
  std::jthread drawer_;  // last: it uses all of the above
};

// "merging [=====>    ]  42%  1.2 of 2.8 GiB  310 MB/s  0:12 left  120/290 tensors", cut to
// `columns`.
std::string RenderBar(const Progress& progress, int columns, absl::string_view title = "");
// The same for a log.
std::string RenderLine(const Progress& progress, absl::string_view title = "");

}  // namespace pewter::client
