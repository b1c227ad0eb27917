// pewter upload, download and artifacts: the models that a server keeps.
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/units.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/recipe_arguments.h"
#include "client/recipe_paths.h"
#include "client/remote.h"
#include "client/transfer.h"
#include "store/artifact_store.h"

namespace pewter::client {

namespace {

constexpr int kLargestPage = 1000;

struct UploadArguments {
  ServerArguments server;
  std::vector<std::string> models;
};

absl::StatusOr<int> RunUpload(const UploadArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(Remote remote, Remote::Open(arguments.server));
  ASSIGN_OR_RETURN(const UploadResult result, UploadModels(remote, arguments.models, out));
  if (out.json()) {
    Json artifacts = Json::array();
    for (const std::string& model : arguments.models) {
      artifacts.push_back({{"path", model}, {"uri", result.uris.at(model)}});
    }
    out.Print({{"artifacts", std::move(artifacts)},
               {"bytes", result.bytes},
               {"sent_bytes", result.sent_bytes}});
    return kExitDone;
  }
  for (const std::string& model : arguments.models) {
    const std::string& uri = result.uris.at(model);
    out.Text(out.quiet() ? absl::StrCat(uri, "\n") : absl::StrCat(model, "\n  ", uri, "\n"));
  }
  if (!out.quiet()) {
    out.Text(absl::StrCat(FormatBytes(result.sent_bytes), " of ", FormatBytes(result.bytes),
                          " sent", result.sent_bytes < result.bytes ? ", the rest was there" : "",
                          "\n"));
  }
  return kExitDone;
}

struct DownloadArguments {
  ServerArguments server;
  std::string source;
  std::string folder;
  bool overwrite = false;
};

// The last part of where the artifact is: what its folder is called here.
absl::StatusOr<std::string> DefaultFolder(const v1::Artifact& artifact) {
  const std::string name =
      std::filesystem::path(artifact.uri()).lexically_normal().filename().string();
  if (name.empty() || name == "." || name == "..") {
    return absl::InvalidArgumentError("say where to write it: pewter download JOB|URI DIR");
  }
  return name;
}

absl::StatusOr<int> RunDownload(const DownloadArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(Remote remote, Remote::Open(arguments.server));
  v1::GetArtifactRequest request;
  if (absl::StartsWith(arguments.source, kArtifactScheme)) {
    request.set_uri(arguments.source);
  } else if (absl::StrContains(arguments.source, "/")) {
    return absl::InvalidArgumentError(
        absl::StrCat(arguments.source, " is neither a job nor an artifact:// URI of the server"));
  } else {
    request.set_job_id(arguments.source);
  }
  ASSIGN_OR_RETURN(const v1::Artifact artifact, remote.GetArtifact(request));
  std::string folder = arguments.folder;
  if (folder.empty()) {
    ASSIGN_OR_RETURN(folder, DefaultFolder(artifact));
  }
  ASSIGN_OR_RETURN(const int64_t received,
                   DownloadArtifact(remote, artifact, folder, arguments.overwrite, out));
  if (out.json()) {
    out.Print({{"source", arguments.source},
               {"uri", artifact.uri()},
               {"folder", folder},
               {"files", artifact.files_size()},
               {"bytes", artifact.size_bytes()},
               {"received_bytes", received}});
  } else {
    out.Text(out.quiet() ? absl::StrCat(folder, "\n")
                         : absl::StrCat("Downloaded into ", folder, "\n  ",
                                        FormatCount(artifact.files_size(), "file"), ", ",
                                        FormatBytes(artifact.size_bytes()), ", checked",
                                        received < artifact.size_bytes()
                                            ? absl::StrCat("; ", FormatBytes(received), " came now")
                                            : "",
                                        "\n"));
  }
  return kExitDone;
}

struct ListArguments {
  ServerArguments server;
  int limit = 100;
};

absl::StatusOr<int> RunList(const ListArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(Remote remote, Remote::Open(arguments.server));
  std::vector<v1::Artifact> artifacts;
  v1::ListArtifactsRequest request;
  bool more = true;
  while (more && static_cast<int>(artifacts.size()) < arguments.limit) {
    request.set_page_size(
        std::min(kLargestPage, arguments.limit - static_cast<int>(artifacts.size())));
    ASSIGN_OR_RETURN(v1::ListArtifactsResponse page, remote.ListArtifacts(request));
    for (v1::Artifact& artifact : *page.mutable_artifacts()) {
      artifacts.push_back(std::move(artifact));
    }
    request.set_page_token(page.next_page_token());
    more = !page.next_page_token().empty();
  }
  if (out.json()) {
    Json list = Json::array();
    for (const v1::Artifact& artifact : artifacts) {
      list.push_back({{"uri", artifact.uri()}, {"bytes", artifact.size_bytes()}});
    }
    out.Print({{"artifacts", std::move(list)}, {"more", more}});
    return kExitDone;
  }
  Table table({"URI", "SIZE"});
  table.RightAlign(1);
  for (const v1::Artifact& artifact : artifacts) {
    if (out.quiet()) out.Text(absl::StrCat(artifact.uri(), "\n"));
    table.Add({artifact.uri(), FormatBytes(artifact.size_bytes())});
  }
  if (out.quiet()) return kExitDone;
  if (artifacts.empty()) {
    out.Note("no artifacts");
    return kExitDone;
  }
  out.Text(table.ToString());
  if (more) out.Note(absl::StrCat("there are more: --limit shows more than ", arguments.limit));
  return kExitDone;
}

CommandBody DeclareList(CLI::App& app) {
  auto arguments = std::make_shared<ListArguments>();
  arguments->server.Declare(app);
  app.add_option("--limit", arguments->limit, "Most artifacts to list")
      ->type_name("N")
      ->check(InRange(1, 1'000'000))
      ->capture_default_str();
  return [arguments](Output& out) { return RunList(*arguments, out); };
}

struct DeleteArguments {
  ServerArguments server;
  std::vector<std::string> uris;
};

// Errors of one do not keep the others from it. The first bad exit code counts.
absl::StatusOr<int> RunDelete(const DeleteArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(Remote remote, Remote::Open(arguments.server));
  int result = kExitDone;
  for (const std::string& uri : arguments.uris) {
    const absl::Status status = remote.DeleteArtifact(uri);
    if (!status.ok()) {
      out.Error(status, ExitCodeOf(status));
      if (result == kExitDone) result = ExitCodeOf(status);
    } else if (out.json()) {
      out.Print({{"uri", uri}, {"deleted", true}});
    } else {
      out.Text(out.quiet() ? absl::StrCat(uri, "\n") : absl::StrCat(uri, " is deleted\n"));
    }
  }
  return result;
}

CommandBody DeclareDelete(CLI::App& app) {
  auto arguments = std::make_shared<DeleteArguments>();
  app.add_option("uri", arguments->uris, "artifact:// URI, or several")
      ->required()
      ->type_name("URI");
  arguments->server.Declare(app);
  return [arguments](Output& out) { return RunDelete(*arguments, out); };
}

}  // namespace

CommandBody DeclareUpload(CLI::App& app) {
  auto arguments = std::make_shared<UploadArguments>();
  app.add_option("model", arguments->models, "Folder of a model or adapter, or a file; or several")
      ->required()
      ->type_name(kPathType);
  arguments->server.Declare(app);
  app.footer(
      "What the server has already is not sent again, and an interrupted upload goes on where it\n"
      "was. The URI that is printed stands for the model in recipes. pewter submit uploads the\n"
      "models of a recipe by itself.\n"
      "\nExample:\n"
      "  pewter upload ./my-finetune --server merge.example.org:7480");
  return [arguments](Output& out) { return RunUpload(*arguments, out); };
}

CommandBody DeclareDownload(CLI::App& app) {
  auto arguments = std::make_shared<DownloadArguments>();
  app.add_option("source", arguments->source, "A job that has succeeded, or an artifact:// URI")
      ->required()
      ->type_name(kJobType);
  app.add_option("folder", arguments->folder,
                 "Where to write it; default: a folder of its name, here")
      ->type_name(kPathType);
  arguments->server.Declare(app);
  app.add_flag("--overwrite", arguments->overwrite, "Replace other files of the same names");
  app.footer(
      "Every file is checked by its SHA-256. An interrupted download goes on where it was; files\n"
      "that are there already do not come again.\n"
      "\nExamples:\n"
      "  pewter download j1a2b3c4d5e6f7a8b9c0 ./merged\n"
      "  pewter download artifact://merged");
  return [arguments](Output& out) { return RunDownload(*arguments, out); };
}

CommandBody DeclareArtifacts(CLI::App& app) {
  return DeclareGroup(app,
                      {{"list", "List models that the server keeps for its clients", &DeclareList},
                       {"delete", "Remove such a model from the server", &DeclareDelete}});
}

}  // namespace pewter::client
