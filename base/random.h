// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
// counter-based generator.
//
// A draw is a function of (key, element index) alone, so masks are the same on every device, in any
// order and tiling. The draw of element i is a word of 32 bits in two halves: half i % 8 (low
// halves of words first) of the block with counter i / 8 is its upper half, the same of a second
// stream of blocks its lower one. Whether a draw lies below a bound nearly always shows in the
// upper half, so one block serves eight elements. The key is made from the job's seed and a name.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/host_device.h"

namespace pewter {

struct PhiloxKey {
  uint32_t k0 = 0;
  uint32_t k1 = 0;
};

// FNV-1a of `name` mixed with `seed`. `name` says whose draw it is:
// "model.layers.0.mlp.up_proj.weight#2".
inline PhiloxKey MakePhiloxKey(uint64_t seed, std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  uint64_t mixed = hash ^ (seed + 0x9e3779b97f4a7c15u + (hash << 6) + (hash >> 2));
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
  mixed ^= mixed >> 31;
  return {static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32)};
}

struct PhiloxConstants {
  static constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
  static constexpr uint32_t kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
  static constexpr int kRounds = 10;
};

// The four words of block `counter` of a stream under `key`.
PEWTER_HD void PhiloxBlock(PhiloxKey key, uint64_t counter, uint32_t stream, uint32_t words[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32),
           c2 = stream, c3 = 0;
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < PhiloxConstants::kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(PhiloxConstants::kM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(PhiloxConstants::kM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += PhiloxConstants::kW0;
    k1 += PhiloxConstants::kW1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Half `element` % 8 of a block.
PEWTER_HD uint32_t PhiloxHalf(const uint32_t words[4], uint64_t element) {
  return words[element % 8 / 2] >> (element % 2 * 16) & 0xffffu;
}

PEWTER_HD uint32_t PhiloxWord(PhiloxKey key, uint64_t element) {
  uint32_t upper[4], lower[4];
  PhiloxBlock(key, element / 8, 0, upper);
  PhiloxBlock(key, element / 8, 1, lower);
  return PhiloxHalf(upper, element) << 16 | PhiloxHalf(lower, element);
}

}  // namespace pewter
