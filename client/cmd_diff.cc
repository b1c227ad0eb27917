// pewter diff: like diff(1), for weights. Exit code 0: equal, 1: different, 2: trouble.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/recipe_arguments.h"
#include "client/tensor_diff.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/recipe/recipe.h"

namespace pewter::client {

namespace {

constexpr int kExitEqual = 0;
constexpr int kExitDifferent = 1;
constexpr int kExitTrouble = 2;

struct Arguments {
  std::string a, b;
  int threads = 0;
  bool all = false;
};

Json InfoToJson(const std::optional<TensorInfo>& info) {
  if (!info.has_value()) return nullptr;
  const auto extents = info->shape.extents();
  return {{"dtype", SafetensorsName(info->dtype)},
          {"shape", std::vector<int64_t>(extents.begin(), extents.end())}};
}

Json ToJson(const TensorDiff& diff) {
  return {{"name", diff.name},
          {"difference", KindName(diff.kind)},
          {"a", InfoToJson(diff.a)},
          {"b", InfoToJson(diff.b)},
          {"elements", diff.elements},
          {"equal_elements", diff.equal_elements},
          {"max_abs", diff.max_abs.has_value() ? Json(*diff.max_abs) : Json()},
          {"relative_l2", diff.relative_l2.has_value() ? Json(*diff.relative_l2) : Json()}};
}

std::string Describe(const std::optional<TensorInfo>& info) {
  return info.has_value() ? absl::StrCat(SafetensorsName(info->dtype), " ", info->shape.ToString())
                          : "-";
}

std::string NumberText(const std::optional<double>& number) {
  return number.has_value() ? absl::StrFormat("%.3g", *number) : "-";
}

std::string EqualText(const TensorDiff& diff) {
  if (diff.elements == 0) return "-";
  if (diff.equal_elements == diff.elements) return "100%";
  // Never 100 % when one element differs.
  const double percent = 100.0 * static_cast<double>(diff.equal_elements) / diff.elements;
  return absl::StrFormat("%.2f%%", std::min(percent, 99.99));
}

absl::StatusOr<int> RunDiff(const Arguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const ModelRef ref_a, ParseModelRef(arguments.a));
  ASSIGN_OR_RETURN(const ModelRef ref_b, ParseModelRef(arguments.b));
  ASSIGN_OR_RETURN(const auto a, Checkpoint::Open(ref_a));
  ASSIGN_OR_RETURN(const auto b, Checkpoint::Open(ref_b));
  ASSIGN_OR_RETURN(const std::vector<TensorDiff> diffs, DiffModels(*a, *b, arguments.threads));

  const auto equal = [](const TensorDiff& diff) { return diff.kind == TensorDiff::Kind::kEqual; };
  const int64_t equal_tensors = std::count_if(diffs.begin(), diffs.end(), equal);
  const bool all_equal = equal_tensors == static_cast<int64_t>(diffs.size());
  const int code = all_equal ? kExitEqual : kExitDifferent;
  if (out.json()) {
    Json tensors = Json::array();
    for (const TensorDiff& diff : diffs) {
      if (arguments.all || !equal(diff)) tensors.push_back(ToJson(diff));
    }
    out.Print({{"a", arguments.a},
               {"b", arguments.b},
               {"equal", all_equal},
               {"tensor_count", diffs.size()},
               {"equal_tensors", equal_tensors},
               {"tensors", std::move(tensors)}});
    return code;
  }
  if (out.quiet()) return code;
  Table table({"TENSOR", "DIFFERENCE", "A", "B", "MAX ABS", "REL L2", "EQUAL"});
  table.RightAlign(4).RightAlign(5).RightAlign(6);
  for (const TensorDiff& diff : diffs) {
    if (!arguments.all && equal(diff)) continue;
    table.Add({diff.name, KindName(diff.kind), Describe(diff.a), Describe(diff.b),
               NumberText(diff.max_abs), NumberText(diff.relative_l2), EqualText(diff)});
  }
  if (table.rows() > 0) out.Text(absl::StrCat(table.ToString(), "\n"));
  out.Text(absl::StrCat(FormatCount(equal_tensors), " of ", FormatCount(diffs.size(), "tensor"),
                        " equal\n"));
  return code;
}

}  // namespace

CommandBody DeclareDiff(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  app.add_option("a", arguments->a, "Model")->required()->type_name(kModelType);
  app.add_option("b", arguments->b, "Model to compare with it")->required()->type_name(kModelType);
  app.add_flag("-a,--all", arguments->all, "List equal tensors too");
  app.add_option("-j,--threads", arguments->threads, "Threads; default: one for each core")
      ->type_name("N")
      ->check(InRange(1, 4096));
  app.footer(
      "Equal means the same tensors with the same dtypes, shapes and bits. MAX ABS is the largest\n"
      "|a - b|, REL L2 is |a - b| / |a|, EQUAL the share of equal elements.\n"
      "\nExit codes: 0 equal, 1 different, 2 trouble, 3 not found or not permitted.\n"
      "\nExample:\n"
      "  pewter diff ./merged ./merged-again && echo same");
  return [arguments](Output& out) -> absl::StatusOr<int> {
    const absl::StatusOr<int> code = RunDiff(*arguments, out);
    // 1 would say "different".
    if (!code.ok() && ExitCodeOf(code.status()) == kExitFailed) {
      out.Error(code.status(), kExitTrouble);
      return kExitTrouble;
    }
    return code;
  };
}

}  // namespace pewter::client
