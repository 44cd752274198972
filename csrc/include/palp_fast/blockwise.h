// Block-wise 8-bit quantisation with the dynamic map of palp_fast/reference/blockwise.py (Dettmers et al.,
// arXiv 2110.02861): value = level[code] scale, scale = the largest magnitude of the block.
#pragma once

#include "palp_fast/convert.h"

namespace palp_fast {

constexpr int kDecades = 7;

// The bits of a float in [2^-126, 2), at compile time.
PALP_INLINE constexpr uint32_t bits_at_compile_time(float value) {
  uint32_t exponent = 127;
  for (; value < 1; value *= 2) --exponent;
  return (exponent << 23) + uint32_t((value - 1) * 0x1p23f);
}

// Both directions of the map. A magnitude's code is found without a search: its upper bits ("key") choose a word that
// holds the number of boundaries below the key's range and, by carry, whether the lower bits lie above the one
// boundary that the range may hold.
template <bool Signed>
struct DynamicMap {
  static constexpr int kMagnitudes = Signed ? 128 : 255;  // levels above 0
  static constexpr int kZero = Signed ? 127 : 0;  // the code of 0
  static constexpr int kLowBits = Signed ? 17 : 16;  // no two boundaries share the bits above these
  static constexpr uint32_t kLowMask = (1u << kLowBits) - 1;
  static constexpr int32_t kLastKey = 0x3f800000 >> kLowBits;  // of 1
  static constexpr int32_t kFirstKey = (Signed ? 0x34800000 : 0x34000000) >> kLowBits;  // 2^-22, 2^-23: code of 0
  static constexpr int kKeys = kLastKey - kFirstKey + 1;

  float levels[256] = {};
  uint32_t words[kKeys] = {};

  constexpr DynamicMap() {
    constexpr double kPowers[kDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    int code = kZero + 1;
    for (int decade = 0; decade < kDecades; ++decade) {
      const int cells = Signed ? 1 << decade : 2 << decade;
      const double width = 0.9 / cells;
      for (int cell = 0; cell < cells; ++cell) levels[code++] = float(kPowers[decade] * (0.1 + (cell + 0.5) * width));
    }
    levels[code] = 1;  // without a negative counterpart
    for (int k = 1; Signed && k <= kZero; ++k) levels[kZero - k] = -levels[kZero + k];

    uint32_t below = 0;
    for (int i = 0; i < kKeys; ++i) {
      words[i] = below << kLowBits;
      if (int(below) == kMagnitudes) continue;
      const uint32_t boundary = bits_at_compile_time((levels[kZero + below] + levels[kZero + below + 1]) / 2);
      if (int32_t(boundary >> kLowBits) == kFirstKey + i) words[i] = (below++ << kLowBits) + kLowMask - (boundary & kLowMask);
    }
  }
};

// The code of the level nearest to ratio in [-1, 1] (in [0, 1] if unsigned); half-way, the lower one. words: of the map.
template <bool Signed>
PALP_INLINE uint8_t nearest_code(float ratio, const uint32_t* words) {
  using Map = DynamicMap<Signed>;
  const int32_t bits = int32_t(float_bits(ratio));
  const int32_t sign = Signed ? bits >> 31 : 0;  // 0 or -1
  // One unit more makes the half-way case of a negative value fall to the larger magnitude.
  const int32_t magnitude = (bits & 0x7fffffff) - sign;
  int32_t key = (magnitude >> Map::kLowBits) - Map::kFirstKey;
  key = key < 0 ? 0 : key;
  key = key < Map::kKeys ? key : Map::kKeys - 1;
  const int32_t count = int32_t((words[key] + (uint32_t(magnitude) & Map::kLowMask)) >> Map::kLowBits);
  const int32_t code = Map::kZero + ((count ^ sign) - sign);
  return uint8_t(code < 0 ? 0 : code);
}

// The factor from values to ratios. A block whose largest magnitude is 0, or subnormal, counts as zero.
PALP_INLINE float inverse_of(float scale) { return scale >= 0x1p-126f ? 1 / scale : 0.0f; }

}  // namespace palp_fast
