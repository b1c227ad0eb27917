#include "client/job_report.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status.h"
#include "base/units.h"
#include "client/exit_code.h"
#include "client/interrupt.h"
#include "client/progress.h"
#include "google/protobuf/util/json_util.h"

namespace pewter::client {

namespace {

absl::Time ToTime(const google::protobuf::Timestamp& timestamp) {
  return absl::FromUnixSeconds(timestamp.seconds()) + absl::Nanoseconds(timestamp.nanos());
}

std::string FormatTime(const google::protobuf::Timestamp& timestamp) {
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", ToTime(timestamp), absl::LocalTimeZone());
}

std::string PercentText(const v1::Job& job) {
  if (job.state() == v1::JOB_STATE_SUCCEEDED) return "100%";
  const v1::Progress& progress = job.progress();
  if (progress.total_bytes() <= 0) return "-";
  return absl::StrFormat("%d%%", 100 * progress.written_bytes() / progress.total_bytes());
}

// "RUNNING", "RUNNING (stopping)".
std::string StateText(const v1::Job& job) {
  return absl::StrCat(StateName(job.state()), job.cancel_requested() ? " (stopping)" : "");
}

std::string LabelsText(const v1::Job& job) {
  // By key: the map has no order.
  std::map<std::string, std::string> labels(job.labels().begin(), job.labels().end());
  return labels.empty() ? "-" : absl::StrJoin(labels, ",", absl::PairFormatter("="));
}

double SecondsBetween(const google::protobuf::Timestamp& from,
                      const google::protobuf::Timestamp& to) {
  return absl::ToDoubleSeconds(ToTime(to) - ToTime(from));
}

// From the start to the end, or to now.
std::string DurationText(const v1::Job& job) {
  if (!job.has_start_time()) return "-";
  return job.has_end_time()
             ? FormatSeconds(SecondsBetween(job.start_time(), job.end_time()))
             : FormatSeconds(absl::ToDoubleSeconds(absl::Now() - ToTime(job.start_time())));
}

std::string DescribeChange(const v1::JobEvent& event) {
  const v1::JobStateChange& change = event.state_change();
  std::string text =
      absl::StrCat(absl::FormatTime("%H:%M:%S", ToTime(event.time()), absl::LocalTimeZone()), "  ",
                   StateName(change.state()));
  if (change.attempt() > 1) absl::StrAppend(&text, "  attempt ", change.attempt());
  // A job that goes back to the queue says why; a final error is told as such.
  if (change.has_error() && !IsFinal(change.state())) {
    absl::StrAppend(&text, "  ", change.error().message());
  }
  return text;
}

std::string OutputText(const v1::JobOutput& output) {
  if (output.reused()) {
    return absl::StrCat(output.uri(),
                        " holds the model of this plan already; nothing was merged\n");
  }
  const double seconds = output.elapsed_seconds();
  return absl::StrCat(
      "Merged into ", output.uri(), "\n  ", FormatBytes(output.written_bytes()), " in ",
      FormatSeconds(seconds),
      seconds > 0 ? absl::StrCat(" (", FormatRate(output.written_bytes() / seconds), ")") : "",
      "\n");
}

}  // namespace

Json ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  if (!google::protobuf::util::MessageToJsonString(message, &text, options).ok()) return nullptr;
  return Json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
}

std::string FormatAge(double seconds) {
  const auto whole = static_cast<int64_t>(std::max(seconds, 0.0));
  if (whole < 120) return absl::StrCat(whole, "s");
  if (whole < 2 * 3600) return absl::StrCat(whole / 60, "m");
  if (whole < 2 * 86400) return absl::StrCat(whole / 3600, "h");
  return absl::StrCat(whole / 86400, "d");
}

std::string JobsToText(const std::vector<v1::Job>& jobs) {
  Table table({"ID", "STATE", "DONE", "AGE", "DURATION", "DESTINATION", "LABELS"});
  table.RightAlign(2);
  for (const v1::Job& job : jobs) {
    table.Add({job.id(), StateText(job), PercentText(job),
               FormatAge(absl::ToDoubleSeconds(absl::Now() - ToTime(job.create_time()))),
               DurationText(job), job.destination_uri(), LabelsText(job)});
  }
  return table.ToString();
}

std::string JobToText(const v1::Job& job) {
  Table table({"ID", job.id()});
  table.Add({"State", StateText(job)});
  table.Add({"Destination", job.destination_uri()});
  table.Add({"Labels", LabelsText(job)});
  table.Add({"Project", job.project()});
  table.Add({"Priority", absl::StrCat(job.priority())});
  for (const auto& [name, limit] : {std::pair("Queue deadline", &job.queue_deadline()),
                                    std::pair("Run deadline", &job.run_deadline()),
                                    std::pair("Total deadline", &job.total_deadline())}) {
    if (limit->seconds() == 0 && limit->nanos() == 0) continue;
    table.Add({name, absl::FormatDuration(absl::Seconds(limit->seconds()) +
                                          absl::Nanoseconds(limit->nanos()))});
  }
  if (!job.retry_of().empty()) table.Add({"Retry of", job.retry_of()});
  if (!job.request_id().empty()) table.Add({"Request", job.request_id()});
  table.Add({"Attempt", absl::StrCat(job.attempt())});
  table.Add({"Created", FormatTime(job.create_time())});
  if (job.has_start_time()) table.Add({"Started", FormatTime(job.start_time())});
  if (job.has_end_time()) table.Add({"Ended", FormatTime(job.end_time())});
  table.Add({"Duration", DurationText(job)});
  if (job.has_progress() && job.progress().total_bytes() > 0) {
    table.Add({"Progress", RenderLine(ToProgress(job.progress(), job.state()))});
  }
  if (job.has_output()) {
    if (job.output().uri() != job.destination_uri()) table.Add({"Output", job.output().uri()});
    table.Add({"Fingerprint", job.output().fingerprint()});
  }
  std::string text = table.ToString();
  if (job.has_error()) absl::StrAppend(&text, "\nError\n  ", job.error().message(), "\n");
  if (job.warnings_size() > 0) {
    absl::StrAppend(&text, "\nWarnings\n  ", absl::StrJoin(job.warnings(), "\n  "), "\n");
  }
  absl::StrAppend(&text, "\nRecipe\n");
  for (absl::string_view line : absl::StrSplit(job.recipe(), '\n', absl::SkipEmpty())) {
    absl::StrAppend(&text, "  ", line, "\n");
  }
  return text;
}

absl::StatusOr<int> FollowJob(Remote& remote, const std::string& id, Output& out) {
  ProgressDisplay progress(ChooseProgressStyle(out, stderr), /*print_warnings=*/!out.json(),
                           stderr);
  v1::JobState state = v1::JOB_STATE_QUEUED;
  const auto on_event = [&](const v1::JobEvent& event) {
    if (event.has_state_change()) state = event.state_change().state();
    if (out.json()) {
      out.Text(ToJson(event).dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
      out.Flush();
    } else if (event.has_state_change() && !out.quiet()) {
      // One screen for both streams when they are a terminal: the bar must not be in the way.
      progress.Pause([&] {
        out.Text(DescribeChange(event) + "\n");
        out.Flush();
      });
    }
    if (event.has_progress()) progress.OnProgress(ToProgress(event.progress(), state));
    if (!event.warning().empty()) progress.OnWarning(event.warning());
  };
  const auto on_lost = [&](const absl::Status& status) {
    if (!out.json()) {
      progress.Say(absl::StrCat("note: lost the server, trying again (", status.message(), ")"));
    }
  };
  absl::StatusOr<v1::JobStateChange> change;
  {
    Interrupt interrupt([] {});
    change = remote.Watch(id, on_event, on_lost, interrupt.token());
  }
  progress.Finish();
  if (!change.ok()) {
    if (absl::IsCancelled(change.status()) || absl::IsUnavailable(change.status())) {
      return absl::Status(
          change.status().code(),
          absl::StrCat(change.status().message(), "; job ", id, " goes on: pewter jobs watch ", id,
                       " --server ", remote.address(), " follows it"));
    }
    return change.status();
  }
  if (change->state() == v1::JOB_STATE_SUCCEEDED) {
    if (!out.json()) {
      out.Text(out.quiet() ? absl::StrCat(change->output().uri(), "\n")
                           : OutputText(change->output()));
    }
    return kExitDone;
  }
  const absl::Status outcome = OutcomeOf(*change);
  const bool cancelled = change->state() == v1::JOB_STATE_CANCELLED;
  const int code = cancelled ? kExitFailed : ExitCodeOf(outcome);
  out.Error(Annotate(outcome, absl::StrCat("job ", id, cancelled ? " was cancelled" : " failed")),
            code);
  return code;
}

}  // namespace pewter::client
