#include "kernels/cpu/cpu_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "kernels/arguments.h"
#include "kernels/cpu/linear_algebra.h"
#include "kernels/cpu/network.h"
#include "kernels/thread_pool.h"

namespace pewter::kernels::cpu {
namespace {

// Elements that one thread takes at a time: a few times the cost of handing them out.
constexpr int64_t kPiece = kReduceBlock;
// Writing past the caches saves reading the output's lines first, but a result that somebody is
// about to read should stay in the cache: only what is far larger than it goes past.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

class HostBuffer : public Buffer {
 public:
  static absl::StatusOr<std::unique_ptr<Buffer>> Make(int64_t bytes) {
    // Large buffers are aligned for huge pages: fewer faults and TLB misses.
    constexpr int64_t kHugePage = int64_t{2} << 20;
    const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
    void* data = nullptr;
    if (bytes < 0 || posix_memalign(&data, alignment, std::max<int64_t>(bytes, 1)) != 0) {
      return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes"));
    }
    if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // a hint; it may fail
    return std::unique_ptr<Buffer>(new HostBuffer(data, bytes));
  }
  ~HostBuffer() override { std::free(data_); }

  void* data() override { return data_; }
  int64_t bytes() const override { return bytes_; }

 private:
  HostBuffer(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}

  void* data_;
  int64_t bytes_;
};

std::string ProcessorName() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    absl::string_view text = line;
    if (!absl::ConsumePrefix(&text, "model name")) continue;
    const size_t colon = text.find(':');
    if (colon != text.npos) return std::string(absl::StripAsciiWhitespace(text.substr(colon + 1)));
  }
  return "CPU";
}

// `args.in[i]` are the views from element `offset` on.
template <class Args>
void SetInputs(absl::Span<const ConstView> in, int64_t offset, Args& args) {
  for (size_t i = 0; i < in.size(); ++i) {
    args.in[i] = static_cast<const char*>(in[i].data) + offset * ByteWidth(in[i].dtype);
  }
  args.in_dtype = in[0].dtype;
}

// Those of the same instruction set.
const NetworkKernels& NetworkKernelsBeside(const KernelTable& table) {
#if defined(__x86_64__)
  if (&table == &kAvx512Kernels) return network::kAvx512Kernels;
  if (&table == &kAvx2Kernels) return network::kAvx2Kernels;
#endif
  return network::kBaselineKernels;
}

class CpuBackend : public Backend {
 public:
  CpuBackend(const KernelTable& table, std::shared_ptr<ThreadPool> pool)
      : table_(table), pool_(std::move(pool)) {}

  std::string name() const override { return "cpu"; }
  std::string description() const override {
    return absl::StrCat(ProcessorName(), " (", table_.isa, "), ", pool_->threads(),
                        pool_->threads() == 1 ? " thread" : " threads");
  }
  bool host_memory() const override { return true; }

  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t bytes) override {
    return HostBuffer::Make(bytes);
  }
  absl::StatusOr<std::unique_ptr<Buffer>> AllocateHost(int64_t bytes) override {
    return HostBuffer::Make(bytes);
  }
  absl::Status Upload(const void* host, void* device, int64_t bytes) override {
    return Copy(host, device, bytes);
  }
  absl::Status Download(const void* device, void* host, int64_t bytes) override {
    return Copy(device, host, bytes);
  }
  absl::Status Copy(const void* from, void* to, int64_t bytes) override {
    if (from == to) return absl::OkStatus();
    constexpr int64_t kLeast = int64_t{1} << 20;  // what is worth another thread
    const int64_t piece = std::max(kLeast, bytes / pool_->threads() / 64 * 64 + 64);
    pool_->ForEach((bytes + piece - 1) / piece, [&](int64_t item, int) {
      const int64_t at = item * piece;
      std::memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at,
                  std::min(piece, bytes - at));
    });
    return absl::OkStatus();
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

  absl::Status Map(const MapOp& op, absl::Span<const ConstView> in, View out,
                   int64_t first) override {
    RETURN_IF_ERROR(CheckMap(op, in, out, first));
    const bool stream = out.size * ByteWidth(out.dtype) >= kStreamBytes;
    const void* erased = OpAddress(op);
    ForEachPiece(out.size, kPiece, [&](int64_t at, int64_t size, int) {
      MapArgs args = {};
      SetInputs(in, at, args);
      args.out = static_cast<char*>(out.data) + at * ByteWidth(out.dtype);
      args.out_dtype = out.dtype;
      args.first = first + at;
      args.size = size;
      args.stream = stream;
      table_.map[op.index()](erased, args);
    });
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<double>> ReduceBlocks(const ReduceOp& op,
                                                   absl::Span<const ConstView> in, int64_t first,
                                                   int64_t block) override {
    RETURN_IF_ERROR(CheckReduce(op, in, first, block));
    const int64_t size = in[0].size;
    const int64_t first_block = first / block;
    const int64_t blocks = BlocksTouched(first, size, block);
    const int terms = Terms(op);
    std::vector<double> sums(blocks * terms);
    const void* erased = OpAddress(op);
    // Small blocks are handed out several at a time.
    const int64_t together = std::max<int64_t>(1, kPiece / block);
    ForEachPiece(blocks, together, [&](int64_t at, int64_t count, int) {
      for (int64_t b = at; b < at + count; ++b) {
        const int64_t begin = std::max(first, (first_block + b) * block);
        const int64_t end = std::min(first + size, (first_block + b + 1) * block);
        ReduceArgs args = {};
        SetInputs(in, begin - first, args);
        args.first = begin;
        args.size = end - begin;
        args.sums = sums.data() + b * terms;
        table_.reduce[op.index()](erased, args);
      }
    });
    return sums;
  }

  absl::StatusOr<std::vector<double>> ReduceColumns(const ReduceOp& op,
                                                    absl::Span<const ConstView> in, int64_t first,
                                                    int64_t columns) override {
    RETURN_IF_ERROR(CheckReduceColumns(op, in, first, columns));
    std::vector<double> sums(columns * Terms(op));
    const void* erased = OpAddress(op);
    constexpr int64_t kColumns = 1024;  // whose sums stay in the cache
    ForEachPiece(columns, kColumns, [&](int64_t begin, int64_t count, int) {
      for (int64_t end = begin + count; begin < end; begin += kColumns) {
        ReduceColumnsArgs args = {};
        SetInputs(in, 0, args);
        args.first = first;
        args.rows = in[0].size / columns;
        args.columns = columns;
        args.begin = begin;
        args.end = std::min(begin + kColumns, end);
        args.sums = sums.data();
        table_.reduce_columns[op.index()](erased, args);
      }
    });
    return sums;
  }

  absl::Status Histogram(const MagnitudeOp& op, absl::Span<const ConstView> in, int64_t first,
                         RadixLevel level, absl::Span<uint64_t> bins) override {
    RETURN_IF_ERROR(CheckHistogram(op, in, first, level, bins));
    const int64_t size = in[0].size;
    const void* erased = OpAddress(op);
    const auto count = [&](int64_t at, int64_t length, uint64_t* into) {
      HistogramArgs args = {};
      SetInputs(in, at, args);
      args.first = first + at;
      args.size = length;
      args.level = level.level;
      args.prefix = level.prefix;
      args.bins = into;
      table_.histogram[op.index()](erased, args);
    };
    // Other threads' bins cost a pass over them in the end, so they must have enough to do.
    constexpr int64_t kWorthBins = 16 * kRadixBins;
    const int64_t threads = std::min<int64_t>(pool_->threads(), size / kWorthBins);
    if (threads <= 1) {
      count(0, size, bins.data());
      return absl::OkStatus();
    }
    std::vector<std::vector<uint64_t>> others(threads - 1);
    const int64_t part = (size + threads - 1) / threads;
    pool_->ForEach(threads, [&](int64_t item, int) {
      if (item > 0) others[item - 1].resize(kRadixBins);
      count(item * part, std::min(part, size - item * part),
            item == 0 ? bins.data() : others[item - 1].data());
    });
    for (const std::vector<uint64_t>& other : others) {
      for (int bin = 0; bin < kRadixBins; ++bin) bins[bin] += other[bin];
    }
    return absl::OkStatus();
  }

  absl::StatusOr<SiftCounts> Sift(const MagnitudeOp& op, absl::Span<const ConstView> in,
                                  int64_t first, const SiftWindow& window,
                                  absl::Span<SiftCandidate> candidates) override {
    RETURN_IF_ERROR(CheckSift(op, in, first, candidates));
    const void* erased = OpAddress(op);
    // Each piece leaves its candidates where they have room whatever the others find.
    std::vector<SiftCounts> pieces((in[0].size + kPiece - 1) / kPiece);
    ForEachPiece(in[0].size, kPiece, [&](int64_t at, int64_t size, int) {
      SiftArgs args = {};
      SetInputs(in, at, args);
      args.first = first + at;
      args.size = size;
      args.in_views = static_cast<uint32_t>(at);
      args.window = window;
      args.candidates = candidates.data() + at;
      pieces[at / kPiece] = table_.sift[op.index()](erased, args);
    });
    SiftCounts total;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const SiftCandidate* found = candidates.data() + i * kPiece;
      std::copy(found, found + pieces[i].candidates, candidates.data() + total.candidates);
      total.above += pieces[i].above;
      total.common += pieces[i].common;
      total.candidates += pieces[i].candidates;
    }
    return total;
  }

  absl::StatusOr<LinearAlgebra*> linear_algebra() override {
    if (linear_algebra_ == nullptr) linear_algebra_ = MakeLinearAlgebra(*pool_);
    return linear_algebra_.get();
  }

  absl::StatusOr<Network*> network() override {
    if (network_ == nullptr) network_ = MakeNetwork(NetworkKernelsBeside(table_), *pool_);
    return network_.get();
  }

 private:
  // fn(first element, elements, thread), on all threads when there are several pieces.
  template <class F>
  void ForEachPiece(int64_t size, int64_t piece, const F& fn) {
    if (pool_->threads() == 1) {
      if (size > 0) fn(0, size, 0);
      return;
    }
    pool_->ForEach((size + piece - 1) / piece, [&](int64_t item, int thread) {
      fn(item * piece, std::min(piece, size - item * piece), thread);
    });
  }

  const KernelTable& table_;
  const std::shared_ptr<ThreadPool> pool_;
  std::unique_ptr<LinearAlgebra> linear_algebra_;
  std::unique_ptr<Network> network_;
};

}  // namespace

absl::Span<const KernelTable* const> Tables() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> runnable;
#if defined(__x86_64__)
    // x86-64-v3 and v4 by the features that the kernels use: clang does not know the levels' names.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) runnable.push_back(&kAvx512Kernels);
    if (v3) runnable.push_back(&kAvx2Kernels);
#endif
    runnable.push_back(&kBaselineKernels);
    return runnable;
  }();
  return tables;
}

std::unique_ptr<Backend> MakeBackend(const KernelTable& table, int threads) {
  return MakeBackend(table, std::make_shared<ThreadPool>(threads));
}
std::unique_ptr<Backend> MakeBackend(const KernelTable& table, std::shared_ptr<ThreadPool> pool) {
  return std::make_unique<CpuBackend>(table, std::move(pool));
}

}  // namespace pewter::kernels::cpu

namespace pewter::kernels {

bool FindNonFinite(ConstView view, int64_t* at) {
  *at = cpu::Tables()[0]->find_non_finite(view.data, view.dtype, view.size);
  return *at >= 0;
}

void Convert(ConstView in, View out) {
  if (in.dtype == out.dtype) {
    std::memmove(out.data, in.data, out.size * ByteWidth(out.dtype));
    return;
  }
  cpu::Tables()[0]->convert(in.data, in.dtype, out.data, out.dtype, out.size);
}

}  // namespace pewter::kernels
