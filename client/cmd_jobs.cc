// pewter jobs: the jobs of a server.
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/job_report.h"
#include "client/recipe_arguments.h"
#include "client/remote.h"

namespace pewter::client {

namespace {

constexpr int kLargestPage = 1000;

struct ListArguments {
  ServerArguments server;
  std::vector<std::string> labels;
  std::vector<std::string> states;
  std::string project;
  int limit = 100;
};

absl::StatusOr<int> RunList(const ListArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(Remote remote, Remote::Open(arguments.server));
  v1::ListJobsRequest request;
  ASSIGN_OR_RETURN(const auto labels, SplitAssignments("--label", arguments.labels));
  for (const auto& [key, value] : labels) {
    (*request.mutable_filter()->mutable_labels())[key] = value;
  }
  for (const std::string& text : arguments.states) {
    ASSIGN_OR_RETURN(const v1::JobState state, ParseState(text));
    request.mutable_filter()->add_states(state);
  }
  request.mutable_filter()->set_project(arguments.project);
  std::vector<v1::Job> jobs;
  bool more = true;
  while (more && static_cast<int>(jobs.size()) < arguments.limit) {
    request.set_page_size(std::min(kLargestPage, arguments.limit - static_cast<int>(jobs.size())));
    ASSIGN_OR_RETURN(v1::ListJobsResponse page, remote.ListJobs(request));
    for (v1::Job& job : *page.mutable_jobs()) jobs.push_back(std::move(job));
    request.set_page_token(page.next_page_token());
    more = !page.next_page_token().empty();
  }
  if (out.json()) {
    Json list = Json::array();
    for (const v1::Job& job : jobs) list.push_back(ToJson(job));
    out.Print({{"jobs", std::move(list)}, {"more", more}});
    return kExitDone;
  }
  if (out.quiet()) {
    for (const v1::Job& job : jobs) out.Text(absl::StrCat(job.id(), "\n"));
    return kExitDone;
  }
  if (jobs.empty()) {
    out.Note("no jobs");
    return kExitDone;
  }
  out.Text(JobsToText(jobs));
  if (more) out.Note(absl::StrCat("there are more: --limit shows more than ", arguments.limit));
  return kExitDone;
}

struct JobArguments {
  ServerArguments server;
  std::vector<std::string> ids;
};

using JobAction = std::function<absl::StatusOr<int>(Remote&, const std::string& id, Output&)>;

// Acts on each job; errors of one do not keep the others from it. The first bad exit code counts.
absl::StatusOr<int> ForEachJob(const JobArguments& arguments, const JobAction& act, Output& out) {
  ASSIGN_OR_RETURN(Remote remote, Remote::Open(arguments.server));
  int result = kExitDone;
  for (const std::string& id : arguments.ids) {
    const absl::StatusOr<int> code = act(remote, id, out);
    if (!code.ok()) out.Error(code.status(), ExitCodeOf(code.status()));
    if (result == kExitDone) result = code.ok() ? *code : ExitCodeOf(code.status());
    if (result == kExitInterrupted) break;
  }
  return result;
}

absl::StatusOr<int> Get(Remote& remote, const std::string& id, Output& out) {
  ASSIGN_OR_RETURN(const v1::Job job, remote.GetJob(id));
  if (out.json()) {
    out.Print(ToJson(job));
  } else {
    out.Text(out.quiet() ? absl::StrCat(StateName(job.state()), "\n") : JobToText(job));
  }
  return kExitDone;
}

absl::StatusOr<int> Watch(Remote& remote, const std::string& id, Output& out) {
  return FollowJob(remote, id, out);
}

absl::StatusOr<int> Cancel(Remote& remote, const std::string& id, Output& out) {
  ASSIGN_OR_RETURN(const v1::Job job, remote.CancelJob(id));
  if (out.json()) {
    out.Print(ToJson(job));
  } else {
    out.Text(out.quiet() ? absl::StrCat(id, "\n")
             : IsFinal(job.state())
                 ? absl::StrCat("Job ", id, " is ", StateName(job.state()), "\n")
                 : absl::StrCat("Job ", id, " is ", StateName(job.state()), ", stopping\n"));
  }
  return kExitDone;
}

absl::StatusOr<int> Retry(Remote& remote, const std::string& id, Output& out) {
  v1::RetryJobRequest request;
  request.set_job_id(id);
  request.set_request_id(RandomRequestId());
  ASSIGN_OR_RETURN(const v1::Job job, remote.RetryJob(request));
  if (out.json()) {
    out.Print(ToJson(job));
  } else {
    out.Text(out.quiet() ? absl::StrCat(job.id(), "\n")
                         : absl::StrCat("Job ", job.id(), " is ", StateName(job.state()),
                                        " and does what job ", id, " did\n"));
  }
  return kExitDone;
}

struct DeleteArguments {
  JobArguments jobs;
  bool force = false;
  bool outputs = false;
};

absl::StatusOr<int> Delete(const DeleteArguments& arguments, Remote& remote, const std::string& id,
                           Output& out) {
  v1::DeleteJobRequest request;
  request.set_job_id(id);
  request.set_force(arguments.force);
  request.set_delete_outputs(arguments.outputs);
  RETURN_IF_ERROR(remote.DeleteJob(request));
  if (out.json()) {
    out.Print({{"id", id}, {"deleted", true}});
  } else {
    out.Text(out.quiet() ? absl::StrCat(id, "\n") : absl::StrCat("Job ", id, " is deleted\n"));
  }
  return kExitDone;
}

CommandBody DeclareList(CLI::App& app) {
  auto arguments = std::make_shared<ListArguments>();
  arguments->server.Declare(app);
  app.add_option("-l,--label", arguments->labels, "Only jobs with this label; all of several")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  app.add_option("--state", arguments->states, "Only jobs in this state; any of several")
      ->type_name("queued|planning|running|publishing|succeeded|failed|cancelled")
      ->allow_extra_args(false);
  app.add_option("--project", arguments->project, "Only jobs of this project")
      ->type_name("NAME")
      ->envname("PEWTER_PROJECT");
  app.add_option("--limit", arguments->limit, "Most jobs to list, newest first")
      ->type_name("N")
      ->check(InRange(1, 1'000'000))
      ->capture_default_str();
  app.footer(
      "Example:\n"
      "  pewter jobs list --state running -l team=nlp");
  return [arguments](Output& out) { return RunList(*arguments, out); };
}

void Declare(CLI::App& app, JobArguments& arguments) {
  app.add_option("job", arguments.ids, "Job, or several")->required()->type_name(kJobType);
  arguments.server.Declare(app);
}

CommandBody DeclareOnJobs(CLI::App& app, JobAction act) {
  auto arguments = std::make_shared<JobArguments>();
  Declare(app, *arguments);
  return
      [arguments, act = std::move(act)](Output& out) { return ForEachJob(*arguments, act, out); };
}

CommandBody DeclareDelete(CLI::App& app) {
  auto arguments = std::make_shared<DeleteArguments>();
  Declare(app, arguments->jobs);
  app.add_flag("--force", arguments->force, "Cancel a job that has not ended");
  app.add_flag("--outputs", arguments->outputs,
               "Remove its model, too: the files that the manifest names and no others");
  return [arguments](Output& out) {
    return ForEachJob(
        arguments->jobs,
        [&](Remote& remote, const std::string& id, Output& out) {
          return Delete(*arguments, remote, id, out);
        },
        out);
  };
}

}  // namespace

CommandBody DeclareJobs(CLI::App& app) {
  const auto on_jobs = [](JobAction act) {
    return [act](CLI::App& app) { return DeclareOnJobs(app, act); };
  };
  return DeclareGroup(
      app, {{"list", "List jobs, newest first", &DeclareList},
            {"get", "Show a job in full", on_jobs(&Get)},
            {"watch", "Follow a job until it ends; exit code as of pewter merge", on_jobs(&Watch)},
            {"cancel", "Stop a job; what is finished stays at its destination", on_jobs(&Cancel)},
            {"retry", "Do once more what a job that has ended did; finished files are kept",
             on_jobs(&Retry)},
            {"delete", "Forget a job that has ended; its model stays, but for --outputs",
             &DeclareDelete}});
}

}  // namespace pewter::client
