// Views that a mixture of experts is put together from. All are immutable.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "merge/checkpoint/tensor_source.h"

namespace pewter {

// (x + noise * z) * scale with z drawn from a standard normal distribution, by element, from `key`.
// In F64 where the source is F64, else in F32, which is the view's dtype.
std::shared_ptr<const TensorSource> NoisySource(std::shared_ptr<const TensorSource> source,
                                                PhiloxKey key, double noise, double scale);

// F32 values that are there already.
std::shared_ptr<const TensorSource> ValueSource(std::shared_ptr<const std::vector<float>> values,
                                                Shape shape, std::string name);

// F32 draws: normal with the standard deviation `scale`, or uniform between -scale and scale.
enum class Distribution { kNormal, kUniform };
std::shared_ptr<const TensorSource> RandomSource(Distribution distribution, PhiloxKey key,
                                                 double scale, Shape shape, std::string name);

}  // namespace pewter
