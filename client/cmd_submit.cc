// pewter submit: the same as pewter merge, done by a server.
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "base/status.h"
#include "base/units.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/job_report.h"
#include "client/recipe_arguments.h"
#include "client/recipe_paths.h"
#include "client/remote.h"
#include "client/run_arguments.h"
#include "client/transfer.h"

namespace pewter::client {

namespace {

struct Arguments {
  RecipeArguments recipe;
  PlanArguments plan;
  ServerArguments server;
  std::string output;
  std::vector<std::string> labels;
  int priority = 0;
  std::string project;
  std::string queue_deadline, run_deadline, total_deadline;
  std::string on_existing;
  std::string request_id;
  bool wait = false;
  bool overwrite = false;
  bool allow_nonfinite = false;
  std::string upload = "auto";

  // The models go to the server, which does not see the files of this machine.
  bool Uploads() const { return upload == "always" || (upload == "auto" && !server.IsLocal()); }
};

// "90s", "15m", "2h30m"; absent when the text is empty.
absl::Status SetDeadline(absl::string_view option, const std::string& text,
                         const std::function<google::protobuf::Duration*()>& deadline) {
  if (text.empty()) return absl::OkStatus();
  absl::Duration duration;
  if (!absl::ParseDuration(text, &duration) || duration <= absl::ZeroDuration() ||
      duration == absl::InfiniteDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat(option, " ", text, ": write a time as 90s, 15m or 2h30m"));
  }
  absl::Duration rest;
  google::protobuf::Duration& out = *deadline();
  out.set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &rest));
  out.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(rest)));
  return absl::OkStatus();
}

// The recipe with its local models uploaded. What is not on this machine is a path of the server.
absl::StatusOr<PortableRecipe> UploadInputs(const Arguments& arguments, Remote& remote,
                                            PortableRecipe recipe, Output& out) {
  ASSIGN_OR_RETURN(std::vector<std::string> paths, LocalPathsOf(recipe));
  if (arguments.upload == "auto") {
    std::erase_if(paths, [](const std::string& path) {
      std::error_code error;
      return !std::filesystem::exists(std::string(absl::StripPrefix(path, "file://")), error);
    });
  }
  if (paths.empty()) return recipe;
  ASSIGN_OR_RETURN(const UploadResult result, UploadModels(remote, paths, out));
  if (!out.quiet()) {
    out.Note(absl::StrCat(FormatCount(paths.size(), "model"), " uploaded: ",
                          FormatBytes(result.sent_bytes), " of ", FormatBytes(result.bytes),
                          " sent", result.sent_bytes < result.bytes ? ", the rest was there" : ""));
  }
  return ReplacePaths(recipe, result.uris);
}

absl::StatusOr<v1::CreateJobRequest> MakeRequest(const Arguments& arguments, Remote& remote,
                                                 Output& out) {
  ASSIGN_OR_RETURN(const std::string text, arguments.recipe.ReadText());
  ASSIGN_OR_RETURN(const auto overrides, SplitAssignments("--set", arguments.recipe.set));
  ASSIGN_OR_RETURN(const auto labels, SplitAssignments("--label", arguments.labels));
  ASSIGN_OR_RETURN(const PlanOptions plan, arguments.plan.ToOptions());
  arguments.plan.mergekit.Explain(out);
  std::error_code error;
  const std::string working_directory = std::filesystem::current_path(error).string();
  if (error) {
    return absl::NotFoundError(absl::StrCat("no working directory: ", error.message()));
  }
  if (arguments.Uploads() && !absl::StartsWith(arguments.output, "/") &&
      !absl::StrContains(arguments.output, "://")) {
    return absl::InvalidArgumentError(
        absl::StrCat("OUT, ", arguments.output,
                     ", is on the server: write artifact://NAME, which pewter "
                     "download brings here, or an absolute path or URI that the server can write"));
  }
  absl::StatusOr<PortableRecipe> recipe = MakePathsAbsolute(text, overrides, working_directory);
  if (!recipe.ok()) return arguments.recipe.NameFile(recipe.status());
  if (arguments.Uploads()) {
    ASSIGN_OR_RETURN(recipe, UploadInputs(arguments, remote, *std::move(recipe), out));
  }
  // Who waits is told by the server.
  if (!arguments.wait) {
    for (const std::string& warning : recipe->warnings) {
      out.Warn(arguments.recipe.NameFile(warning));
    }
  }

  v1::CreateJobRequest request;
  request.set_recipe(recipe->text);
  request.set_destination_uri(AbsoluteDestination(arguments.output, working_directory));
  request.set_request_id(arguments.request_id.empty() ? RandomRequestId() : arguments.request_id);
  for (const auto& [key, value] : labels) (*request.mutable_labels())[key] = value;
  request.set_priority(arguments.priority);
  request.set_project(arguments.project);
  RETURN_IF_ERROR(SetDeadline("--queue-deadline", arguments.queue_deadline,
                              [&] { return request.mutable_queue_deadline(); }));
  RETURN_IF_ERROR(SetDeadline("--run-deadline", arguments.run_deadline,
                              [&] { return request.mutable_run_deadline(); }));
  RETURN_IF_ERROR(SetDeadline("--total-deadline", arguments.total_deadline,
                              [&] { return request.mutable_total_deadline(); }));
  request.set_on_existing(arguments.on_existing == "fail" ? v1::ON_EXISTING_FAIL
                          : arguments.on_existing == "reuse_if_identical"
                              ? v1::ON_EXISTING_REUSE_IF_IDENTICAL
                          : arguments.on_existing == "new_version" ? v1::ON_EXISTING_NEW_VERSION
                                                                   : v1::ON_EXISTING_UNSPECIFIED);
  v1::MergeOptions& options = *request.mutable_options();
  options.set_memory_bytes(plan.memory_bytes);
  options.set_threads(plan.threads);
  options.set_device(plan.device);
  options.set_seed(plan.seed);
  options.set_allow_nonfinite(arguments.allow_nonfinite);
  options.set_overwrite(arguments.overwrite);
  options.set_shard_bytes(plan.shard_bytes);
  for (const auto& [key, value] : recipe->overrides) {
    v1::RecipeOverride& override_ = *options.add_overrides();
    override_.set_key(key);
    override_.set_value(value);
  }
  options.set_strict(plan.strict);
  options.set_allow_mixed(plan.allow_mixed);
  options.set_truncate_vocabularies(plan.truncate_vocabularies);
  options.set_raw_names(plan.raw_names == RawNames::kIntersection ? v1::RAW_NAMES_INTERSECTION
                        : plan.raw_names == RawNames::kUnion      ? v1::RAW_NAMES_UNION
                                                                  : v1::RAW_NAMES_UNSPECIFIED);
  options.set_omit_tokenizer(!plan.copy_tokenizer);
  options.set_omit_model_card(!plan.write_model_card);
  return request;
}

absl::StatusOr<int> RunSubmit(const Arguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(Remote remote, Remote::Open(arguments.server));
  ASSIGN_OR_RETURN(const v1::CreateJobRequest request, MakeRequest(arguments, remote, out));
  const absl::StatusOr<v1::Job> created = remote.CreateJob(request);
  if (!created.ok()) return arguments.recipe.NameFile(created.status());
  const v1::Job& job = *created;
  if (!arguments.wait) {
    if (out.json()) {
      out.Print(ToJson(job));
    } else if (out.quiet()) {
      out.Text(absl::StrCat(job.id(), "\n"));
    } else {
      out.Text(absl::StrCat("Job ", job.id(), " is ", StateName(job.state()),
                            "\n\nNext:\n  pewter jobs watch ", job.id(), " --server ",
                            remote.address(), "\n"));
    }
    return kExitDone;
  }
  if (!out.json() && !out.quiet()) {
    out.Text(absl::StrCat("Job ", job.id(), "\n"));
    out.Flush();
  }
  return FollowJob(remote, job.id(), out);
}

}  // namespace

CommandBody DeclareSubmit(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  arguments->recipe.Declare(app);
  app.add_option("out", arguments->output, "Where the server writes the model: a path or a URI")
      ->required()
      ->type_name(kPathType);
  arguments->server.Declare(app);
  app.add_flag("-w,--wait", arguments->wait, "Follow the job until it ends");
  app.add_option("-l,--label", arguments->labels, "Mark the job; may be given several times")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  app.add_option("--priority", arguments->priority, "Jobs of higher priority start first")
      ->type_name("N")
      ->check(InRange(-1000, 1000))
      ->capture_default_str();
  app.add_option("--project", arguments->project, "Project of the job; default: default")
      ->type_name("NAME")
      ->envname("PEWTER_PROJECT");
  app.add_option("--queue-deadline", arguments->queue_deadline,
                 "The job fails when no worker has taken it by then, as 90s or 2h30m")
      ->type_name("TIME");
  app.add_option("--run-deadline", arguments->run_deadline,
                 "The job fails when an attempt takes longer")
      ->type_name("TIME");
  app.add_option("--total-deadline", arguments->total_deadline,
                 "The job fails when it is not done so long after it was submitted")
      ->type_name("TIME");
  app.add_option("--request-id", arguments->request_id,
                 "Submitting again with the same id gives the same job; default: random")
      ->type_name("ID");
  CLI::Option* const overwrite =
      app.add_flag("--overwrite", arguments->overwrite, "Replace what is at OUT");
  DeclareOnExisting(app, arguments->on_existing)->excludes(overwrite);
  app.add_flag("--allow-nonfinite", arguments->allow_nonfinite,
               "Go on when an input holds NaN or infinity");
  app.add_option("--upload", arguments->upload,
                 "Send local models to the server first; auto: when it is another machine, those "
                 "that are here")
      ->type_name("auto|always|never")
      ->check(CLI::IsMember({"auto", "always", "never"}))
      ->capture_default_str();
  arguments->plan.Declare(app);
  arguments->plan.DeclareRawNames(app);
  app.footer(
      "A server on this machine sees the same files; relative paths, in the recipe too, are made\n"
      "absolute. For another machine the models of the recipe are uploaded first, without what it\n"
      "has already; --upload never when it sees the same files, too. Interrupted jobs continue\n"
      "where they were by themselves.\n"
      "\nExamples:\n"
      "  pewter submit recipe.yaml artifact://merged --server merge.example.org:7480 --wait\n"
      "  pewter download artifact://merged --server merge.example.org:7480\n"
      "  pewter submit recipe.yaml ./merged --server localhost:7480 --wait\n"
      "  pewter jobs watch $(pewter submit recipe.yaml ./merged -q)    with PEWTER_SERVER set");
  return [arguments](Output& out) { return RunSubmit(*arguments, out); };
}

}  // namespace pewter::client
