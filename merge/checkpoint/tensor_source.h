// TensorSource: ranged reads of one tensor into caller-owned memory.
//
// A stored tensor, or a view of one: cast to another dtype, with a LoRA added. Views compose and
// every merge method works with every view. Sources are immutable and may be read from any thread;
// an element's bits do not depend on the range it is read with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "base/shape.h"

namespace pewter {

// Is told of every byte that is read from a stored file, in any order, possibly from several
// threads at once. What is read twice is told twice.
class ReadObserver {
 public:
  virtual ~ReadObserver() = default;
  // `bytes` lie at `offset` of file `file` (an index into the plan's input files).
  virtual void OnRead(int file, int64_t offset, absl::Span<const std::byte> bytes) = 0;
};

class TensorSource;

// A product that a view adds to the tensor under it: scale L R, with L [rows, rank] and R [rank,
// columns]. Factors are stored as they are: of a transposed product as L^T and R^T.
struct LowRankUpdate {
  std::shared_ptr<const TensorSource> left, right;  // F32
  int64_t rank = 0;
  double scale = 1;
  bool transposed = false;
};

// What ObjectStore::WillRead has given.
using ReadIntents = std::vector<std::shared_ptr<void>>;

class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual DType dtype() const = 0;
  virtual const Shape& shape() const = 0;
  // "model ./a, tensor x.weight": for messages.
  virtual const std::string& name() const = 0;
  // Elements [first, first + count) in row-major order into `out` (count * ByteWidth(dtype())
  // bytes). `observer` may be null.
  virtual absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                            ReadObserver* observer) const = 0;
  // A hint: all of it will be read soon. As long as what is added to `intents` lives, and the
  // source with it, a distant store fetches ahead.
  virtual void WillRead(ReadIntents& intents) const {}
  // Host bytes that reading the view takes besides `out` and small scratch (LoRA factors). They are
  // shared by concurrent reads and freed soon after the last one.
  virtual int64_t resident_bytes() const { return 0; }
  // What makes the view of the tensor that its model stores, where that is a product alone and its
  // dtype; else null. The view's own elements are rounded to the stored dtype, the product is not.
  virtual const LowRankUpdate* update() const { return nullptr; }
};

}  // namespace pewter
