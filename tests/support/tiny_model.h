// Small checkpoints for tests, written to disk and read back.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/shape.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {

// A tensor's values; stored as `dtype`, rounded to nearest even (floating types) or truncated (the
// others).
struct TinyTensor {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  std::vector<double> values;
};

// `elements` values drawn from a normal distribution with the given seed.
TinyTensor RandomTensor(const std::string& name, DType dtype, Shape shape, int seed,
                        double scale = 1);

void WriteSafetensors(const std::string& path, const std::vector<TinyTensor>& tensors);

// All tensors of a .safetensors file, or of all of them in a folder, widened to double.
std::map<std::string, TinyTensor> ReadTensors(const std::string& path);

}  // namespace pewter::testing
