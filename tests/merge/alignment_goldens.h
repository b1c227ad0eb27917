// ../shared/goldens/alignment, where it is there: pairs of tiny models whose orders are known, and
// matrices.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "merge/align/alignment.h"
#include "merge/align/dense_matrix.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"
#include "tests/support/tiny_model.h"

namespace pewter::testing {

inline std::filesystem::path AlignmentGoldenFolder() {
  return std::filesystem::path(PEWTER_SOURCE_DIR) / "../shared/goldens/alignment";
}

// A vector is a column.
inline DenseMatrix MatrixOf(const TinyTensor& tensor) {
  return {tensor.shape[0], tensor.shape.rank() == 2 ? tensor.shape[1] : 1, tensor.values};
}

struct AlignmentGolden {
  std::string name, folder;
  std::shared_ptr<const Checkpoint> a, b;
  Symmetry symmetry;
  Alignment planted;  // gives b the order of a
};

// Empty where there are none.
inline std::vector<AlignmentGolden> AlignmentGoldens() {
  namespace fs = std::filesystem;
  std::vector<AlignmentGolden> goldens;
  const fs::path root = AlignmentGoldenFolder();
  if (!fs::exists(root)) return goldens;
  for (const auto& entry : fs::directory_iterator(root)) {
    if (!fs::exists(entry.path() / "perms.json")) continue;
    AlignmentGolden golden = {.name = entry.path().filename(), .folder = entry.path()};
    golden.a = *Checkpoint::Open({.path = entry.path() / "a"});
    golden.b = *Checkpoint::Open({.path = entry.path() / "b"});
    const std::vector<std::shared_ptr<const Checkpoint>> models = {golden.a, golden.b};
    golden.symmetry =
        *Symmetry::Make(**WithAllTensors(*ResolveArchitecture(models, false), models), models);
    const auto perms = nlohmann::json::parse(std::ifstream(entry.path() / "perms.json"));
    for (const auto& [name, group] : perms.at("groups").items()) {
      golden.planted.groups[name].permutation = group.at("recover").get<std::vector<int32_t>>();
    }
    golden.planted.family = golden.symmetry.family();
    golden.planted.reference = "a";
    golden.planted.model = "b";
    goldens.push_back(std::move(golden));
  }
  EXPECT_GE(goldens.size(), 7);
  return goldens;
}

}  // namespace pewter::testing
