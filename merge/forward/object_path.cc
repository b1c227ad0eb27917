#include "merge/forward/object_path.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {

absl::StatusOr<ObjectPlace> LocateObject(absl::string_view uri) {
  const size_t slash = uri.rfind('/');
  const bool in_folder = slash != absl::string_view::npos;
  const absl::string_view key = in_folder ? uri.substr(slash + 1) : uri;
  if (key.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("\"", uri, "\" does not name a file"));
  }
  // A scheme's slashes stay: hf://org/name/file, file:///file.
  const absl::string_view folder = !in_folder ? "." : slash == 0 ? "/" : uri.substr(0, slash);
  ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> store, OpenStore(folder));
  return ObjectPlace{std::move(store), std::string(key)};
}

}  // namespace pewter
