#include "merge/checkpoint/pickle.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/status.h"

namespace pewter {
namespace {

using Kind = PickleValue::Kind;

// A tensor takes some 30 opcodes and values, and 7 containers.
constexpr int64_t kMaxOpcodes = int64_t{1} << 25;
constexpr size_t kMaxValues = size_t{1} << 23;
constexpr size_t kMaxContainers = size_t{1} << 22;
constexpr size_t kMaxMemo = size_t{1} << 22;
constexpr size_t kMaxMarks = 1000;

// https://docs.python.org/3/library/pickletools.html
enum Opcode : uint8_t {
  kMark = '(',
  kStop = '.',
  kReduce = 'R',
  kBuild = 'b',
  kGlobal = 'c',
  kBinPersId = 'Q',
  kNone = 'N',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kBinFloat = 'G',
  kBinString = 'T',
  kShortBinString = 'U',
  kBinUnicode = 'X',
  kBinBytes = 'B',
  kShortBinBytes = 'C',
  kEmptyTuple = ')',
  kTuple = 't',
  kEmptyList = ']',
  kAppend = 'a',
  kAppends = 'e',
  kEmptyDict = '}',
  kSetItem = 's',
  kSetItems = 'u',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
  kLong4 = 0x8b,
  kShortBinUnicode = 0x8c,
  kBinUnicode8 = 0x8d,
  kBinBytes8 = 0x8e,
  kEmptySet = 0x8f,
  kAddItems = 0x90,
  kFrozenSet = 0x91,
  kStackGlobal = 0x93,
  kMemoize = 0x94,
  kFrame = 0x95,
  kByteArray8 = 0x96,
};

// What makes a pickle do more than state values. Any other unknown opcode has no name here.
constexpr std::pair<uint8_t, absl::string_view> kRefusedOpcodes[] = {
    {'i', "INST"},         {'o', "OBJ"},
    {'P', "PERSID"},       {0x81, "NEWOBJ"},
    {0x82, "EXT1"},        {0x83, "EXT2"},
    {0x84, "EXT4"},        {0x92, "NEWOBJ_EX"},
    {0x97, "NEXT_BUFFER"}, {0x98, "READONLY_BUFFER"},
};

// What the names stand for.
enum class Name : uint8_t {
  kOrderedDict,
  kSize,
  kTensorType,
  kDType,
  kTypedStorage,
  kUntypedStorage,
  kRebuildTensor,
  kRebuildTensorV2,
  kRebuildTensorV3,
  kRebuildParameter,
  kRebuildParameterWithState,
  kRebuildFromType,
};

struct KnownName {
  absl::string_view module;
  absl::string_view name;
  Name meaning;
  DType dtype = DType::kU8;
};

// All that a pickle may name, besides the element types (torch.float32, ...).
constexpr KnownName kNames[] = {
    {"collections", "OrderedDict", Name::kOrderedDict},
    {"torch", "Size", Name::kSize},
    {"torch", "Tensor", Name::kTensorType},
    {"torch.nn.parameter", "Parameter", Name::kTensorType},
    {"torch._utils", "_rebuild_tensor", Name::kRebuildTensor},
    {"torch._utils", "_rebuild_tensor_v2", Name::kRebuildTensorV2},
    {"torch._utils", "_rebuild_tensor_v3", Name::kRebuildTensorV3},
    {"torch._utils", "_rebuild_parameter", Name::kRebuildParameter},
    {"torch._utils", "_rebuild_parameter_with_state", Name::kRebuildParameterWithState},
    {"torch._tensor", "_rebuild_from_type_v2", Name::kRebuildFromType},
    {"torch.storage", "UntypedStorage", Name::kUntypedStorage},
    {"torch", "UntypedStorage", Name::kUntypedStorage},
    {"torch", "DoubleStorage", Name::kTypedStorage, DType::kF64},
    {"torch", "FloatStorage", Name::kTypedStorage, DType::kF32},
    {"torch", "HalfStorage", Name::kTypedStorage, DType::kF16},
    {"torch", "BFloat16Storage", Name::kTypedStorage, DType::kBF16},
    {"torch", "LongStorage", Name::kTypedStorage, DType::kI64},
    {"torch", "IntStorage", Name::kTypedStorage, DType::kI32},
    {"torch", "ShortStorage", Name::kTypedStorage, DType::kI16},
    {"torch", "CharStorage", Name::kTypedStorage, DType::kI8},
    {"torch", "ByteStorage", Name::kTypedStorage, DType::kU8},
    {"torch", "BoolStorage", Name::kTypedStorage, DType::kBool},
    {"torch", "ComplexFloatStorage", Name::kTypedStorage, DType::kC64},
};

// Any bytes, for a message.
std::string Shown(absl::string_view text) {
  constexpr size_t kLimit = 100;
  return absl::StrCat(absl::CHexEscape(text.substr(0, kLimit)), text.size() > kLimit ? "..." : "");
}

}  // namespace

class PickleMachine {
 public:
  explicit PickleMachine(absl::string_view bytes) { pickle_.bytes_ = bytes; }

  absl::StatusOr<Pickle> Run() {
    for (int64_t i = 0; i < kMaxOpcodes; ++i) {
      opcode_at_ = at_;
      ASSIGN_OR_RETURN(const uint64_t opcode, Number(1));
      if (i == 0 && opcode != kProto) return Malformed("it does not begin with PROTO");
      if (opcode == kStop) {
        if (stack_.size() != 1 || !marks_.empty()) return Malformed("STOP with a full stack");
        pickle_.root_ = stack_.back();
        pickle_.size_ = at_;
        return std::move(pickle_);
      }
      RETURN_IF_ERROR(Step(static_cast<uint8_t>(opcode)));
    }
    return TooMany("opcodes");
  }

 private:
  // --- errors ----------------------------------------------------------------------------------

  absl::Status Malformed(absl::string_view what) const {
    return absl::DataLossError(absl::StrCat("malformed pickle at byte ", opcode_at_, ": ", what));
  }
  absl::Status TooMany(absl::string_view what) const {
    return absl::FailedPreconditionError(
        absl::StrCat("its pickle has too many ", what, "; save it as safetensors"));
  }
  static absl::Status Refused(absl::string_view what) {
    return absl::FailedPreconditionError(
        absl::StrCat("refuses ", what,
                     ": only what tensors are made of is decoded, and nothing was run. If you "
                     "trust the file, load it in PyTorch and save its tensors as safetensors"));
  }

  // --- bytes -----------------------------------------------------------------------------------

  absl::StatusOr<absl::string_view> Take(uint64_t count) {
    const uint64_t left = pickle_.bytes_.size() - at_;
    if (count > left) {
      return absl::OutOfRangeError(absl::StrCat("the pickle wants ", count, " bytes at byte ", at_,
                                                ", where only ", left, " are left"));
    }
    const absl::string_view taken = pickle_.bytes_.substr(at_, count);
    at_ += count;
    return taken;
  }

  // Little endian.
  absl::StatusOr<uint64_t> Number(int bytes) {
    ASSIGN_OR_RETURN(const absl::string_view text, Take(bytes));
    uint64_t number = 0;
    for (int i = bytes - 1; i >= 0; --i) {
      number = number << 8 | static_cast<unsigned char>(text[i]);
    }
    return number;
  }

  absl::StatusOr<absl::string_view> Line() {
    const size_t end = pickle_.bytes_.find('\n', at_);
    if (end == absl::string_view::npos) {
      return absl::OutOfRangeError(absl::StrCat("the line at byte ", at_, " has no end"));
    }
    const absl::string_view line = pickle_.bytes_.substr(at_, end - at_);
    at_ = end + 1;
    return line;
  }

  // --- stack -----------------------------------------------------------------------------------

  absl::Status Push(PickleValue value) {
    if (++values_ > kMaxValues) return TooMany("values");
    stack_.push_back(value);
    return absl::OkStatus();
  }
  absl::Status Push(Kind kind, int64_t number) { return Push({.kind = kind, .number = number}); }

  absl::Status PushContainer(Kind kind, std::vector<PickleValue> items) {
    if (pickle_.containers_.size() >= kMaxContainers) return TooMany("containers");
    pickle_.containers_.push_back(std::move(items));
    return Push(kind, static_cast<int64_t>(pickle_.containers_.size()) - 1);
  }

  // Not below the mark.
  absl::StatusOr<PickleValue> Pop() {
    if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) return Malformed("empty stack");
    const PickleValue value = stack_.back();
    stack_.pop_back();
    return value;
  }

  absl::StatusOr<std::vector<PickleValue>> PopCount(size_t count) {
    if (stack_.size() < count + (marks_.empty() ? 0 : marks_.back())) {
      return Malformed("empty stack");
    }
    std::vector<PickleValue> values(stack_.end() - count, stack_.end());
    stack_.resize(stack_.size() - count);
    return values;
  }

  absl::StatusOr<std::vector<PickleValue>> PopToMark() {
    if (marks_.empty()) return Malformed("no mark");
    std::vector<PickleValue> values(stack_.begin() + marks_.back(), stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return values;
  }

  absl::StatusOr<std::vector<PickleValue>*> TopContainer(Kind kind) {
    if (stack_.size() <= (marks_.empty() ? 0 : marks_.back()) || stack_.back().kind != kind) {
      return Malformed("items for what does not take them");
    }
    return &pickle_.containers_[stack_.back().number];
  }

  absl::Status Extend(Kind kind, const std::vector<PickleValue>& items) {
    ASSIGN_OR_RETURN(std::vector<PickleValue>* const container, TopContainer(kind));
    if (kind == Kind::kDict && items.size() % 2 != 0) return Malformed("a key without a value");
    container->insert(container->end(), items.begin(), items.end());
    return absl::OkStatus();
  }

  absl::Status PushText(int length_bytes) {
    ASSIGN_OR_RETURN(const uint64_t size, Number(length_bytes));
    const size_t begin = at_;
    RETURN_IF_ERROR(Take(size).status());
    return Push({.kind = Kind::kText,
                 .size = static_cast<uint32_t>(size),
                 .number = static_cast<int64_t>(begin)});
  }

  absl::Status PushBytes(int length_bytes) {
    ASSIGN_OR_RETURN(const uint64_t size, Number(length_bytes));
    RETURN_IF_ERROR(Take(size).status());
    return Push(Kind::kOpaque, 0);
  }

  // Two's complement of any length.
  absl::Status PushLong(int length_bytes) {
    ASSIGN_OR_RETURN(const uint64_t size, Number(length_bytes));
    ASSIGN_OR_RETURN(const absl::string_view digits, Take(size));
    if (size > 8) return Push(Kind::kOpaque, 0);
    uint64_t number = 0;
    for (size_t i = 0; i < size; ++i) {
      number |= uint64_t{static_cast<unsigned char>(digits[i])} << (8 * i);
    }
    if (size > 0 && size < 8 && (digits.back() & 0x80) != 0) number |= ~uint64_t{0} << (8 * size);
    return Push(Kind::kInt, static_cast<int64_t>(number));
  }

  absl::Status Memoize(uint64_t index) {
    if (stack_.empty()) return Malformed("empty stack");
    if (memo_.size() >= kMaxMemo) return TooMany("memo entries");
    memo_[index] = stack_.back();
    return absl::OkStatus();
  }

  absl::Status Recall(uint64_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end()) return Malformed(absl::StrCat("there is no memo entry ", index));
    return Push(found->second);
  }

  // --- names and what they make ----------------------------------------------------------------

  absl::Status PushName(absl::string_view module, absl::string_view name) {
    const auto push = [&](Name meaning, DType dtype) {
      return Push({.kind = Kind::kName,
                   .size = static_cast<uint32_t>(dtype),
                   .number = static_cast<int64_t>(meaning)});
    };
    for (const KnownName& known : kNames) {
      if (known.module == module && known.name == name) return push(known.meaning, known.dtype);
    }
    if (module == "torch" && name.find('.') == absl::string_view::npos) {
      if (const auto dtype = DTypeFromTorch(name); dtype.ok()) return push(Name::kDType, *dtype);
    }
    return Refused(absl::StrCat("`", Shown(module), ".", Shown(name), "`"));
  }

  static bool Is(PickleValue value, Name name) {
    return value.kind == Kind::kName && value.number == static_cast<int64_t>(name);
  }

  // ("storage", type, key, location, elements[, None])
  absl::Status PushStorage(PickleValue id) {
    const auto malformed = [&] { return Malformed("a persistent id that is no storage's"); };
    if (id.kind != Kind::kTuple) return malformed();
    const absl::Span<const PickleValue> items = pickle_.Items(id);
    if (items.size() < 5 || items.size() > 6 || items[0].kind != Kind::kText ||
        pickle_.Text(items[0]) != "storage" || items[2].kind != Kind::kText ||
        items[4].kind != Kind::kInt || items[4].number < 0) {
      return malformed();
    }
    if (items.size() == 6 && items[5].kind != Kind::kNone) {
      return Refused("a storage that is a view of another");
    }
    if (!Is(items[1], Name::kTypedStorage) && !Is(items[1], Name::kUntypedStorage)) {
      return malformed();
    }
    pickle_.storages_.push_back(
        {.key = items[2], .dtype = static_cast<DType>(items[1].size), .elements = items[4].number});
    return Push(Kind::kStorage, static_cast<int64_t>(pickle_.storages_.size()) - 1);
  }

  bool IsTupleOfInts(PickleValue value) const {
    if (value.kind != Kind::kTuple) return false;
    const absl::Span<const PickleValue> items = pickle_.Items(value);
    return std::all_of(items.begin(), items.end(),
                       [](const PickleValue& item) { return item.kind == Kind::kInt; });
  }

  absl::Status PushTensor(Name function, absl::Span<const PickleValue> arguments) {
    struct Signature {
      size_t least, most;
    };
    const Signature signature = function == Name::kRebuildTensor     ? Signature{4, 4}
                                : function == Name::kRebuildTensorV2 ? Signature{6, 7}
                                                                     : Signature{7, 8};
    if (arguments.size() < signature.least || arguments.size() > signature.most ||
        arguments[0].kind != Kind::kStorage || arguments[1].kind != Kind::kInt ||
        !IsTupleOfInts(arguments[2]) || !IsTupleOfInts(arguments[3])) {
      return Malformed("bad arguments of a tensor");
    }
    PickledTensor tensor{.storage = pickle_.storages_[arguments[0].number],
                         .offset = arguments[1].number,
                         .shape = arguments[2],
                         .strides = arguments[3]};
    tensor.dtype = tensor.storage.dtype;
    if (function == Name::kRebuildTensorV3) {
      if (!Is(arguments[6], Name::kDType)) return Malformed("a tensor without an element type");
      tensor.dtype = static_cast<DType>(arguments[6].size);
    }
    // Metadata says that the values are to be negated or conjugated.
    if (function != Name::kRebuildTensor && arguments.size() == signature.most) {
      const PickleValue metadata = arguments.back();
      const bool none = metadata.kind == Kind::kNone;
      if (!none && !(metadata.kind == Kind::kDict && pickle_.Items(metadata).empty())) {
        return Refused("a tensor that is the negative or conjugate of its storage");
      }
    }
    pickle_.tensors_.push_back(tensor);
    return Push(Kind::kTensor, static_cast<int64_t>(pickle_.tensors_.size()) - 1);
  }

  absl::Status MakeOrderedDict(absl::Span<const PickleValue> arguments) {
    std::vector<PickleValue> entries;
    if (arguments.size() > 1) return Malformed("bad arguments of an OrderedDict");
    if (arguments.size() == 1) {  // a list of pairs, as Python 2 wrote it
      if (arguments[0].kind != Kind::kList) return Malformed("bad arguments of an OrderedDict");
      // The list can be in the memo and so be copied many times.
      values_ += 2 * pickle_.Items(arguments[0]).size();
      if (values_ > kMaxValues) return TooMany("values");
      for (const PickleValue& pair : pickle_.Items(arguments[0])) {
        if ((pair.kind != Kind::kList && pair.kind != Kind::kTuple) ||
            pickle_.Items(pair).size() != 2) {
          return Malformed("an entry of an OrderedDict that is no pair");
        }
        entries.insert(entries.end(), pickle_.Items(pair).begin(), pickle_.Items(pair).end());
      }
    }
    return PushContainer(Kind::kDict, std::move(entries));
  }

  absl::Status Reduce() {
    ASSIGN_OR_RETURN(const PickleValue packed, Pop());
    ASSIGN_OR_RETURN(const PickleValue function, Pop());
    if (packed.kind != Kind::kTuple || function.kind != Kind::kName) {
      return Malformed("REDUCE of what is no function");
    }
    return Call(static_cast<Name>(function.number), pickle_.Items(packed), /*of_type=*/false);
  }

  absl::Status Call(Name function, absl::Span<const PickleValue> arguments, bool of_type) {
    switch (function) {
      case Name::kRebuildTensor:
      case Name::kRebuildTensorV2:
      case Name::kRebuildTensorV3:
        return PushTensor(function, arguments);
      case Name::kRebuildParameter:
      case Name::kRebuildParameterWithState:
        // (tensor, requires_grad, hooks[, attributes])
        if (arguments.size() != (function == Name::kRebuildParameter ? 3 : 4) ||
            arguments[0].kind != Kind::kTensor) {
          return Malformed("bad arguments of a parameter");
        }
        return Push(arguments[0]);
      case Name::kRebuildFromType:
        // (function, type, arguments, attributes): a tensor with Python attributes
        if (of_type || arguments.size() != 4 || arguments[0].kind != Kind::kName ||
            !Is(arguments[1], Name::kTensorType) || arguments[2].kind != Kind::kTuple) {
          return Malformed("bad arguments of a tensor with attributes");
        }
        return Call(static_cast<Name>(arguments[0].number), pickle_.Items(arguments[2]),
                    /*of_type=*/true);
      case Name::kOrderedDict:
        if (of_type) break;
        return MakeOrderedDict(arguments);
      case Name::kSize:
        if (of_type || arguments.size() != 1 || !IsTupleOfInts(arguments[0])) break;
        return Push(arguments[0]);
      case Name::kTensorType:
      case Name::kDType:
      case Name::kTypedStorage:
      case Name::kUntypedStorage:
        break;
    }
    return Malformed("a call with bad arguments");
  }

  // --- opcodes ---------------------------------------------------------------------------------

  absl::Status Step(uint8_t opcode) {
    switch (opcode) {
      case kProto: {
        ASSIGN_OR_RETURN(const uint64_t version, Number(1));
        if (version < 2 || version > 5) {
          return absl::FailedPreconditionError(
              absl::StrCat("pickle protocol ", version, " is not one of 2 to 5"));
        }
        return absl::OkStatus();
      }
      case kFrame: {
        ASSIGN_OR_RETURN(const uint64_t size, Number(8));
        const uint64_t left = pickle_.bytes_.size() - at_;
        if (size <= left) return absl::OkStatus();
        return absl::OutOfRangeError(absl::StrCat("a frame of ", size, " bytes at byte ", at_,
                                                  ", where only ", left, " are left"));
      }
      case kMark:
        if (marks_.size() >= kMaxMarks) return TooMany("nested marks");
        marks_.push_back(stack_.size());
        return absl::OkStatus();
      case kNone:
        return Push(Kind::kNone, 0);
      case kNewTrue:
        return Push(Kind::kBool, 1);
      case kNewFalse:
        return Push(Kind::kBool, 0);
      case kBinInt: {
        ASSIGN_OR_RETURN(const uint64_t number, Number(4));
        return Push(Kind::kInt, static_cast<int32_t>(number));
      }
      case kBinInt1:
      case kBinInt2: {
        ASSIGN_OR_RETURN(const uint64_t number, Number(opcode == kBinInt1 ? 1 : 2));
        return Push(Kind::kInt, static_cast<int64_t>(number));
      }
      case kLong1:
        return PushLong(1);
      case kLong4:
        return PushLong(4);
      case kBinFloat:
        RETURN_IF_ERROR(Take(8).status());
        return Push(Kind::kOpaque, 0);
      case kShortBinString:
      case kShortBinUnicode:
        return PushText(1);
      case kBinString:
      case kBinUnicode:
        return PushText(4);
      case kBinUnicode8:
        return PushText(8);
      case kShortBinBytes:
        return PushBytes(1);
      case kBinBytes:
        return PushBytes(4);
      case kBinBytes8:
      case kByteArray8:
        return PushBytes(8);
      case kEmptyTuple:
        return PushContainer(Kind::kTuple, {});
      case kTuple1:
      case kTuple2:
      case kTuple3: {
        ASSIGN_OR_RETURN(std::vector<PickleValue> items, PopCount(opcode - kTuple1 + 1));
        return PushContainer(Kind::kTuple, std::move(items));
      }
      case kTuple:
      case kFrozenSet: {
        ASSIGN_OR_RETURN(std::vector<PickleValue> items, PopToMark());
        return PushContainer(opcode == kTuple ? Kind::kTuple : Kind::kList, std::move(items));
      }
      case kEmptyList:
      case kEmptySet:
        return PushContainer(Kind::kList, {});
      case kEmptyDict:
        return PushContainer(Kind::kDict, {});
      case kAppend: {
        ASSIGN_OR_RETURN(const std::vector<PickleValue> items, PopCount(1));
        return Extend(Kind::kList, items);
      }
      case kSetItem: {
        ASSIGN_OR_RETURN(const std::vector<PickleValue> items, PopCount(2));
        return Extend(Kind::kDict, items);
      }
      case kAppends:
      case kAddItems: {
        ASSIGN_OR_RETURN(const std::vector<PickleValue> items, PopToMark());
        return Extend(Kind::kList, items);
      }
      case kSetItems: {
        ASSIGN_OR_RETURN(const std::vector<PickleValue> items, PopToMark());
        return Extend(Kind::kDict, items);
      }
      case kBinPut:
      case kLongBinPut: {
        ASSIGN_OR_RETURN(const uint64_t index, Number(opcode == kBinPut ? 1 : 4));
        return Memoize(index);
      }
      case kMemoize:
        return Memoize(memo_.size());
      case kBinGet:
      case kLongBinGet: {
        ASSIGN_OR_RETURN(const uint64_t index, Number(opcode == kBinGet ? 1 : 4));
        return Recall(index);
      }
      case kGlobal: {
        ASSIGN_OR_RETURN(const absl::string_view module, Line());
        ASSIGN_OR_RETURN(const absl::string_view name, Line());
        return PushName(module, name);
      }
      case kStackGlobal: {
        ASSIGN_OR_RETURN(const PickleValue name, Pop());
        ASSIGN_OR_RETURN(const PickleValue module, Pop());
        if (name.kind != Kind::kText || module.kind != Kind::kText) {
          return Malformed("a name that is no text");
        }
        return PushName(pickle_.Text(module), pickle_.Text(name));
      }
      case kBinPersId: {
        ASSIGN_OR_RETURN(const PickleValue id, Pop());
        return PushStorage(id);
      }
      case kReduce:
        return Reduce();
      case kBuild: {
        // Attributes of a state dict (_metadata) say nothing about its tensors.
        RETURN_IF_ERROR(Pop().status());
        if (!TopContainer(Kind::kDict).ok()) return Refused("BUILD of what is no dict");
        return absl::OkStatus();
      }
      default:
        return RefuseOpcode(opcode);
    }
  }

  // For INST, the name that it would call is in the message.
  absl::Status RefuseOpcode(uint8_t opcode) {
    if (opcode == 'i') {
      const auto module = Line();
      const auto name = Line();
      if (module.ok() && name.ok()) {
        return Refused(absl::StrCat("`", Shown(*module), ".", Shown(*name), "`"));
      }
    }
    for (const auto& [refused, name] : kRefusedOpcodes) {
      if (refused == opcode) return Refused(absl::StrCat("the opcode ", name));
    }
    return Malformed(absl::StrCat("torch.save writes no opcode 0x", absl::Hex(opcode)));
  }

  Pickle pickle_;
  size_t at_ = 0;
  size_t opcode_at_ = 0;
  size_t values_ = 0;
  std::vector<PickleValue> stack_;
  std::vector<size_t> marks_;  // sizes of the stack
  absl::flat_hash_map<uint64_t, PickleValue> memo_;
};

absl::StatusOr<Pickle> Pickle::Parse(absl::string_view bytes) {
  return PickleMachine(bytes.substr(0, kMaxBytes)).Run();
}

}  // namespace pewter
