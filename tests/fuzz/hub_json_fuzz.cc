// What a hub or an agent that gives out credentials answers, on any bytes: no crash, every refusal
// is DataLoss, and what is accepted names files below a folder.
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "store/aws_credentials.h"
#include "store/hub_json.h"
#include "store/object_key.h"
#include "tests/fuzz/memory_store.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using pewter::fuzz::Require;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto commit = pewter::ParseHubCommit(text);
  Require(commit.ok() ? commit->size() == 40 : absl::IsDataLoss(commit.status()));
  const auto files = pewter::ParseHubTree(text);
  Require(files.ok() || absl::IsDataLoss(files.status()));
  if (files.ok()) {
    for (const pewter::HubFile& file : *files) {
      Require(file.size >= 0 && pewter::ValidateKey(file.path).ok());
    }
  }
  pewter::NextPage(text);
  const auto credentials = pewter::ParseContainerCredentials(text);
  Require(credentials.ok() || absl::IsDataLoss(credentials.status()));
  pewter::ParseAwsProfile(text, "default");
  return 0;
}
