// HubCache: a Hugging Face hub cache in a temporary folder, which HF_HUB_CACHE points to as long as
// the object lives.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/digest.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {

class HubCache {
 public:
  HubCache() { setenv("HF_HUB_CACHE", folder_.path().c_str(), 1); }
  ~HubCache() { unsetenv("HF_HUB_CACHE"); }

  const std::string& path() const { return folder_.path(); }

  void AddRef(const std::string& model, const std::string& ref, const std::string& commit) {
    folder_.Write(absl::StrCat(Folder(model), "/refs/", ref), commit);
  }
  // The content goes into a blob that is named by its hash; the snapshot has a link to it.
  void AddFile(const std::string& model, const std::string& commit, const std::string& file,
               const std::string& content) {
    const std::string blob = Sha256::Of(content);
    folder_.Write(absl::StrCat(Folder(model), "/blobs/", blob), content);
    const std::filesystem::path link =
        folder_ / absl::StrCat(Folder(model), "/snapshots/", commit, "/", file);
    std::filesystem::create_directories(link.parent_path());
    std::filesystem::path target = std::filesystem::relative(
        folder_ / absl::StrCat(Folder(model), "/blobs/", blob), link.parent_path());
    std::filesystem::remove(link);
    std::filesystem::create_symlink(target, link);
  }

 private:
  static std::string Folder(const std::string& model) {
    return absl::StrCat("models--", absl::StrReplaceAll(model, {{"/", "--"}}));
  }
  TempFolder folder_;
};

}  // namespace pewter::testing
