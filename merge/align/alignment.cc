#include "merge/align/alignment.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/digest.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/checkpoint/stored_source.h"

namespace pewter {
namespace {

using nlohmann::json;

constexpr absl::string_view kFormat = "pewter.alignment";
constexpr absl::string_view kVersion = "1";

constexpr absl::string_view kPermutation = ".permutation";
constexpr absl::string_view kTransform = ".transform";
constexpr absl::string_view kInverse = ".inverse";

bool IsIdentity(absl::Span<const int32_t> permutation) {
  for (size_t i = 0; i < permutation.size(); ++i) {
    if (permutation[i] != static_cast<int32_t>(i)) return false;
  }
  return true;
}

std::vector<int32_t> Identity(int64_t width) {
  std::vector<int32_t> permutation(width);
  std::iota(permutation.begin(), permutation.end(), 0);
  return permutation;
}

bool IsPermutation(absl::Span<const int32_t> values) {
  std::vector<bool> seen(values.size());
  for (const int32_t value : values) {
    if (value < 0 || static_cast<size_t>(value) >= values.size() || seen[value]) return false;
    seen[value] = true;
  }
  return true;
}

// Row-major [dim, dim] matrices.
std::vector<double> Times(absl::Span<const double> a, absl::Span<const double> b, int64_t dim) {
  std::vector<double> c(dim * dim, 0);
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t k = 0; k < dim; ++k) {
      for (int64_t j = 0; j < dim; ++j) c[i * dim + j] += a[i * dim + k] * b[k * dim + j];
    }
  }
  return c;
}

absl::Span<const double> Block(const std::vector<double>& blocks, int64_t block, int64_t dim) {
  return absl::MakeConstSpan(blocks).subspan(block * dim * dim, dim * dim);
}

// Whether b is the inverse of a: by what they do, one after the other, to a few vectors, so that a
// matrix of thousands of features costs no product of matrices.
bool AreInverse(absl::Span<const double> a, absl::Span<const double> b, int64_t dim) {
  const auto apply = [dim](absl::Span<const double> m, const std::vector<double>& x) {
    std::vector<double> y(dim, 0);
    for (int64_t i = 0; i < dim; ++i) {
      for (int64_t j = 0; j < dim; ++j) y[i] += m[i * dim + j] * x[j];
    }
    return y;
  };
  for (int probe = 0; probe < 3; ++probe) {
    std::vector<double> x(dim);
    for (int64_t i = 0; i < dim; ++i) x[i] = std::cos(1.0 + static_cast<double>(probe * dim + i));
    const std::vector<double> y = apply(a, apply(b, x));
    double error = 0, norm = 0;
    for (int64_t i = 0; i < dim; ++i) {
      error += (y[i] - x[i]) * (y[i] - x[i]);
      norm += x[i] * x[i];
    }
    if (!(error <= 1e-12 * norm)) return false;
  }
  return true;
}

absl::Status CheckTransform(const std::string& name, const BlockTransform& transform,
                            int64_t width) {
  const auto fail = [&](absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat("alignment of ", name, ": ", what));
  };
  const int64_t dim = transform.dim;
  if (transform.blocks < 1 || dim < 1 || dim > width || transform.blocks != width / dim ||
      width % dim != 0) {
    return fail(
        absl::StrCat(transform.blocks, " linear maps of ", dim, " features do not make ", width));
  }
  const size_t size = static_cast<size_t>(width) * dim;
  if (transform.forward.size() != size || transform.inverse.size() != size) {
    return fail("a linear map or its inverse is missing");
  }
  for (int64_t block = 0; block < transform.blocks; ++block) {
    if (!AreInverse(Block(transform.forward, block, dim), Block(transform.inverse, block, dim),
                    dim)) {
      return fail(absl::StrCat("linear map ", block, " and its inverse do not undo each other"));
    }
  }
  return absl::OkStatus();
}

// Under RoPE a query head may turn and scale each pair of features (i, i + dim / 2), and no more.
bool TurnsPairs(absl::Span<const double> m, int64_t dim) {
  double scale = 0;
  for (const double value : m) scale = std::max(scale, std::abs(value));
  const double tolerance = 1e-9 * scale;
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j < dim; ++j) {
      const bool same_pair = i % half == j % half;
      if (!same_pair && std::abs(m[i * dim + j]) > tolerance) return false;
    }
  }
  for (int64_t i = 0; i < half; ++i) {
    const double a = m[i * dim + i], d = m[(i + half) * dim + i + half];
    const double b = m[i * dim + i + half], c = m[(i + half) * dim + i];
    if (std::abs(a - d) > tolerance || std::abs(b + c) > tolerance) return false;
  }
  return true;
}

bool Near(absl::Span<const double> a, absl::Span<const double> b) {
  double scale = 0, error = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    scale = std::max(scale, std::abs(a[i]));
    error = std::max(error, std::abs(a[i] - b[i]));
  }
  return error <= 1e-6 * scale;
}

// Groups of an attention together: heads as wholes, and maps that cancel.
class AttentionCheck {
 public:
  AttentionCheck(const Symmetry& symmetry, const Alignment& alignment)
      : symmetry_(symmetry), alignment_(alignment) {}

  absl::Status Check(const Attention& attention) {
    const AttentionPermutations permutations = {.query = Permutation(attention.query),
                                                .key = Permutation(attention.key),
                                                .value = Permutation(attention.value),
                                                .output = Permutation(attention.output)};
    ASSIGN_OR_RETURN(const AttentionOrder order, ToOrder(attention, permutations));
    if (attention.head_order >= 0 && order.heads != Permutation(attention.head_order)) {
      return absl::FailedPreconditionError(absl::StrCat(
          attention.name, ": its heads must be in the order of ", Name(attention.head_order),
          ", whose table of position biases the layers of its stack share"));
    }
    return CheckMaps(attention);
  }

 private:
  const std::string& Name(int group) const { return symmetry_.groups()[group].name; }

  std::vector<int32_t> Permutation(int group) const {
    const auto it = alignment_.groups.find(Name(group));
    return it == alignment_.groups.end() || it->second.permutation.empty()
               ? Identity(symmetry_.groups()[group].width)
               : it->second.permutation;
  }

  // Null where there is none.
  const BlockTransform* Maps(int group) const {
    const auto it = alignment_.groups.find(Name(group));
    return it == alignment_.groups.end() || it->second.transform.blocks == 0
               ? nullptr
               : &it->second.transform;
  }

  absl::Status CheckMaps(const Attention& attention) const {
    for (const int group : {attention.query, attention.key, attention.value, attention.output}) {
      const BlockTransform* maps = Maps(group);
      if (maps == nullptr) continue;
      const auto fail = [&](absl::string_view what) {
        return absl::FailedPreconditionError(
            absl::StrCat(attention.name, ": linear maps of ", Name(group), " ", what));
      };
      if (maps->dim != attention.head_dim) {
        return fail(absl::StrCat("must be one a head, of ", attention.head_dim, " features"));
      }
      const bool queries = group == attention.query || group == attention.key;
      if (queries && attention.normed) {
        return fail("are not allowed: queries and keys pass a norm of their own");
      }
      for (int64_t block = 0; queries && attention.rotary && block < maps->blocks; ++block) {
        if (attention.head_dim % 2 == 0 &&
            TurnsPairs(Block(maps->forward, block, maps->dim), maps->dim)) {
          continue;
        }
        return fail("may only turn and scale the pairs of features that RoPE turns");
      }
    }
    // Maps of two groups that meet: o undoes v, and k undoes the transpose of q.
    RETURN_IF_ERROR(CheckPair(attention, attention.output, attention.value, false));
    return CheckPair(attention, attention.query, attention.key, true);
  }

  // `many` has the maps of query heads, `few` those of the keys and values that they read.
  absl::Status CheckPair(const Attention& attention, int many, int few, bool dual) const {
    if (many == few) return absl::OkStatus();
    const BlockTransform *of_many = Maps(many), *of_few = Maps(few);
    if (of_many == nullptr && of_few == nullptr) return absl::OkStatus();
    const auto fail = [&] {
      return absl::FailedPreconditionError(
          absl::StrCat(attention.name, ": the linear maps of ", Name(many), " and ", Name(few),
                       " do not cancel; each query head must have the one of its keys and values"));
    };
    if (of_many == nullptr || of_few == nullptr) return fail();
    const int64_t dim = attention.head_dim;
    for (int64_t head = 0; head < attention.heads; ++head) {
      const int64_t kv = head / (attention.heads / attention.kv_heads);
      const auto map = Block(of_many->forward, head, dim);
      std::vector<double> other(Block(of_few->forward, kv, dim).begin(),
                                Block(of_few->forward, kv, dim).end());
      if (dual) {
        const auto inverse = Block(of_few->inverse, kv, dim);
        for (int64_t i = 0; i < dim; ++i) {
          for (int64_t j = 0; j < dim; ++j) other[i * dim + j] = inverse[j * dim + i];
        }
      }
      if (!Near(map, other)) return fail();
    }
    return absl::OkStatus();
  }

  const Symmetry& symmetry_;
  const Alignment& alignment_;
};

}  // namespace

std::string AlignmentFingerprint(const Symmetry& symmetry, const Checkpoint& model) {
  std::string text = absl::StrCat(symmetry.family(), "\n");
  for (const std::string& name : model.tensor_names()) {
    const TensorInfo& info = *model.Find(name);
    absl::StrAppend(&text, name, " ", SafetensorsName(info.dtype), " ", info.shape.ToString(),
                    "\n");
  }
  return Sha256::Of(text);
}

absl::Status CheckAlignment(const Symmetry& symmetry, const Alignment& alignment) {
  if (!alignment.family.empty() && alignment.family != symmetry.family()) {
    return absl::FailedPreconditionError(absl::StrCat("the alignment is one of the family ",
                                                      alignment.family, ", the model is of ",
                                                      symmetry.family()));
  }
  for (const auto& [name, group] : alignment.groups) {
    const int index = symmetry.FindGroup(name);
    if (index < 0) {
      const auto tied = symmetry.tied().find(name);
      return absl::FailedPreconditionError(
          tied == symmetry.tied().end()
              ? absl::StrCat("the model has no group ", name)
              : absl::StrCat("the group ", name,
                             " has no order of its own: the output head is "
                             "tied to the embeddings, so it is in the order of ",
                             tied->second));
    }
    const SymmetryGroup& of = symmetry.groups()[index];
    if (!group.permutation.empty() && (static_cast<int64_t>(group.permutation.size()) != of.width ||
                                       !IsPermutation(group.permutation))) {
      return absl::FailedPreconditionError(
          absl::StrCat("alignment of ", name, ": not a permutation of ", of.width, " features"));
    }
    if (group.transform.blocks == 0) continue;
    RETURN_IF_ERROR(CheckTransform(name, group.transform, of.width));
    if (absl::c_linear_search(alignment.inexact, name)) continue;
    for (const SymmetricTensor& tensor : symmetry.tensors()) {
      for (const auto& axis : tensor.axes) {
        for (const AxisSegment& segment : axis) {
          if (segment.group != index || segment.role != FeatureRole::kOrdered) continue;
          return absl::FailedPreconditionError(
              absl::StrCat("alignment of ", name, ": its features can be reordered only, because ",
                           tensor.tensor.name, " scales them one by one"));
        }
      }
    }
  }
  AttentionCheck check(symmetry, alignment);
  for (const Attention& attention : symmetry.attentions()) RETURN_IF_ERROR(check.Check(attention));
  return absl::OkStatus();
}

absl::StatusOr<Alignment> Compose(const Alignment& first, const Alignment& second) {
  Alignment result = first;
  result.reference = second.reference;
  result.reference_fingerprint = second.reference_fingerprint;
  result.method = absl::StrCat(first.method, ", ", second.method);
  result.report.clear();
  for (const std::string& name : second.inexact) {
    if (!absl::c_linear_search(result.inexact, name)) result.inexact.push_back(name);
  }
  for (const auto& [name, after] : second.groups) {
    GroupAlignment& group = result.groups[name];
    const GroupAlignment before = group;
    const auto width_of = [](const GroupAlignment& of) {
      return of.permutation.empty() ? static_cast<size_t>(of.transform.blocks * of.transform.dim)
                                    : of.permutation.size();
    };
    const size_t width = std::max(width_of(before), width_of(after));
    const auto fail = [&, named = name](absl::string_view what) {
      return absl::FailedPreconditionError(absl::StrCat("alignments of ", named, ": ", what));
    };
    const std::vector<int32_t> q1 =
        before.permutation.empty() ? Identity(width) : before.permutation;
    const std::vector<int32_t> q2 = after.permutation.empty() ? Identity(width) : after.permutation;
    if (q1.size() != width || q2.size() != width) return fail("their widths differ");
    group.permutation.resize(width);
    for (size_t i = 0; i < width; ++i) group.permutation[i] = q1[q2[i]];
    if (before.transform.blocks == 0) {
      group.transform = after.transform;
      continue;
    }
    // T1 acts on runs of features, which q2 has to move as wholes: P2 T1 = T1' P2.
    const int64_t dim = before.transform.dim, blocks = before.transform.blocks;
    BlockTransform moved = before.transform;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = q2[block * dim] / dim;
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t row = q2[block * dim + i];
        if (row / dim != from) return fail("features leave the run that a linear map mixes");
        for (int64_t j = 0; j < dim; ++j) {
          const int64_t column = q2[block * dim + j] % dim;
          const int64_t at = (from * dim + row % dim) * dim + column;
          moved.forward[(block * dim + i) * dim + j] = before.transform.forward[at];
          moved.inverse[(block * dim + i) * dim + j] = before.transform.inverse[at];
        }
      }
    }
    if (after.transform.blocks != 0) {
      if (after.transform.dim != dim) return fail("their linear maps have different widths");
      for (int64_t block = 0; block < blocks; ++block) {
        const auto forward = Times(Block(after.transform.forward, block, dim),
                                   Block(moved.forward, block, dim), dim);
        const auto inverse = Times(Block(moved.inverse, block, dim),
                                   Block(after.transform.inverse, block, dim), dim);
        std::copy(forward.begin(), forward.end(), &moved.forward[block * dim * dim]);
        std::copy(inverse.begin(), inverse.end(), &moved.inverse[block * dim * dim]);
      }
    }
    // The permutation of the result takes features from where `first` found them.
    group.transform = std::move(moved);
  }
  return result;
}

absl::StatusOr<Alignment> Inverse(const Alignment& alignment) {
  Alignment result = alignment;
  std::swap(result.reference, result.model);
  std::swap(result.reference_fingerprint, result.model_fingerprint);
  result.report.clear();
  for (auto& [name, group] : result.groups) {
    std::vector<int32_t> inverse(group.permutation.size());
    for (size_t i = 0; i < inverse.size(); ++i) {
      inverse[group.permutation[i]] = static_cast<int32_t>(i);
    }
    if (group.transform.blocks == 0) {
      group.permutation = std::move(inverse);
      continue;
    }
    // (T P)^-1 = P^-1 T^-1 = (P^-1 T^-1 P) P^-1: the composition of the map alone and the order.
    Alignment map, order;
    BlockTransform& undone = map.groups[name].transform;
    undone = group.transform;
    std::swap(undone.forward, undone.inverse);
    order.groups[name].permutation =
        inverse.empty() ? Identity(undone.blocks * undone.dim) : std::move(inverse);
    ASSIGN_OR_RETURN(Alignment both, Compose(map, order));
    group = std::move(both.groups[name]);
  }
  return result;
}

// --- The file ---------------------------------------------------------------------------------

absl::StatusOr<std::string> SerializeAlignment(const Alignment& alignment) {
  std::vector<TensorInfo> tensors;
  std::vector<absl::string_view> data;
  const auto add = [&](std::string name, DType dtype, std::vector<int64_t> extents,
                       const void* values) -> absl::Status {
    ASSIGN_OR_RETURN(Shape shape, Shape::Make(extents));
    data.push_back({static_cast<const char*>(values),
                    static_cast<size_t>(shape.elements() * ByteWidth(dtype))});
    tensors.push_back({.name = std::move(name), .dtype = dtype, .shape = std::move(shape)});
    return absl::OkStatus();
  };
  for (const auto& [name, group] : alignment.groups) {
    if (!group.permutation.empty()) {
      RETURN_IF_ERROR(add(absl::StrCat(name, kPermutation), DType::kI32,
                          {static_cast<int64_t>(group.permutation.size())},
                          group.permutation.data()));
    }
    const BlockTransform& transform = group.transform;
    if (transform.blocks == 0) continue;
    const std::vector<int64_t> extents = {transform.blocks, transform.dim, transform.dim};
    RETURN_IF_ERROR(
        add(absl::StrCat(name, kTransform), DType::kF64, extents, transform.forward.data()));
    RETURN_IF_ERROR(
        add(absl::StrCat(name, kInverse), DType::kF64, extents, transform.inverse.data()));
  }
  std::map<std::string, std::string> metadata = {
      {"format", std::string(kFormat)},
      {"version", std::string(kVersion)},
      {"family", alignment.family},
      {"reference", alignment.reference},
      {"reference_fingerprint", alignment.reference_fingerprint},
      {"model", alignment.model},
      {"model_fingerprint", alignment.model_fingerprint},
      {"method", alignment.method},
      {"function", alignment.keeps_function() ? "kept" : "changed"},
  };
  if (!alignment.keeps_function()) metadata["inexact"] = json(alignment.inexact).dump();
  if (!alignment.report.empty()) metadata["report"] = alignment.report;
  ASSIGN_OR_RETURN(std::string file, LayOutSafetensors(tensors, metadata));
  for (const absl::string_view one : data) file.append(one.data(), one.size());
  return file;
}

absl::StatusOr<Alignment> ReadAlignment(ObjectStore& store, absl::string_view key) {
  const auto fail = [&](absl::string_view what) {
    return absl::DataLossError(absl::StrCat(store.Describe(key), ": ", what));
  };
  ASSIGN_OR_RETURN(const ObjectStat stat, store.Stat(key));
  ASSIGN_OR_RETURN(const SafetensorsHeader header, ReadSafetensorsHeader(store, key, stat.size));
  const auto text = [&](const char* name) {
    const auto it = header.metadata.find(name);
    return it == header.metadata.end() ? std::string() : it->second;
  };
  if (text("format") != kFormat) return fail("this is no alignment");
  if (text("version") != kVersion) {
    return fail(absl::StrCat("an alignment of version ", text("version"),
                             "; this program reads version ", kVersion));
  }
  Alignment alignment = {.family = text("family"),
                         .reference = text("reference"),
                         .reference_fingerprint = text("reference_fingerprint"),
                         .model = text("model"),
                         .model_fingerprint = text("model_fingerprint"),
                         .method = text("method"),
                         .report = text("report")};
  if (const std::string names = text("inexact"); !names.empty()) {
    const json list = json::parse(names, nullptr, /*allow_exceptions=*/false);
    for (const json& name : list) {
      if (!list.is_array() || !name.is_string()) return fail("\"inexact\" is no list of names");
      alignment.inexact.push_back(name.get<std::string>());
    }
  }
  for (const TensorInfo& tensor : header.tensors) {
    const auto wrong = [&] {
      return fail(absl::StrCat("tensor ", tensor.name, " is ", SafetensorsName(tensor.dtype), " ",
                               tensor.shape.ToString(), ", which no alignment has"));
    };
    const auto read = [&](auto& values) {
      values.resize(tensor.shape.elements());
      return store.ReadInto(
          key, tensor.offset,
          {reinterpret_cast<std::byte*>(values.data()), static_cast<size_t>(tensor.bytes)});
    };
    const size_t dot = tensor.name.rfind('.');
    if (dot == tensor.name.npos) return wrong();
    GroupAlignment& group = alignment.groups[tensor.name.substr(0, dot)];
    const absl::string_view kind = absl::string_view(tensor.name).substr(dot);
    if (kind == kPermutation) {
      if (tensor.dtype != DType::kI32 || tensor.shape.rank() != 1) return wrong();
      RETURN_IF_ERROR(read(group.permutation));
      if (!IsPermutation(group.permutation)) {
        return fail(absl::StrCat("tensor ", tensor.name, " is not a permutation"));
      }
    } else if (kind == kTransform || kind == kInverse) {
      BlockTransform& transform = group.transform;
      if (tensor.dtype != DType::kF64 || tensor.shape.rank() != 3 ||
          tensor.shape[1] != tensor.shape[2] || tensor.shape.elements() == 0 ||
          (transform.blocks != 0 &&
           (transform.blocks != tensor.shape[0] || transform.dim != tensor.shape[1]))) {
        return wrong();
      }
      transform.blocks = tensor.shape[0];
      transform.dim = tensor.shape[1];
      RETURN_IF_ERROR(read(kind == kTransform ? transform.forward : transform.inverse));
    } else {
      return wrong();
    }
  }
  for (const auto& [name, group] : alignment.groups) {
    if (group.transform.blocks == 0) continue;
    RETURN_IF_ERROR(Annotate(
        CheckTransform(name, group.transform, group.transform.blocks * group.transform.dim),
        store.Describe(key)));
  }
  return alignment;
}

// --- Views ------------------------------------------------------------------------------------

namespace {

// A tensor as a matrix: its rows are the leading axes up to the last that moves, its columns the
// rest; the last axis of all, where that one moves.
//
// A row of the view is the source's row of its own or, under a linear map, a sum of the rows of its
// run. Columns are reordered, and mapped in runs, within a row. Each element is one sum in a fixed
// order, so it does not depend on the range that it is read with.
class AlignedSource final : public TensorSource {
 public:
  // Of the view's rows or columns.
  struct Axis {
    std::vector<int32_t> from;     // empty: as they are
    std::vector<double> matrices;  // [blocks, dim, dim]: element i of a run is row i times the run
    int64_t dim = 0;               // 0: no linear map
    bool identity() const { return from.empty() && dim == 0; }
  };

  AlignedSource(std::shared_ptr<const TensorSource> source, int64_t row_size, Axis rows,
                Axis columns)
      : source_(std::move(source)),
        width_(ByteWidth(source_->dtype())),
        row_size_(row_size),
        rows_(std::move(rows)),
        columns_(std::move(columns)) {}

  DType dtype() const override { return source_->dtype(); }
  const Shape& shape() const override { return source_->shape(); }
  const std::string& name() const override { return source_->name(); }
  int64_t resident_bytes() const override {
    const auto bytes = [](const Axis& axis) {
      return static_cast<int64_t>(axis.from.size() * sizeof(int32_t) +
                                  axis.matrices.size() * sizeof(double));
    };
    return source_->resident_bytes() + bytes(rows_) + bytes(columns_) + ScratchBytes();
  }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    RETURN_IF_ERROR(CheckReadRange(*this, first, count, out.size()));
    Scratch scratch;
    while (count > 0) {
      // Whole rows that lie one after the other in the source are read at once, straight to `out`.
      const int64_t row = first / row_size_, column = first % row_size_;
      int64_t done;
      if (rows_.dim == 0 && columns_.identity()) {
        done = std::min(count, row_size_ - column);
        const int64_t source_row = Row(row);
        while (done < count && (first + done) / row_size_ < RowCount() &&
               Row((first + done) / row_size_) == source_row + (first + done) / row_size_ - row) {
          done += std::min(count - done, row_size_);
        }
        RETURN_IF_ERROR(source_->Read(source_row * row_size_ + column, done,
                                      out.first(done * width_), observer));
      } else {
        done = std::min(count, row_size_ - column);
        RETURN_IF_ERROR(MakeRow(row, scratch, observer));
        RETURN_IF_ERROR(WriteRow(row, column, out.first(done * width_), scratch));
      }
      first += done;
      count -= done;
      out.remove_prefix(done * width_);
    }
    return absl::OkStatus();
  }

 private:
  struct Scratch {
    int64_t run = -1;               // of rows that a linear map mixes: what `rows` holds
    std::vector<double> rows;       // [dim, row_size]
    std::vector<std::byte> stored;  // one row
    std::vector<double> row, mapped;
  };

  int64_t RowCount() const { return row_size_ == 0 ? 0 : shape().elements() / row_size_; }
  int64_t Row(int64_t row) const { return rows_.from.empty() ? row : rows_.from[row]; }
  int64_t ScratchBytes() const {
    const int64_t doubles = rows_.dim * row_size_ + 2 * row_size_;
    return row_size_ * width_ + doubles * static_cast<int64_t>(sizeof(double));
  }

  // The source's row as stored.
  absl::Status ReadStored(int64_t row, Scratch& scratch, ReadObserver* observer) const {
    scratch.stored.resize(row_size_ * width_);
    return source_->Read(Row(row) * row_size_, row_size_, absl::MakeSpan(scratch.stored), observer);
  }

  void Widen(absl::Span<const std::byte> stored, double* values) const {
    kernels::Convert({.data = stored.data(), .dtype = dtype(), .size = row_size_},
                     {.data = values, .dtype = DType::kF64, .size = row_size_});
  }

  // Leaves row `row` of the view, its columns still in the source's order, in scratch.stored where
  // nothing is computed, else in scratch.row.
  absl::Status MakeRow(int64_t row, Scratch& scratch, ReadObserver* observer) const {
    if (rows_.dim == 0) {
      RETURN_IF_ERROR(ReadStored(row, scratch, observer));
      if (columns_.dim == 0) return absl::OkStatus();
      scratch.row.resize(row_size_);
      Widen(scratch.stored, scratch.row.data());
      return absl::OkStatus();
    }
    const int64_t dim = rows_.dim, run = row / dim;
    if (scratch.run != run) {
      scratch.rows.resize(dim * row_size_);
      for (int64_t i = 0; i < dim; ++i) {
        RETURN_IF_ERROR(ReadStored(run * dim + i, scratch, observer));
        Widen(scratch.stored, &scratch.rows[i * row_size_]);
      }
      scratch.run = run;
    }
    scratch.row.assign(row_size_, 0);
    const double* factors = &rows_.matrices[row * dim];
    for (int64_t k = 0; k < dim; ++k) {
      const double* source = &scratch.rows[k * row_size_];
      for (int64_t j = 0; j < row_size_; ++j) scratch.row[j] += factors[k] * source[j];
    }
    return absl::OkStatus();
  }

  template <size_t kWidth>
  static void Gather(absl::Span<const int32_t> from, const std::byte* row, std::byte* out) {
    for (size_t j = 0; j < from.size(); ++j) {
      std::memcpy(out + j * kWidth, row + from[j] * kWidth, kWidth);
    }
  }
  void Gather(absl::Span<const int32_t> from, absl::Span<const std::byte> row,
              absl::Span<std::byte> out) const {
    switch (width_) {
      case 1:
        return Gather<1>(from, row.data(), out.data());
      case 2:
        return Gather<2>(from, row.data(), out.data());
      case 4:
        return Gather<4>(from, row.data(), out.data());
      default:
        return Gather<8>(from, row.data(), out.data());
    }
  }

  // Columns from `column` on.
  absl::Status WriteRow(int64_t row, int64_t column, absl::Span<std::byte> out,
                        Scratch& scratch) const {
    const int64_t count = static_cast<int64_t>(out.size()) / width_;
    const auto from = [&](int64_t j) { return columns_.from.empty() ? j : columns_.from[j]; };
    if (rows_.dim == 0 && columns_.dim == 0) {
      Gather(absl::MakeConstSpan(columns_.from).subspan(column, count), scratch.stored, out);
      return absl::OkStatus();
    }
    scratch.mapped.resize(count);
    const int64_t dim = columns_.dim;
    for (int64_t j = 0; j < count; ++j) {
      if (dim == 0) {
        scratch.mapped[j] = scratch.row[from(column + j)];
        continue;
      }
      const int64_t begin = (column + j) / dim * dim;
      const double* factors = &columns_.matrices[(column + j) * dim];
      double sum = 0;
      for (int64_t k = 0; k < dim; ++k) sum += factors[k] * scratch.row[from(begin + k)];
      scratch.mapped[j] = sum;
    }
    kernels::Convert({.data = scratch.mapped.data(), .dtype = DType::kF64, .size = count},
                     {.data = out.data(), .dtype = dtype(), .size = count});
    return absl::OkStatus();
  }

  const std::shared_ptr<const TensorSource> source_;
  const int64_t width_;
  const int64_t row_size_;
  const Axis rows_, columns_;
};

// What an alignment does to one axis of a tensor.
absl::StatusOr<AlignedSource::Axis> AlignedAxis(const Symmetry& symmetry,
                                                const Alignment& alignment,
                                                absl::Span<const AxisSegment> segments) {
  AlignedSource::Axis axis;
  bool moves = false, maps = false;
  for (const AxisSegment& segment : segments) {
    const auto it = alignment.groups.find(symmetry.groups()[segment.group].name);
    if (it == alignment.groups.end()) continue;
    moves = moves || !IsIdentity(it->second.permutation);
    if (it->second.transform.blocks == 0) continue;
    if (maps && axis.dim != it->second.transform.dim) {
      return absl::UnimplementedError("linear maps of different widths on one axis");
    }
    maps = true;
    axis.dim = it->second.transform.dim;
  }
  if (!moves && !maps) return axis;
  for (const AxisSegment& segment : segments) {
    const SymmetryGroup& group = symmetry.groups()[segment.group];
    const auto it = alignment.groups.find(group.name);
    const bool permuted = it != alignment.groups.end() && !it->second.permutation.empty();
    const int32_t begin = static_cast<int32_t>(axis.from.size());
    for (int64_t i = 0; i < group.width; ++i) {
      axis.from.push_back(begin + (permuted ? it->second.permutation[i] : static_cast<int32_t>(i)));
    }
    if (!maps) continue;
    const int64_t dim = axis.dim;
    if (group.width % dim != 0) {
      return absl::UnimplementedError("linear maps that do not divide an axis");
    }
    const BlockTransform* transform =
        it != alignment.groups.end() && it->second.transform.blocks != 0 ? &it->second.transform
                                                                         : nullptr;
    // Feature i of a run is sum_k M[i][k] of the run: T for what produces features; what reads
    // them multiplies by T^-1 from the right, T^-T for its columns. What scales them one by one is
    // the diagonal of T diag(v) T^-1.
    const auto factor = [&](int64_t i, int64_t k) {
      const double forward = transform->forward[i * dim + k];
      if (segment.role == FeatureRole::kProduced) return forward;
      const double inverse = transform->inverse[(i / dim * dim + k) * dim + i % dim];
      return segment.role == FeatureRole::kOrdered ? forward * inverse : inverse;
    };
    for (int64_t i = 0; i < group.width; ++i) {
      for (int64_t k = 0; k < dim; ++k) {
        axis.matrices.push_back(transform == nullptr ? (i % dim == k ? 1 : 0) : factor(i, k));
      }
    }
  }
  if (!moves) axis.from.clear();
  return axis;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const TensorSource>> AlignSource(
    const Symmetry& symmetry, const SymmetricTensor& tensor, const Alignment& alignment,
    std::shared_ptr<const TensorSource> source) {
  const Shape& shape = source->shape();
  const int rank = shape.rank();
  std::vector<AlignedSource::Axis> axes(rank);
  int last = -1;  // axis that moves
  for (int axis = 0; axis < rank && axis < static_cast<int>(tensor.axes.size()); ++axis) {
    auto aligned = AlignedAxis(symmetry, alignment, tensor.axes[axis]);
    if (!aligned.ok()) return Annotate(aligned.status(), source->name());
    axes[axis] = *std::move(aligned);
    if (axes[axis].identity()) continue;
    last = axis;
    if (!axes[axis].from.empty() && static_cast<int64_t>(axes[axis].from.size()) != shape[axis]) {
      return absl::FailedPreconditionError(
          absl::StrCat(source->name(), " has ", shape[axis], " features on axis ", axis,
                       ", its alignment ", axes[axis].from.size()));
    }
  }
  if (last < 0 || shape.elements() == 0) return source;
  if (!IsFloat(source->dtype())) {
    for (const AlignedSource::Axis& axis : axes) {
      if (axis.dim == 0) continue;
      return absl::FailedPreconditionError(
          absl::StrCat(source->name(), " is ", SafetensorsName(source->dtype()),
                       "; linear maps are of floating types only"));
    }
  }
  AlignedSource::Axis columns;
  int64_t row_size = 1;
  int row_axes = last + 1;
  if (last == rank - 1) {
    columns = std::move(axes[last]);
    row_size = shape[last];
    row_axes = last;
  } else {
    for (int axis = row_axes; axis < rank; ++axis) row_size *= shape[axis];
  }
  // The leading axes together.
  AlignedSource::Axis rows;
  for (int axis = 0; axis < row_axes; ++axis) {
    if (axes[axis].identity()) continue;
    if (row_axes == 1) {
      rows = std::move(axes[axis]);
      break;
    }
    if (axes[axis].dim != 0) {
      return absl::UnimplementedError(
          absl::StrCat(source->name(), ": linear maps of one of several leading axes"));
    }
    if (rows.from.empty()) rows.from = Identity(shape.elements() / row_size);
    int64_t stride = 1;
    for (int inner = axis + 1; inner < row_axes; ++inner) stride *= shape[inner];
    std::vector<int32_t> moved(rows.from.size());
    for (int64_t row = 0; row < static_cast<int64_t>(moved.size()); ++row) {
      const int64_t index = row / stride % shape[axis];
      moved[row] = rows.from[row + (axes[axis].from[index] - index) * stride];
    }
    rows.from = std::move(moved);
  }
  return std::make_shared<AlignedSource>(std::move(source), row_size, std::move(rows),
                                         std::move(columns));
}

}  // namespace pewter
