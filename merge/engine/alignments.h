// The alignments of a plan: found before its tensors are merged, or as an earlier run left them.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "merge/engine/run.h"
#include "merge/plan/plan.h"
#include "store/object_store.h"

namespace pewter {

struct AlignmentRun {
  std::shared_ptr<ObjectStore> output;
  // Digests of the files that the interrupted run of this plan has written, by name; one that is
  // as it was is used again.
  const std::map<std::string, std::string>& written;
  std::function<void(const std::string& what)> current;  // "alignment of ./b with ./a"
  // Writes a file of the output.
  std::function<absl::Status(const std::string& name, absl::string_view text)> write;
  std::stop_token stop;
};

// Sets the slots of all alignments. On an error what is set stays set.
absl::Status FindAlignments(const Plan& plan, const AlignmentRun& run);
void ForgetAlignments(const Plan& plan);

}  // namespace pewter
