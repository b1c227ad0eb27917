// Files for tests: a folder that goes with the test, and whole files read and written.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace pewter::testing {

// Removed with all that it holds when the object goes.
class TempFolder {
 public:
  TempFolder();  // where temporary files go
  explicit TempFolder(absl::string_view parent);
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::string& path() const { return path_; }
  // The full path of a file in it.
  std::string operator/(absl::string_view name) const;
  // Writes a file and returns its full path.
  std::string Write(absl::string_view name, absl::string_view content) const;

 private:
  std::string path_;
};

// Makes the folders on the way to it.
void WriteFile(const std::string& path, absl::string_view content);
std::string ReadFile(const std::string& path);

}  // namespace pewter::testing
