// Philox-4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words from a
// counter of four and a key of two, without state.
#pragma once

#include <cstdint>

#include "palp_fast/portable.h"

namespace palp_fast {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

struct PhiloxKey {
  uint32_t k0, k1;
};

// The streams of the package's own draws, the last word of the counter.
constexpr uint32_t kStreamTimestep = 1, kStreamStrata = 2;

PALP_INLINE PhiloxKey philox_key(int64_t seed) {
  return {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32)};
}

PALP_INLINE PhiloxWords philox(PhiloxWords counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53u) * counter.w0, odd = uint64_t(0xCD9E8D57u) * counter.w2;
    counter = {
        uint32_t(odd >> 32) ^ counter.w1 ^ key.k0, uint32_t(odd), uint32_t(even >> 32) ^ counter.w3 ^ key.k1,
        uint32_t(even)};
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  return counter;
}

// One row of counters [N, 4] under key [2], words held in int64: for tests against known answers.
PALP_INLINE void philox_row(const int64_t* counter, const int64_t* key, int64_t* out) {
  const PhiloxWords words = philox(
      {uint32_t(counter[0]), uint32_t(counter[1]), uint32_t(counter[2]), uint32_t(counter[3])},
      {uint32_t(key[0]), uint32_t(key[1])});
  out[0] = words.w0;
  out[1] = words.w1;
  out[2] = words.w2;
  out[3] = words.w3;
}

// A number that is known on the host, or read where the kernel runs: then a captured graph reads it at every replay.
struct Counter {
  const int64_t* device = nullptr;
  int64_t value = 0;

  PALP_INLINE int64_t get() const { return device ? *device : value; }
};

}  // namespace palp_fast
