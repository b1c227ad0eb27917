#include "merge/plan/chat_template.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "merge/plan/tokenizer_files.h"

namespace pewter {
namespace {

// Text that is shorter, or without a brace, is no template but a misspelt name.
constexpr size_t kLeastJinja = 20;

struct KnownTemplate {
  const char* name;
  const char* jinja;
};

// The formats as their authors describe them.
constexpr KnownTemplate kKnown[] = {
    // Stanford Alpaca: https://github.com/tatsu-lab/stanford_alpaca#data-release
    {"alpaca", R"jinja({%- if messages and messages[0]['role'] == 'system' -%}
  {{- messages[0]['content'] | trim + '\n\n' -}}
{%- else -%}
  {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '### Instruction:\n' + message['content'] | trim + '\n\n' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '### Response:\n' + message['content'] | trim + eos_token + '\n\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '### Response:\n' -}}
{%- endif -%}
)jinja"},
    // ChatML: https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
    {"chatml", R"jinja({%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
)jinja"},
    // EXAONE: https://huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct
    {"exaone", R"jinja({%- if not messages or messages[0]['role'] != 'system' -%}
  {{- '[|system|][|endofturn|]\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '[|' + message['role'] + '|]' + message['content'] -}}
  {{- '\n' if message['role'] == 'user' else '[|endofturn|]\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '[|assistant|]' -}}
{%- endif -%}
)jinja"},
    // Llama 3: https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
    {"llama3", R"jinja({{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
  {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
)jinja"},
    // Mistral: https://docs.mistral.ai/guides/tokenization/; a system message is put before the
    // user message that follows it.
    {"mistral", R"jinja({{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set state.system = message['content'] | trim + '\n\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- '[INST] ' + state.system + message['content'] | trim + ' [/INST]' -}}
    {%- set state.system = '' -%}
  {%- else -%}
    {{- ' ' + message['content'] | trim + eos_token -}}
  {%- endif -%}
{%- endfor -%}
)jinja"},
};

absl::StatusOr<std::optional<std::string>> MostFrequent(
    absl::Span<const std::shared_ptr<const Checkpoint>> models,
    std::vector<std::string>& warnings) {
  std::vector<std::pair<std::string, int>> counts;  // in the order of models
  for (const auto& model : models) {
    auto own = ReadChatTemplate(*model);
    if (!own.ok()) {
      return Annotate(own.status(), absl::StrCat("model ", model->ref().ToString()));
    }
    if (!own->has_value()) continue;
    std::string text(absl::StripAsciiWhitespace(**own));
    if (text.empty()) continue;
    const auto known = std::find_if(counts.begin(), counts.end(),
                                    [&](const auto& entry) { return entry.first == text; });
    if (known == counts.end()) {
      counts.emplace_back(std::move(text), 1);
    } else {
      ++known->second;
    }
  }
  if (counts.empty()) {
    warnings.push_back("chat_template is auto and no model has a chat template");
    return std::nullopt;
  }
  return std::max_element(counts.begin(), counts.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

}  // namespace

absl::StatusOr<std::optional<std::string>> ChooseChatTemplate(
    absl::string_view wanted, absl::Span<const std::shared_ptr<const Checkpoint>> models,
    std::vector<std::string>& warnings) {
  if (wanted == "auto") return MostFrequent(models, warnings);
  for (const KnownTemplate& known : kKnown) {
    if (wanted == known.name) return std::string(known.jinja);
  }
  if (wanted.size() < kLeastJinja || !absl::StrContains(wanted, "{")) {
    return absl::InvalidArgumentError(absl::StrCat(
        "`chat_template` is neither auto nor one of ", absl::StrJoin(ChatTemplateNames(), ", "),
        " nor Jinja text, which has ", kLeastJinja, " characters or more and a \"{\""));
  }
  return std::string(wanted);
}

std::vector<std::string> ChatTemplateNames() {
  std::vector<std::string> names;
  for (const KnownTemplate& known : kKnown) names.emplace_back(known.name);
  return names;
}

}  // namespace pewter
