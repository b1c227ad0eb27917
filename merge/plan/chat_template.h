// The chat template that a recipe asks for: Jinja that turns a conversation into a prompt.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

// `wanted` is "auto" (the most frequent template of the models; of equally frequent ones the first
// model's), a known name, or Jinja. Nullopt, with a warning, when no model has one.
// InvalidArgument for anything else.
absl::StatusOr<std::optional<std::string>> ChooseChatTemplate(
    absl::string_view wanted, absl::Span<const std::shared_ptr<const Checkpoint>> models,
    std::vector<std::string>& warnings);

// Names of the templates that are known without a model.
std::vector<std::string> ChatTemplateNames();

}  // namespace pewter
