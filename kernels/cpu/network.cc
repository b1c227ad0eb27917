#include "kernels/cpu/network.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "base/status.h"
#include "kernels/cpu/blas.h"
#include "kernels/network_arguments.h"

namespace pewter::kernels::cpu {
namespace {

// Pieces of work. They decide how sums are cut, so none depends on the number of threads.
constexpr int64_t kLinearRows = 512, kLinearColumns = 1024;
constexpr int64_t kGramSide = 512;
constexpr int64_t kQueryRows = 128;
constexpr int64_t kElementwise = int64_t{1} << 15;  // elements
constexpr int64_t kMomentColumns = 512, kMomentRows = 128;

int64_t Pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
blasint Int(int64_t value) { return static_cast<blasint>(value); }
blasint Stride(const ConstFloats& m) { return Int(std::max<int64_t>(m.stride, 1)); }

class CpuNetwork : public Network {
 public:
  CpuNetwork(const NetworkKernels& kernels, ThreadPool& pool) : kernels_(kernels), pool_(pool) {
    UseOneThread();
  }

  absl::Status Linear(const LinearCall& call) override {
    RETURN_IF_ERROR(CheckLinear(call));
    const Floats& y = call.y;
    // Few rows are cut finer along the columns, so that threads find work.
    const int64_t wide = y.rows < kLinearRows ? kLinearColumns / 4 : kLinearColumns;
    const int64_t across = Pieces(y.columns, wide);
    const bool transpose = call.transpose_w == Transpose::kYes;
    pool_.ForEach(Pieces(y.rows, kLinearRows) * across, [&](int64_t item, int) {
      const int64_t i = item / across * kLinearRows, j = item % across * wide;
      const int64_t rows = std::min(kLinearRows, y.rows - i);
      const int64_t columns = std::min(wide, y.columns - j);
      float* const to = y.data + i * y.stride + j;
      {
        const LibraryCall turn;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, transpose ? CblasTrans : CblasNoTrans, Int(rows),
                    Int(columns), Int(call.x.columns), 1, call.x.data + i * call.x.stride,
                    Stride(call.x), call.w.data + (transpose ? j * call.w.stride : j),
                    Stride(call.w), call.add ? 1 : 0, to, Stride(y));
      }
      if (call.bias == nullptr && call.activation == Activation::kNone) return;
      kernels_.finish(to, rows, columns, y.stride, call.bias == nullptr ? nullptr : call.bias + j,
                      call.activation);
    });
    return absl::OkStatus();
  }

  absl::Status Gate(Activation activation, const ConstFloats& up, const Floats& gate) override {
    RETURN_IF_ERROR(CheckGate(up, gate));
    ForRows(gate, [&](int64_t row) {
      kernels_.gate(gate.data + row * gate.stride, up.data + row * up.stride, gate.columns,
                    activation);
    });
    return absl::OkStatus();
  }

  absl::Status Normalize(const NormCall& call) override {
    RETURN_IF_ERROR(CheckNorm(call));
    ForRows(call.x, [&](int64_t row) {
      kernels_.normalize(call.x.data + row * call.x.stride, call.x.columns, call.centre,
                         call.epsilon, call.weight, call.bias, call.y.data + row * call.y.stride);
    });
    return absl::OkStatus();
  }

  absl::Status Rotate(const RotateCall& call) override {
    RETURN_IF_ERROR(CheckRotate(call));
    ForRows(call.x, [&](int64_t row) {
      const int64_t at = int64_t{call.positions[row]} * call.pairs;
      kernels_.rotate(call.x.data + row * call.x.stride, call.x.columns / call.head, call.head,
                      call.pairs, call.cos + at, call.sin + at);
    });
    return absl::OkStatus();
  }

  absl::Status Attention(const AttentionCall& call) override {
    RETURN_IF_ERROR(CheckAttention(call));
    struct Block {
      int64_t begin, end;  // the sequence
      int64_t first;       // of its queries
    };
    std::vector<Block> blocks;
    int64_t longest = 0;
    for (size_t s = 0; s + 1 < call.starts.size(); ++s) {
      const int64_t begin = call.starts[s], end = call.starts[s + 1];
      longest = std::max(longest, end - begin);
      for (int64_t first = begin; first < end; first += kQueryRows) {
        blocks.push_back({begin, end, first});
      }
    }
    std::vector<std::unique_ptr<float[]>> scratch(pool_.threads());
    pool_.ForEach(static_cast<int64_t>(blocks.size()) * call.heads, [&](int64_t item, int thread) {
      std::unique_ptr<float[]>& scores = scratch[thread];
      if (scores == nullptr) {
        scores = std::make_unique_for_overwrite<float[]>(std::min(kQueryRows, longest) * longest);
      }
      const Block& block = blocks[item / call.heads];
      AttendBlock(call, block.begin, block.end, block.first, item % call.heads, scores.get());
    });
    return absl::OkStatus();
  }

  absl::Status Gather(const ConstFloats& x, const int32_t* rows, const Floats& y) override {
    RETURN_IF_ERROR(CheckGather(x, y));
    ForRows(y, [&](int64_t row) {
      std::copy_n(x.data + rows[row] * x.stride, x.columns, y.data + row * y.stride);
    });
    return absl::OkStatus();
  }

  absl::Status Predict(const ConstFloats& logits, int64_t first, const int32_t* labels,
                       Prediction* predictions) override {
    RETURN_IF_ERROR(CheckPredict(logits, first));
    ForRows(logits, [&](int64_t row) {
      const float* const values = logits.data + row * logits.stride;
      Prediction& prediction = predictions[row];
      kernels_.predict(values, logits.columns, first, &prediction.sum, &prediction.largest,
                       &prediction.best);
      const int64_t label = labels[row] - first;
      if (label >= 0 && label < logits.columns) prediction.label = values[label];
    });
    return absl::OkStatus();
  }

  absl::Status Subtract(const ConstFloats& x, const float* row, const Floats& y) override {
    RETURN_IF_ERROR(CheckSubtract(x, y));
    ForRows(x, [&](int64_t i) {
      kernels_.subtract(x.data + i * x.stride, row, x.columns, y.data + i * y.stride);
    });
    return absl::OkStatus();
  }

  absl::Status AddMoments(const ConstFloats& x, double* sums, double* squares) override {
    RETURN_IF_ERROR(CheckMoments(x));
    pool_.ForEach(Pieces(x.columns, kMomentColumns), [&](int64_t item, int) {
      const int64_t j = item * kMomentColumns, columns = std::min(kMomentColumns, x.columns - j);
      for (int64_t i = 0; i < x.rows; i += kMomentRows) {
        kernels_.add_moments(x.data + i * x.stride + j, std::min(kMomentRows, x.rows - i), columns,
                             x.stride, sums + j, squares + j);
      }
    });
    return absl::OkStatus();
  }

  absl::Status AddGram(const ConstFloats& a, const ConstFloats& b, double* gram) override {
    RETURN_IF_ERROR(CheckAddGram(a, b));
    if (a.rows == 0) return absl::OkStatus();
    const bool lower_only = SameFeatures(a, b);
    const int64_t across = Pieces(b.columns, kGramSide);
    std::vector<std::unique_ptr<float[]>> scratch(pool_.threads());
    pool_.ForEach(Pieces(a.columns, kGramSide) * across, [&](int64_t item, int thread) {
      const int64_t i = item / across * kGramSide, j = item % across * kGramSide;
      if (lower_only && j > i) return;
      const int64_t rows = std::min(kGramSide, a.columns - i);
      const int64_t columns = std::min(kGramSide, b.columns - j);
      std::unique_ptr<float[]>& product = scratch[thread];
      if (product == nullptr) {
        product = std::make_unique_for_overwrite<float[]>(kGramSide * kGramSide);
      }
      {
        const LibraryCall turn;
        if (lower_only && i == j) {
          cblas_ssyrk(CblasRowMajor, CblasLower, CblasTrans, Int(rows), Int(a.rows), 1, a.data + i,
                      Stride(a), 0, product.get(), Int(columns));
        } else {
          cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(rows), Int(columns), Int(a.rows),
                      1, a.data + i, Stride(a), b.data + j, Stride(b), 0, product.get(),
                      Int(columns));
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        kernels_.add(product.get() + row * columns, lower_only && i == j ? row + 1 : columns,
                     gram + (i + row) * b.columns + j);
      }
    });
    return absl::OkStatus();
  }

 private:
  // fn(row) for every row of what is `shaped` so.
  template <class F>
  void ForRows(const ConstFloats& shaped, const F& fn) {
    const int64_t together =
        std::max<int64_t>(1, kElementwise / std::max<int64_t>(1, shaped.columns));
    pool_.ForEach(Pieces(shaped.rows, together), [&](int64_t item, int) {
      const int64_t end = std::min(shaped.rows, (item + 1) * together);
      for (int64_t row = item * together; row < end; ++row) fn(row);
    });
  }

  // Queries [first, first + kQueryRows) of one head in the sequence [begin, end).
  void AttendBlock(const AttentionCall& call, int64_t begin, int64_t end, int64_t first,
                   int64_t head, float* scores) const {
    const int64_t rows = std::min(kQueryRows, end - first);
    const int64_t keys = (call.causal ? first + rows : end) - begin;
    const int64_t key_head = head / (call.heads / call.key_heads);
    const float* const q = call.q.data + first * call.q.stride + head * call.head;
    const float* const k = call.k.data + begin * call.k.stride + key_head * call.head;
    const float* const v = call.v.data + begin * call.v.stride + key_head * call.head;
    {
      const LibraryCall turn;
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rows), Int(keys), Int(call.head),
                  call.scale, q, Stride(call.q), k, Stride(call.k), 0, scores, Int(keys));
    }
    const int32_t* const positions =
        call.positions == nullptr ? nullptr : call.positions + begin;  // of the keys
    for (int64_t row = 0; row < rows; ++row) {
      float* const values = scores + row * keys;
      const int64_t query = first + row - begin;
      int64_t from = 0, to = call.causal ? query + 1 : keys;
      if (call.window > 0) {
        const int64_t at = positions[query];
        from = std::upper_bound(positions, positions + to, at - call.window) - positions;
        to = std::lower_bound(positions + from, positions + to, at + call.window) - positions;
      }
      if (call.bias != nullptr) {
        const float* const bias =
            call.bias + head * (2 * call.distances - 1) + call.distances - 1 - positions[query];
        for (int64_t key = from; key < to; ++key) values[key] += bias[positions[key]];
      }
      kernels_.softmax(values, from, to, keys);
    }
    const LibraryCall turn;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(rows), Int(call.head), Int(keys), 1,
                scores, Int(keys), v, Stride(call.v), 0,
                call.out.data + first * call.out.stride + head * call.head, Stride(call.out));
  }

  const NetworkKernels& kernels_;
  ThreadPool& pool_;
};

}  // namespace

std::unique_ptr<Network> MakeNetwork(const NetworkKernels& kernels, ThreadPool& pool) {
  return std::make_unique<CpuNetwork>(kernels, pool);
}

}  // namespace pewter::kernels::cpu
