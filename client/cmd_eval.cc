// pewter eval: loss, perplexity and accuracy of a model on labelled data, on this machine.
#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "base/units.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/interrupt.h"
#include "client/recipe_arguments.h"
#include "kernels/backends.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/forward/evaluate.h"

namespace pewter::client {

namespace {

struct Arguments {
  std::string model, data, metric;
  std::string device = "auto";
  std::string memory = "4GiB";
  int threads = 0;
};

absl::StatusOr<int> RunEval(const Arguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const int64_t memory, ParseBytes(arguments.memory));
  ASSIGN_OR_RETURN(const ModelRef ref, ParseModelRef(arguments.model));
  ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(ref));
  for (const std::string& warning : checkpoint->warnings()) out.Warn(warning);
  ASSIGN_OR_RETURN(const ForwardModel model, MakeForwardModel(checkpoint));
  ASSIGN_OR_RETURN(Metric metric, DefaultMetric(model));
  if (!arguments.metric.empty()) {
    ASSIGN_OR_RETURN(metric, ParseMetric(arguments.metric));
  }
  ASSIGN_OR_RETURN(const auto data, ForwardData::Open(arguments.data));
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(arguments.device));
  const int threads = arguments.threads > 0
                          ? arguments.threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  ASSIGN_OR_RETURN(const auto backend, kernels::OpenBackend(device, threads));

  const auto start = std::chrono::steady_clock::now();
  absl::StatusOr<Evaluation> evaluation;
  {
    Interrupt interrupt([] {});
    evaluation =
        Evaluate(model, data, metric,
                 {.backend = backend.get(), .memory_bytes = memory, .stop = interrupt.token()});
  }
  if (!evaluation.ok()) return evaluation.status();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  if (out.json()) {
    out.Print({{"model", arguments.model},
               {"data", arguments.data},
               {"metric", MetricName(metric)},
               {"value", evaluation->value()},
               {"loss", evaluation->loss},
               {"perplexity", evaluation->perplexity},
               {"accuracy", evaluation->accuracy},
               {"tokens", evaluation->tokens},
               {"device", device.ToString()},
               {"seconds", seconds.count()}});
    return kExitDone;
  }
  if (out.quiet()) {
    out.Text(absl::StrFormat("%.9g\n", evaluation->value()));
    return kExitDone;
  }
  Table table({"MODEL", arguments.model});
  table.Add({"Data", arguments.data});
  table.Add({"Metric", MetricName(metric)});
  table.Add({"Predictions", FormatCount(evaluation->tokens)});
  table.Add({"Loss", absl::StrFormat("%.6f", evaluation->loss)});
  table.Add({"Perplexity", absl::StrFormat("%.6g", evaluation->perplexity)});
  table.Add({"Accuracy", absl::StrFormat("%.4f", evaluation->accuracy)});
  table.Add({"Time", absl::StrCat(FormatSeconds(seconds.count()), " on ", device.ToString())});
  out.Text(table.ToString());
  return kExitDone;
}

}  // namespace

CommandBody DeclareEval(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  app.add_option("model", arguments->model, "Model: a folder, hf://ORG/NAME, MODEL+ADAPTER")
      ->required()
      ->type_name(kModelType);
  app.add_option("--data", arguments->data,
                 "A safetensors file with input_ids or pixel_values, and labels")
      ->required()
      ->type_name(kFileType);
  app.add_option("--metric", arguments->metric,
                 "mlm_loss, clm_loss or accuracy; default: what the model's head is for")
      ->type_name("mlm_loss|clm_loss|accuracy");
  app.add_option("--device", arguments->device,
                 "auto, cpu, cuda or cuda:N; auto takes a GPU when there is one")
      ->type_name("DEVICE")
      ->capture_default_str();
  app.add_option("--memory", arguments->memory,
                 "Bound for weights and features; data that does not fit goes through in parts")
      ->type_name("BYTES")
      ->capture_default_str();
  app.add_option("-j,--threads", arguments->threads, "Threads; default: one for each core")
      ->type_name("N")
      ->check(InRange(1, 4096));
  app.footer(
      "Known are BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral, Qwen2, Qwen3 and ViT, in\n"
      "float32. The data has input_ids [rows, length], attention_mask and token_type_ids if there\n"
      "are some, and labels: of tokens (-100 where nothing is to be predicted; a causal model "
      "takes\n"
      "input_ids without them) or of rows. Losses are means in nats over all labels.\n"
      "\nExamples:\n"
      "  pewter eval ./merged --data heldout.safetensors\n"
      "  pewter eval ./base+./adapter --data heldout.safetensors --metric clm_loss -o json");
  return [arguments](Output& out) { return RunEval(*arguments, out); };
}

}  // namespace pewter::client
