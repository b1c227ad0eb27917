// Pickle: the part of Python's pickle machine that torch.save's pickles need, and no more.
//
// A pickle is a program: Python's machine lets it name and call any function. This one calls
// nothing. The names that tensors are made of (a table in pickle.cc) stand for values that are
// built here; any other name, and any opcode that torch.save does not write, is an error when it is
// met. Protocols 2 to 5. There is no recursion; the numbers of opcodes, values, containers and memo
// entries are bounded, and text is not copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/dtype.h"

namespace pewter {

// A handle into the Pickle that it came from.
struct PickleValue {
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInt,     // that fits int64
    kOpaque,  // a number or bytes whose value nothing needs
    kText,
    kTuple,
    kList,  // sets too
    kDict,
    kName,  // of a function or type of the table
    kStorage,
    kTensor,
  };
  Kind kind = Kind::kNone;
  uint32_t size = 0;   // of text
  int64_t number = 0;  // the value of a bool or int; else a place in the Pickle's tables
};

// Storage KEY: its bytes lie elsewhere in the file.
struct PickledStorage {
  PickleValue key;           // text
  DType dtype = DType::kU8;  // kU8 also for one without a type
  int64_t elements = 0;      // of `dtype`
};

// A view of a storage as the pickle states it: nothing about it is checked but the kinds.
struct PickledTensor {
  PickledStorage storage;
  DType dtype = DType::kF32;
  int64_t offset = 0;   // elements of `dtype`
  PickleValue shape;    // tuple of ints
  PickleValue strides;  // tuple of ints, in elements
};

class Pickle {
 public:
  static constexpr int64_t kMaxBytes = int64_t{64} << 20;

  // Decodes the pickle that `bytes` begins with. `bytes` must outlive the result. OutOfRange when
  // it goes on after the end of `bytes`, DataLoss when it is malformed, FailedPrecondition for what
  // is refused.
  static absl::StatusOr<Pickle> Parse(absl::string_view bytes);

  // Bytes of the pickle.
  size_t size() const { return size_; }
  const PickleValue& root() const { return root_; }
  absl::string_view Text(PickleValue value) const {
    return bytes_.substr(value.number, value.size);
  }
  // Of a tuple or list; of a dict, each key followed by its value.
  absl::Span<const PickleValue> Items(PickleValue value) const { return containers_[value.number]; }
  // All that it names.
  absl::Span<const PickledStorage> storages() const { return storages_; }
  const PickledTensor& Tensor(PickleValue value) const { return tensors_[value.number]; }

 private:
  friend class PickleMachine;

  absl::string_view bytes_;
  size_t size_ = 0;
  PickleValue root_;
  std::vector<std::vector<PickleValue>> containers_;
  std::vector<PickledStorage> storages_;
  std::vector<PickledTensor> tensors_;
};

}  // namespace pewter
