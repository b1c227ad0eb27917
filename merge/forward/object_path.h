// Where one object lies that a user named: by a path, or by a URI of its folder and name.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "store/object_store.h"

namespace pewter {

struct ObjectPlace {
  std::shared_ptr<ObjectStore> store;
  std::string key;
};

// The object need not exist.
absl::StatusOr<ObjectPlace> LocateObject(absl::string_view uri);

}  // namespace pewter
