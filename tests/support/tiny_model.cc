#include "tests/support/tiny_model.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <random>

#include "kernels/backend.h"
#include "merge/checkpoint/safetensors.h"

namespace pewter::testing {

TinyTensor RandomTensor(const std::string& name, DType dtype, Shape shape, int seed, double scale) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0, scale);
  TinyTensor tensor{name, dtype, shape, std::vector<double>(shape.elements())};
  for (double& value : tensor.values) value = normal(engine);
  return tensor;
}

namespace {

template <class Integer>
void StoreIntegers(const std::vector<double>& values, std::string& out) {
  for (double value : values) {
    const Integer integer = static_cast<Integer>(value);
    out.append(reinterpret_cast<const char*>(&integer), sizeof integer);
  }
}

std::string Store(const TinyTensor& tensor) {
  std::string out;
  if (IsFloat(tensor.dtype)) {
    out.resize(tensor.values.size() * ByteWidth(tensor.dtype));
    const int64_t count = static_cast<int64_t>(tensor.values.size());
    kernels::Convert({tensor.values.data(), DType::kF64, count}, {out.data(), tensor.dtype, count});
  } else if (ByteWidth(tensor.dtype) == 8) {
    StoreIntegers<int64_t>(tensor.values, out);
  } else if (ByteWidth(tensor.dtype) == 4) {
    StoreIntegers<int32_t>(tensor.values, out);
  } else {
    StoreIntegers<int8_t>(tensor.values, out);
  }
  return out;
}

std::vector<double> Widen(const std::string& bytes, const TensorInfo& info) {
  std::vector<double> values(info.shape.elements());
  const char* data = bytes.data() + info.offset;
  const int64_t count = info.shape.elements();
  if (IsFloat(info.dtype)) {
    kernels::Convert({data, info.dtype, count}, {values.data(), DType::kF64, count});
    return values;
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t wide = 0;
    std::memcpy(&wide, data + i * ByteWidth(info.dtype), ByteWidth(info.dtype));
    values[i] = static_cast<double>(wide);
  }
  return values;
}

}  // namespace

void WriteSafetensors(const std::string& path, const std::vector<TinyTensor>& tensors) {
  std::vector<TensorInfo> infos;
  for (const TinyTensor& tensor : tensors) {
    infos.push_back({.name = tensor.name, .dtype = tensor.dtype, .shape = tensor.shape});
  }
  const auto header = LayOutSafetensors(infos, {{"format", "pt"}});
  ASSERT_TRUE(header.ok()) << header.status();
  std::string bytes = *header;
  for (const TinyTensor& tensor : tensors) bytes += Store(tensor);
  WriteFile(path, bytes);
}

std::map<std::string, TinyTensor> ReadTensors(const std::string& path) {
  std::vector<std::string> files = {path};
  if (std::filesystem::is_directory(path)) {
    files.clear();
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    }
  }
  std::map<std::string, TinyTensor> tensors;
  for (const std::string& file : files) {
    const std::string bytes = ReadFile(file);
    uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    const auto header = ParseSafetensorsHeader(absl::string_view(bytes).substr(8, length),
                                               static_cast<int64_t>(8 + length),
                                               static_cast<int64_t>(bytes.size()));
    EXPECT_TRUE(header.ok()) << file << ": " << header.status();
    if (!header.ok()) continue;
    for (const TensorInfo& info : header->tensors) {
      tensors[info.name] = {info.name, info.dtype, info.shape, Widen(bytes, info)};
    }
  }
  return tensors;
}

}  // namespace pewter::testing
