#include "client/mergekit_options.h"

#include <limits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/recipe_arguments.h"

namespace pewter::client {

namespace {

constexpr char kGroup[] = "Options of mergekit";

// A switch or an option with a value that changes nothing, and why.
struct Idle {
  const char* names;
  bool takes_value;
  const char* why;
};
constexpr Idle kIdle[] = {
    {"--lora-merge-cache", true, "adapters are applied while reading, without a cache"},
    {"--lora-merge-dtype", true, "adapters are applied in float32"},
    {"--lazy-unpickle,--no-lazy-unpickle", false, "every checkpoint is read lazily"},
    {"--low-cpu-memory,--no-low-cpu-memory", false, "memory is bounded by --memory"},
    {"--read-to-gpu,--no-read-to-gpu", false, "tensors stream to the device in tiles"},
    {"--multi-gpu,--no-multi-gpu", false, "one device is used: --device cuda:N"},
    {"--async-write,--no-async-write", false, "shards are always written in the background"},
    {"--write-threads", true, "each open shard is written by a thread of its own"},
    {"--clone-tensors,--no-clone-tensors", false, "every tensor is stored on its own"},
    {"--trust-remote-code,--no-trust-remote-code", false, "code of a checkpoint is never run"},
    {"--transformers-cache", true,
     "models of the hub are looked up where HF_HUB_CACHE or HF_HOME says"},
    {"--lazy,--no-lazy", false, "a stage is used again when its plan and its bytes are the same"},
    {"-v,--verbose", false,
     "everything that there is to say is in the manifest and in `pewter plan`"},
};

}  // namespace

absl::StatusOr<int64_t> ParseMergekitSize(absl::string_view text) {
  const absl::Status wrong = absl::InvalidArgumentError(
      absl::StrCat("\"", text, "\" is not a size: write 5B, 600M or 60K, for bytes"));
  absl::string_view digits = text;
  int64_t unit = 1;
  if (!text.empty()) {
    const char last = text.back();
    unit = last == 'K' || last == 'k'   ? 1000
           : last == 'M' || last == 'm' ? 1000 * 1000
           : last == 'B' || last == 'b' ? 1000 * 1000 * 1000
                                        : 1;
    if (unit > 1) digits.remove_suffix(1);
  }
  int64_t number = 0;
  if (!absl::SimpleAtoi(digits, &number) || number > std::numeric_limits<int64_t>::max() / unit) {
    return wrong;
  }
  return number * unit;
}

void MergekitOptions::Declare(CLI::App& app, PlanArguments& plan) {
  for (const Idle& idle : kIdle) {
    const absl::string_view names = idle.names;
    const std::string name(names.substr(0, names.find(',')));
    const auto note = [this, name, why = idle.why] {
      notes_.push_back(absl::StrCat(name, " changes nothing: ", why));
    };
    CLI::Option* option =
        idle.takes_value
            ? app.add_option_function<std::string>(
                  idle.names, [note](const std::string&) { note(); }, "Accepted, without effect")
            : app.add_flag_callback(idle.names, note, "Accepted, without effect");
    option->group(kGroup)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  }
  app.add_flag_callback(
         "--cuda", [&plan] { plan.device = "cuda"; }, "The same as --device cuda")
      ->group(kGroup);
  app.add_flag_callback(
         "--no-cuda", [&plan] { plan.device = "cpu"; }, "The same as --device cpu")
      ->group(kGroup);
  app.add_flag_callback(
         "--gpu-rich", [&plan] { plan.device = "cuda"; }, "The same as --device cuda")
      ->group(kGroup);
  app.add_option_function<std::string>(
         "--out-shard-size",
         [&plan](const std::string& text) {
           const auto bytes = ParseMergekitSize(text);
           if (!bytes.ok())
             throw CLI::ValidationError("--out-shard-size", std::string(bytes.status().message()));
           // 0 and less: one file.
           plan.shard_bytes = *bytes > 0 ? *bytes : std::numeric_limits<int64_t>::max();
         },
         "As --shard-size; K, M and B are 10^3, 10^6 and 10^9 bytes")
      ->type_name("SIZE")
      ->group(kGroup);
  app.add_flag_callback(
         "--no-allow-crimes", [&plan] { plan.allow_crimes = false; }, "The default")
      ->group(kGroup);
  app.add_flag_callback(
         "--copy-tokenizer", [&plan] { plan.copy_tokenizer = true; }, "The default")
      ->group(kGroup);
  app.add_flag_callback(
         "--write-model-card", [&plan] { plan.write_model_card = true; }, "The default")
      ->group(kGroup);
  app.add_flag_callback(
         "--no-unsafe-truncate-embeddings", [&plan] { plan.truncate_embeddings = false; },
         "The default")
      ->group(kGroup);
  app.add_flag_callback(
         "--no-quiet", [] {}, "The default")
      ->group(kGroup);
  app.add_flag_callback(
         "--safe-serialization", [] {}, "The default; there is no other format")
      ->group(kGroup);
}

void MergekitOptions::Explain(Output& out) const {
  for (const std::string& note : notes_) out.Note(note);
}

}  // namespace pewter::client
