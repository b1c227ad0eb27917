// pewterd: the server and its workers.
#include <CLI/CLI.hpp>
#include <iostream>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "base/units.h"
#include "server/health.h"
#include "server/log.h"
#include "server/serve.h"
#include "server/work.h"

namespace {

// As in pewter: 1 failed, 2 bad usage.
int Fail(const absl::Status& status) {
  std::cerr << "pewterd: " << status.message() << std::endl;
  return absl::IsInvalidArgument(status) ? 2 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Pewter's server: merges neural networks as jobs.", "pewterd");
  app.set_version_flag("--version", "pewterd " PEWTER_VERSION);
  app.require_subcommand(1);

  pewter::server::ServeOptions serve{.data = pewter::server::DefaultDataFolder()};
  std::string executor = "local";
  std::string log_level = "info";
  CLI::App* const serve_command = app.add_subcommand("serve", "Serve merges over gRPC.");
  serve_command->add_option("--listen", serve.listen, "HOST:PORT; port 0 takes one that is free")
      ->capture_default_str();
  serve_command->add_option("--data", serve.data, "Folder of the server's state")
      ->capture_default_str();
  serve_command->add_option("--database", serve.database,
                            "Where jobs are kept: sqlite:PATH, or postgresql://USER@HOST/DATABASE, "
                            "which several servers may share [$PEWTER_DATABASE or "
                            "sqlite:DATA/jobs.db]");
  serve_command->add_option("--artifacts", serve.artifacts,
                            "Where models of clients are kept: a folder or s3://BUCKET/PREFIX "
                            "[$PEWTER_ARTIFACTS, or DATA/artifacts]");
  serve_command
      ->add_option(
          "--allow-read", serve.allow_read,
          "Jobs read only what is there: s3://BUCKET[/PREFIX], hf://ORG[/MODEL], a folder, "
          "or s3:// or hf:// for all of a kind; may be given several times; default: all")
      ->allow_extra_args(false);
  serve_command->add_option("--allow-write", serve.allow_write, "The same for what jobs write")
      ->allow_extra_args(false);
  serve_command
      ->add_option("--project", serve.projects,
                   "Limits and share of a project, as nlp:running=4,queued=100,weight=2, or "
                   "*:queued=100 for each without a rule; may be given several times")
      ->allow_extra_args(false);
  std::string artifact_quota;
  serve_command->add_option("--artifact-quota", artifact_quota,
                            "Most that clients upload in all, as 500GB; default: no limit");
  std::string min_free_disk = "1GiB", retention = "24h";
  serve_command
      ->add_option("--min-free-disk", min_free_disk,
                   "While less is free on the disks of --data and --artifacts, uploads are refused "
                   "and no jobs are taken")
      ->capture_default_str();
  serve_command
      ->add_option("--retention", retention,
                   "After which time what nobody goes on with is removed: uploads, files without "
                   "an artifact, what killed workers have left")
      ->capture_default_str();
  serve_command->add_option("--executor", executor, "Where jobs run: local, as child processes")
      ->check(CLI::IsMember({"local"}))
      ->capture_default_str();
  serve_command->add_option("--workers", serve.workers, "Jobs that run at the same time")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  serve_command
      ->add_option("--lease", serve.lease_seconds,
                   "Seconds after which the job of a server that is silent goes to another")
      ->check(CLI::Range(2, 600))
      ->capture_default_str();
  serve_command
      ->add_option("--max-watches", serve.max_watches, "Jobs that clients watch at the same time")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  serve_command
      ->add_option("--worker-program", serve.worker_program,
                   "Started for each job in place of pewterd, with the same arguments: a program "
                   "that sets limits and then becomes `pewterd \"$@\"`")
      ->check(CLI::ExistingFile);
  serve_command->add_flag("--insecure", serve.insecure,
                          "Let other machines connect, without TLS and authentication");
  serve_command
      ->add_option("--log-level", log_level,
                   "debug, info, warning, error or off; on stderr as JSON")
      ->capture_default_str();

  pewter::server::WorkOptions work;
  CLI::App* const work_command =
      app.add_subcommand("work", "Run one job for a server. Started by it, not by hand.");
  work_command->add_option("--job", work.job_id)->required();
  work_command->add_option("--server", work.server, "HOST:PORT")->required();
  work_command->add_option("--parent", work.parent_pid, "Process to die with");

  std::string health_server = serve.listen, health_service;
  CLI::App* const health_command =
      app.add_subcommand("health", "Ask a server whether it serves; exit code 0: it does.");
  health_command->add_option("--server", health_server, "HOST:PORT")->capture_default_str();
  health_command->add_option("--service", health_service, "jobs: whether it takes jobs");

  CLI::App* const failpoints_command =
      app.add_subcommand("failpoints", "List where tests may kill a process.")->group("");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (failpoints_command->parsed()) {
    for (const pewter::FailpointInfo& point : pewter::Failpoints()) {
      std::cout << point.name << "\t" << point.where << "\n";
    }
    return 0;
  }
  if (health_command->parsed()) {
    const absl::Status status = pewter::server::CheckHealth(health_server, health_service);
    if (status.ok()) std::cout << "serving\n";
    return status.ok() ? 0 : Fail(status);
  }
  if (const absl::Status status = pewter::CheckFailpoints(); !status.ok()) return Fail(status);
  if (work_command->parsed()) return pewter::server::Work(work);
  if (const absl::Status status = pewter::server::SetLogLevel(log_level); !status.ok()) {
    return Fail(status);
  }
  if (!artifact_quota.empty()) {
    const absl::StatusOr<int64_t> bytes = pewter::ParseBytes(artifact_quota);
    if (!bytes.ok()) return Fail(pewter::Annotate(bytes.status(), "--artifact-quota"));
    serve.artifact_quota = *bytes;
  }
  const absl::StatusOr<int64_t> min_free = pewter::ParseBytes(min_free_disk);
  if (!min_free.ok()) return Fail(pewter::Annotate(min_free.status(), "--min-free-disk"));
  serve.min_free_disk = *min_free;
  if (!absl::ParseDuration(retention, &serve.retention) ||
      serve.retention <= absl::ZeroDuration()) {
    return Fail(absl::InvalidArgumentError(
        absl::StrCat("--retention ", retention, " is no time; write 24h or 30m")));
  }
  const absl::Status status = pewter::server::Serve(serve);
  return status.ok() ? 0 : Fail(status);
}
