#include "kernels/cuda/cuda_backend.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "kernels/arguments.h"
#include "kernels/cuda/linear_algebra.h"
#include "kernels/cuda/network.h"
#include "kernels/cuda/plugin.h"

namespace pewter::kernels::cuda {
namespace {

constexpr char kLibrary[] = "libpewter_cuda.so";

std::vector<std::string> Candidates() {
  if (const char* path = std::getenv("PEWTER_CUDA_LIBRARY")) return {path};
  std::vector<std::string> candidates;
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) {
    const std::filesystem::path folder = program.parent_path();
    for (const auto& path : {folder / kLibrary, folder.parent_path() / "lib" / kLibrary}) {
      if (std::filesystem::exists(path, error)) candidates.push_back(path.string());
    }
  }
  candidates.push_back(kLibrary);
  return candidates;
}

absl::StatusOr<const Plugin*> Load() {
  std::vector<std::string> reasons;
  for (const std::string& path : Candidates()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      reasons.push_back(dlerror());  // names the file
      continue;
    }
    const auto entry = reinterpret_cast<PluginEntry>(dlsym(library, kPluginEntryName));
    const Plugin* plugin = entry == nullptr ? nullptr : entry(kPluginAbi);
    if (plugin != nullptr) return plugin;  // stays loaded
    reasons.push_back(absl::StrCat(path, ": built for another version of pewter"));
    dlclose(library);
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the CUDA backend cannot be loaded: ", absl::StrJoin(reasons, "; ")));
}

const absl::StatusOr<const Plugin*>& ThePlugin() {
  static const absl::StatusOr<const Plugin*> plugin = Load();
  return plugin;
}

class CudaBuffer : public Buffer {
 public:
  CudaBuffer(void (*release)(int, void*), int ordinal, void* data, int64_t bytes)
      : release_(release), ordinal_(ordinal), data_(data), bytes_(bytes) {}
  ~CudaBuffer() override { release_(ordinal_, data_); }

  void* data() override { return data_; }
  int64_t bytes() const override { return bytes_; }

 private:
  void (*const release_)(int, void*);
  const int ordinal_;
  void* const data_;
  const int64_t bytes_;
};

template <class Call>
void SetInputs(absl::Span<const ConstView> in, Call& call) {
  call.inputs = static_cast<int>(in.size());
  for (size_t i = 0; i < in.size(); ++i) call.in[i] = in[i].data;
  call.in_dtype = in[0].dtype;
  call.size = in[0].size;
}

class CudaBackend : public Backend {
 public:
  CudaBackend(const Plugin& plugin, int ordinal, Stream* stream, std::string description)
      : plugin_(plugin), ordinal_(ordinal), stream_(stream), description_(std::move(description)) {}
  ~CudaBackend() override { plugin_.close(stream_); }

  std::string name() const override { return absl::StrCat("cuda:", ordinal_); }
  std::string description() const override { return description_; }
  bool host_memory() const override { return false; }

  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t bytes) override {
    void* data = nullptr;
    RETURN_IF_ERROR(Status(plugin_.allocate(ordinal_, bytes, &data),
                           absl::StrCat("cannot allocate ", bytes, " bytes of device memory")));
    return std::make_unique<CudaBuffer>(plugin_.release, ordinal_, data, bytes);
  }
  absl::StatusOr<std::unique_ptr<Buffer>> AllocateHost(int64_t bytes) override {
    void* data = nullptr;
    RETURN_IF_ERROR(Status(plugin_.allocate_host(ordinal_, bytes, &data),
                           absl::StrCat("cannot allocate ", bytes, " bytes of pinned memory")));
    return std::make_unique<CudaBuffer>(plugin_.release_host, ordinal_, data, bytes);
  }
  absl::Status Upload(const void* host, void* device, int64_t bytes) override {
    return Status(plugin_.upload(stream_, host, device, bytes), "upload");
  }
  absl::Status Download(const void* device, void* host, int64_t bytes) override {
    return Status(plugin_.download(stream_, device, host, bytes), "download");
  }
  absl::Status Copy(const void* from, void* to, int64_t bytes) override {
    return Status(plugin_.copy(stream_, from, to, bytes), "copy");
  }
  absl::Status Synchronize() override {
    return Status(plugin_.synchronize(stream_), "a kernel or copy failed");
  }

  absl::Status Map(const MapOp& op, absl::Span<const ConstView> in, View out,
                   int64_t first) override {
    RETURN_IF_ERROR(CheckMap(op, in, out, first));
    MapCall call = {.op = static_cast<int>(op.index()), .op_data = OpAddress(op)};
    SetInputs(in, call);
    call.out = out.data;
    call.out_dtype = out.dtype;
    call.first = first;
    return Status(plugin_.map(stream_, &call), "map");
  }

  absl::StatusOr<std::vector<double>> ReduceBlocks(const ReduceOp& op,
                                                   absl::Span<const ConstView> in, int64_t first,
                                                   int64_t block) override {
    RETURN_IF_ERROR(CheckReduce(op, in, first, block));
    return Reduced(op, in, first, block, /*by_columns=*/false);
  }

  absl::StatusOr<std::vector<double>> ReduceColumns(const ReduceOp& op,
                                                    absl::Span<const ConstView> in, int64_t first,
                                                    int64_t columns) override {
    RETURN_IF_ERROR(CheckReduceColumns(op, in, first, columns));
    return Reduced(op, in, first, columns, /*by_columns=*/true);
  }

  absl::Status Histogram(const MagnitudeOp& op, absl::Span<const ConstView> in, int64_t first,
                         RadixLevel level, absl::Span<uint64_t> bins) override {
    RETURN_IF_ERROR(CheckHistogram(op, in, first, level, bins));
    HistogramCall call = {.op = static_cast<int>(op.index()), .op_data = OpAddress(op)};
    SetInputs(in, call);
    call.first = first;
    call.level = level.level;
    call.prefix = level.prefix;
    call.bins = bins.data();
    return Status(plugin_.histogram(stream_, &call), "histogram");
  }

  absl::StatusOr<SiftCounts> Sift(const MagnitudeOp& op, absl::Span<const ConstView> in,
                                  int64_t first, const SiftWindow& window,
                                  absl::Span<SiftCandidate> candidates) override {
    RETURN_IF_ERROR(CheckSift(op, in, first, candidates));
    SiftCall call = {.op = static_cast<int>(op.index()), .op_data = OpAddress(op)};
    SetInputs(in, call);
    call.first = first;
    call.window = window;
    call.candidates = candidates.data();
    RETURN_IF_ERROR(Status(plugin_.sift(stream_, &call), "sift"));
    return call.counts;
  }

  absl::StatusOr<LinearAlgebra*> linear_algebra() override {
    if (linear_algebra_ == nullptr) {
      RETURN_IF_ERROR(Status(plugin_.open_linear_algebra(stream_), "dense linear algebra"));
      linear_algebra_ = MakeLinearAlgebra(plugin_, ordinal_, stream_, name());
    }
    return linear_algebra_.get();
  }

  absl::StatusOr<Network*> network() override {
    if (network_ == nullptr) {
      RETURN_IF_ERROR(Status(plugin_.open_linear_algebra(stream_), "a forward pass"));
      network_ = MakeNetwork(plugin_, stream_, name());
    }
    return network_.get();
  }

 private:
  absl::StatusOr<std::vector<double>> Reduced(const ReduceOp& op, absl::Span<const ConstView> in,
                                              int64_t first, int64_t block, bool by_columns) {
    ReduceCall call = {.op = static_cast<int>(op.index()), .op_data = OpAddress(op)};
    SetInputs(in, call);
    call.first = first;
    call.block = block;
    call.blocks = BlocksTouched(first, call.size, block);
    call.terms = Terms(op);
    call.by_columns = by_columns;
    std::vector<double> sums((by_columns ? block : call.blocks) * call.terms);
    call.sums = sums.data();
    RETURN_IF_ERROR(Status(plugin_.reduce(stream_, &call), "reduce"));
    return sums;
  }

  absl::Status Status(int error, absl::string_view doing) const {
    return Annotate(ToStatus(plugin_, error, doing), name());
  }

  const Plugin& plugin_;
  const int ordinal_;
  Stream* const stream_;
  const std::string description_;
  std::unique_ptr<LinearAlgebra> linear_algebra_;
  std::unique_ptr<Network> network_;
};

}  // namespace

absl::StatusOr<int> DeviceCount() {
  RETURN_IF_ERROR(ThePlugin().status());
  const Plugin& plugin = **ThePlugin();
  int count = 0;
  if (const int error = plugin.device_count(&count); error != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no usable GPU or driver: ", plugin.describe(error)));
  }
  return count;
}

absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(int ordinal) {
  RETURN_IF_ERROR(ThePlugin().status());
  const Plugin& plugin = **ThePlugin();
  const std::string name = absl::StrCat("cuda:", ordinal);
  char description[256] = {};
  Stream* stream = nullptr;
  RETURN_IF_ERROR(
      ToStatus(plugin, plugin.device_name(ordinal, description, sizeof(description)), name));
  RETURN_IF_ERROR(ToStatus(plugin, plugin.open(ordinal, &stream), name));
  return std::make_unique<CudaBackend>(plugin, ordinal, stream, description);
}

}  // namespace pewter::kernels::cuda
