// pewter store: what an object store can do, and what interrupted merges have left in it.
#include <algorithm>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "store/housekeeping.h"
#include "store/s3_check.h"

namespace pewter::client {

namespace {

struct CheckArguments {
  std::string uri;
};

absl::Status RequireS3(const std::string& uri) {
  if (absl::StartsWith(uri, "s3://")) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("\"", uri, "\" is not s3://bucket/prefix"));
}

absl::StatusOr<int> RunCheck(const CheckArguments& arguments, Output& out) {
  RETURN_IF_ERROR(RequireS3(arguments.uri));
  ASSIGN_OR_RETURN(const S3Store::Place place, S3Store::Parse(arguments.uri));
  ASSIGN_OR_RETURN(const std::shared_ptr<S3Client> client, S3Store::Client());
  ASSIGN_OR_RETURN(const std::vector<StoreFinding> findings, CheckS3Store(*client, place));
  const bool good = std::all_of(findings.begin(), findings.end(), [](const StoreFinding& finding) {
    return finding.supported || !finding.needed;
  });
  if (out.json()) {
    Json list = Json::array();
    for (const StoreFinding& finding : findings) {
      list.push_back({{"feature", finding.feature},
                      {"supported", finding.supported},
                      {"needed", finding.needed},
                      {"detail", finding.detail}});
    }
    out.Print({{"uri", arguments.uri}, {"good", good}, {"findings", std::move(list)}});
    return good ? kExitDone : kExitFailed;
  }
  Table table({"FEATURE", "", ""});
  for (const StoreFinding& finding : findings) {
    table.Add({finding.feature,
               finding.supported ? "yes"
               : finding.needed  ? "NO"
                                 : "no",
               finding.detail});
  }
  if (!out.quiet()) out.Text(table.ToString());
  out.Text(good ? absl::StrCat(arguments.uri, " has all that pewter needs\n")
                : absl::StrCat(arguments.uri, " lacks what pewter needs\n"));
  return good ? kExitDone : kExitFailed;
}

CommandBody DeclareCheck(CLI::App& app) {
  auto arguments = std::make_shared<CheckArguments>();
  app.add_option("uri", arguments->uri, "s3://BUCKET[/PREFIX]; small objects are made and removed")
      ->required()
      ->type_name("URI");
  return [arguments](Output& out) { return RunCheck(*arguments, out); };
}

struct CleanArguments {
  std::string uri;
  std::string older_than = "24h";
};

absl::StatusOr<int> RunClean(const CleanArguments& arguments, Output& out) {
  absl::Duration age;
  if (!absl::ParseDuration(arguments.older_than, &age) || age < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--older-than ", arguments.older_than, " is no time; write 24h or 30m"));
  }
  ASSIGN_OR_RETURN(const std::shared_ptr<ObjectStore> store, OpenStore(arguments.uri));
  ASSIGN_OR_RETURN(const int64_t aborted, RemoveUnfinished(*store, absl::Now() - age));
  if (out.json()) {
    out.Print({{"uri", arguments.uri}, {"aborted", aborted}});
  } else if (!out.quiet()) {
    out.Text(absl::StrCat(FormatCount(aborted, "unfinished file"), " removed\n"));
  }
  return kExitDone;
}

CommandBody DeclareClean(CLI::App& app) {
  auto arguments = std::make_shared<CleanArguments>();
  app.add_option("uri", arguments->uri, "A folder or s3://BUCKET[/PREFIX]")
      ->required()
      ->type_name("URI");
  app.add_option("--older-than", arguments->older_than, "Only what began so long ago; default: 24h")
      ->type_name("TIME");
  return [arguments](Output& out) { return RunClean(*arguments, out); };
}

}  // namespace

CommandBody DeclareStore(CLI::App& app) {
  return DeclareGroup(app, {{"check", "Try what pewter needs of an object store", &DeclareCheck},
                            {"clean", "Remove files and uploads that interrupted merges have begun",
                             &DeclareClean}});
}

}  // namespace pewter::client
