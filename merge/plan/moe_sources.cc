#include "merge/plan/moe_sources.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "base/status.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/stored_source.h"

namespace pewter {
namespace {

// A word as a number in (0, 1).
double Unit(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// Box and Muller: two uniform draws make one normal one. A block has the draws of two elements.
double Normal(PhiloxKey key, int64_t i) {
  constexpr double kTwoPi = 6.283185307179586;
  uint32_t words[4];
  PhiloxBlock(key, static_cast<uint64_t>(i) / 2, /*stream=*/0, words);
  const uint32_t* const own = words + i % 2 * 2;
  return std::sqrt(-2 * std::log(Unit(own[0]))) * std::cos(kTwoPi * Unit(own[1]));
}

// Between -1 and 1.
double Symmetric(PhiloxKey key, int64_t i) {
  return 2 * Unit(PhiloxWord(key, static_cast<uint64_t>(i))) - 1;
}

class NoisyView final : public TensorSource {
 public:
  NoisyView(std::shared_ptr<const TensorSource> source, PhiloxKey key, double noise, double scale)
      : source_(std::move(source)), key_(key), noise_(noise), scale_(scale) {}

  DType dtype() const override { return source_->dtype(); }
  const Shape& shape() const override { return source_->shape(); }
  const std::string& name() const override { return source_->name(); }
  int64_t resident_bytes() const override { return source_->resident_bytes(); }
  void WillRead(ReadIntents& intents) const override { source_->WillRead(intents); }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    RETURN_IF_ERROR(source_->Read(first, count, out, observer));
    if (dtype() == DType::kF64) {
      Apply<double>(first, count, out);
    } else {
      Apply<float>(first, count, out);
    }
    return absl::OkStatus();
  }

 private:
  template <typename T>
  void Apply(int64_t first, int64_t count, absl::Span<std::byte> out) const {
    for (int64_t i = 0; i < count; ++i) {
      T value;
      std::byte* const at = out.data() + i * sizeof(T);
      std::memcpy(&value, at, sizeof(T));
      if (noise_ != 0) value += static_cast<T>(noise_ * Normal(key_, first + i));
      value *= static_cast<T>(scale_);
      std::memcpy(at, &value, sizeof(T));
    }
  }

  const std::shared_ptr<const TensorSource> source_;  // F32 or F64
  const PhiloxKey key_;
  const double noise_;
  const double scale_;
};

// F32 elements by their index.
template <typename Element>
class MadeView final : public TensorSource {
 public:
  MadeView(Element element, Shape shape, std::string name)
      : element_(std::move(element)), shape_(std::move(shape)), name_(std::move(name)) {}

  DType dtype() const override { return DType::kF32; }
  const Shape& shape() const override { return shape_; }
  const std::string& name() const override { return name_; }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    RETURN_IF_ERROR(CheckReadRange(*this, first, count, out.size()));
    for (int64_t i = 0; i < count; ++i) {
      const float value = element_(first + i);
      std::memcpy(out.data() + i * sizeof(float), &value, sizeof(float));
    }
    return absl::OkStatus();
  }

 private:
  const Element element_;
  const Shape shape_;
  const std::string name_;
};

template <typename Element>
std::shared_ptr<const TensorSource> Made(Element element, Shape shape, std::string name) {
  return std::make_shared<MadeView<Element>>(std::move(element), std::move(shape), std::move(name));
}

}  // namespace

std::shared_ptr<const TensorSource> NoisySource(std::shared_ptr<const TensorSource> source,
                                                PhiloxKey key, double noise, double scale) {
  const DType work = source->dtype() == DType::kF64 ? DType::kF64 : DType::kF32;
  return std::make_shared<NoisyView>(CastSource(std::move(source), work), key, noise, scale);
}

std::shared_ptr<const TensorSource> ValueSource(std::shared_ptr<const std::vector<float>> values,
                                                Shape shape, std::string name) {
  return Made([values = std::move(values)](int64_t i) { return (*values)[i]; }, std::move(shape),
              std::move(name));
}

std::shared_ptr<const TensorSource> RandomSource(Distribution distribution, PhiloxKey key,
                                                 double scale, Shape shape, std::string name) {
  return Made(
      [=](int64_t i) {
        return static_cast<float>(
            scale * (distribution == Distribution::kNormal ? Normal(key, i) : Symmetric(key, i)));
      },
      std::move(shape), std::move(name));
}

}  // namespace pewter
