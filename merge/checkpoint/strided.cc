#include "merge/checkpoint/strided.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "base/status.h"

namespace pewter {
namespace {

// Reading a span is worth it while one of so many of its bytes is wanted.
constexpr int64_t kSparse = 8;
constexpr int64_t kUsualRun = int64_t{1} << 17;

struct Axis {
  int64_t extent = 1;
  int64_t in = 0;   // stride in the file, in elements
  int64_t out = 0;  // stride in the output
};

// A box of elements, axes by falling stride in the file: so elements are met in the file's order.
struct Box {
  int rank = 0;
  Axis axes[Shape::kMaxRank];
  int64_t in = 0;   // element of the file (from the tensor's first)
  int64_t out = 0;  // element of the output

  void Add(const Axis& axis) {
    if (axis.extent == 1) return;
    int at = rank++;
    for (; at > 0 && axes[at - 1].in < axis.in; --at) axes[at] = axes[at - 1];
    axes[at] = axis;
  }
};

// How a box is read: the axes from `inner` on at once, together with up to `run` indices of the
// axis before.
struct Cut {
  int inner = 0;
  int64_t run = 1;
  int64_t span = 1;   // elements from the first to the last of the inner axes
  int64_t reads = 1;  // of the whole box; saturates
};

Cut CutBox(const Box& box, int64_t width) {
  int64_t span = 1, elements = 1;
  const auto together = [&](int64_t wide, int64_t wanted) {
    return wide * width <= kStridedBlock ||
           (wide * width <= kStridedWindow && wide <= kSparse * wanted);
  };
  Cut cut{.inner = box.rank};
  while (cut.inner > 0) {
    const Axis& axis = box.axes[cut.inner - 1];
    const int64_t wider = span + (axis.extent - 1) * axis.in;
    if (!together(wider, elements * axis.extent)) break;
    span = wider;
    elements *= axis.extent;
    --cut.inner;
  }
  cut.span = span;
  if (cut.inner == 0) return cut;
  const Axis& axis = box.axes[cut.inner - 1];
  for (const int64_t limit : {kStridedWindow, kStridedBlock}) {
    const int64_t room = limit / width - span;
    const int64_t run = room < 0 ? 1 : std::min(axis.extent, room / axis.in + 1);
    if (!together(span + (run - 1) * axis.in, run * elements)) continue;
    cut.run = run;
    break;
  }
  cut.reads = (axis.extent + cut.run - 1) / cut.run;
  for (int i = 0; i + 1 < cut.inner; ++i) {
    if (cut.reads > std::numeric_limits<int64_t>::max() / box.axes[i].extent) {
      cut.reads = std::numeric_limits<int64_t>::max();
      break;
    }
    cut.reads *= box.axes[i].extent;
  }
  return cut;
}

template <int64_t kWidth>
void CopyAxis(const std::byte* from, std::byte* to, const Axis& axis) {
  for (int64_t i = 0; i < axis.extent; ++i) {
    std::memcpy(to + i * axis.out * kWidth, from + i * axis.in * kWidth, kWidth);
  }
}

// Copies a box out of a buffer, axis by axis.
void Scatter(const std::byte* from, std::byte* to, absl::Span<const Axis> axes, int64_t width) {
  if (axes.empty()) {
    std::memcpy(to, from, width);
    return;
  }
  const Axis& axis = axes[0];
  if (axes.size() == 1) {
    if (axis.in == 1 && axis.out == 1) {
      std::memcpy(to, from, axis.extent * width);
    } else if (width == 1) {
      CopyAxis<1>(from, to, axis);
    } else if (width == 2) {
      CopyAxis<2>(from, to, axis);
    } else if (width == 4) {
      CopyAxis<4>(from, to, axis);
    } else {
      CopyAxis<8>(from, to, axis);
    }
    return;
  }
  for (int64_t i = 0; i < axis.extent; ++i) {
    Scatter(from + i * axis.in * width, to + i * axis.out * width, axes.subspan(1), width);
  }
}

class Reader {
 public:
  using ReadFn = absl::FunctionRef<absl::Status(int64_t offset, absl::Span<std::byte> bytes)>;

  Reader(const TensorInfo& info, absl::Span<std::byte> out, ReadFn read)
      : width_(ByteWidth(info.dtype)),
        begin_(info.offset),
        out_(out),
        read_(read),
        window_(std::make_unique_for_overwrite<std::byte[]>(kStridedWindow + 2 * kStridedBlock)) {
    int64_t span = 1;
    for (int i = 0; i < info.shape.rank(); ++i) {
      if (info.shape[i] > 1) span += (info.shape[i] - 1) * info.strides[i];
    }
    end_ = begin_ + span * width_;
  }

  absl::Status Read(const Box& box) {
    const Cut cut = CutBox(box, width_);
    int64_t index[Shape::kMaxRank] = {};
    const int outer = cut.inner - 1;  // the axis that is cut into runs; -1: none
    while (true) {
      int64_t in = box.in, out = box.out;
      for (int i = 0; i <= outer; ++i) {
        in += index[i] * box.axes[i].in;
        out += index[i] * box.axes[i].out;
      }
      Axis axes[Shape::kMaxRank];
      int rank = 0;
      int64_t span = cut.span;
      if (outer >= 0) {
        Axis run = box.axes[outer];
        run.extent = std::min(cut.run, run.extent - index[outer]);
        span += (run.extent - 1) * run.in;
        axes[rank++] = run;
      }
      for (int i = cut.inner; i < box.rank; ++i) axes[rank++] = box.axes[i];
      RETURN_IF_ERROR(ReadSpan(in, span, out, {axes, static_cast<size_t>(rank)}));
      int i = outer;
      while (i >= 0) {
        index[i] += i == outer ? cut.run : 1;
        if (index[i] < box.axes[i].extent) break;
        index[i--] = 0;
      }
      if (i < 0) return absl::OkStatus();
    }
  }

 private:
  absl::Status ReadSpan(int64_t in, int64_t span, int64_t out, absl::Span<const Axis> axes) {
    const int64_t from = begin_ + in * width_;
    const int64_t to = from + span * width_;
    if (from < loaded_from_ || to > loaded_to_) {
      loaded_from_ = std::max(begin_, from / kStridedBlock * kStridedBlock);
      loaded_to_ = std::min(end_, (to + kStridedBlock - 1) / kStridedBlock * kStridedBlock);
      const absl::Status status =
          read_(loaded_from_, {window_.get(), static_cast<size_t>(loaded_to_ - loaded_from_)});
      if (!status.ok()) {
        loaded_to_ = loaded_from_;
        return status;
      }
    }
    Scatter(window_.get() + (from - loaded_from_), out_.data() + out * width_, axes, width_);
    return absl::OkStatus();
  }

  const int64_t width_;
  const int64_t begin_;  // bytes of the file that the tensor's elements lie in
  int64_t end_ = 0;
  const absl::Span<std::byte> out_;
  const ReadFn read_;
  const std::unique_ptr<std::byte[]> window_;
  int64_t loaded_from_ = 0, loaded_to_ = 0;  // what is in the window
};

}  // namespace

absl::Status ReadStrided(
    const TensorInfo& info, int64_t first, int64_t count, absl::Span<std::byte> out,
    absl::FunctionRef<absl::Status(int64_t offset, absl::Span<std::byte> bytes)> read) {
  const Shape& shape = info.shape;
  Reader reader(info, out, read);
  int64_t inner[Shape::kMaxRank + 1];  // elements of the axes from here on
  inner[shape.rank()] = 1;
  for (int i = shape.rank() - 1; i >= 0; --i) inner[i] = inner[i + 1] * shape[i];
  // The range is a few boxes: part of a row, whole rows, ..., and down again.
  for (int64_t done = 0; done < count;) {
    const int64_t at = first + done;
    int axis = shape.rank() - 1;
    while (axis > 0 && at % inner[axis] == 0 && inner[axis] <= count - done) --axis;
    Box box{.out = done};
    for (int i = 0; i <= axis; ++i) box.in += at % inner[i] / inner[i + 1] * info.strides[i];
    const int64_t extent = std::min(shape[axis] - at % inner[axis] / inner[axis + 1],
                                    (count - done) / inner[axis + 1]);
    box.Add({.extent = extent, .in = info.strides[axis], .out = inner[axis + 1]});
    for (int i = axis + 1; i < shape.rank(); ++i) {
      box.Add({.extent = shape[i], .in = info.strides[i], .out = inner[i + 1]});
    }
    RETURN_IF_ERROR(reader.Read(box));
    done += extent * inner[axis + 1];
  }
  return absl::OkStatus();
}

int64_t StridedReads(const TensorInfo& info) {
  Box box;
  int64_t room = kUsualRun, elements = 1;
  for (int i = info.shape.rank() - 1; i >= 0; --i) {
    const int64_t extent = std::min(info.shape[i], room);
    box.Add({.extent = extent, .in = info.strides[i]});
    room = std::max<int64_t>(1, extent < info.shape[i] ? 1 : room / extent);
    elements *= extent;
  }
  const int64_t runs = (info.shape.elements() + elements - 1) / elements;
  const int64_t reads = CutBox(box, ByteWidth(info.dtype)).reads;
  return reads > std::numeric_limits<int64_t>::max() / runs ? std::numeric_limits<int64_t>::max()
                                                            : reads * runs;
}

}  // namespace pewter
