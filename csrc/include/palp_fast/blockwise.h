// Block-wise 8-bit quantisation with the dynamic map of palp_fast/reference/blockwise.py (Dettmers et al.,
// arXiv 2110.02861): value = level[code] scale, scale = the largest magnitude of the block.
#pragma once

#include <cmath>
#include <cstring>

#include "palp_fast/convert.h"

namespace palp_fast {

// Levels are linear in the code within each of seven decades, so both directions are a multiply-add with constants of
// the decade. Eight entries per table fit in one vector register. Every multiply-add rounds once.
template <bool Signed>
struct alignas(32) DynamicMap {
  static constexpr int kDecades = 7;
  static constexpr int kZero = Signed ? 127 : 0;  // the code of 0
  static constexpr int kLast = 255 - kZero;  // code - kZero of 1
  // Upper halves of floats: 160 / 2^16 of the distance from kFirstHalf, rounded down, is the entry below or one less.
  static constexpr int32_t kFirstHalf = 13600, kHalves = 160;

  // Level of n = code + 1, or of n = 2 |code - 127| + 1 without its sign: width n + offset. Entry: exponent of n mod 8.
  float width[8] = {}, offset[8] = {};
  // |code - kZero| for a ratio: floor(min(slope ratio + shift, last)). Entry: 0 for the lowest decade and what is
  // below, 7 for what is nearest to 1.
  float slope[8] = {}, shift[8] = {}, last[8] = {};
  float above[8] = {};  // the entry holds ratios up to this

  constexpr DynamicMap() {
    constexpr double kPowers[kDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    double highest = 0;  // level of the decade below
    for (int decade = 0; decade < kDecades; ++decade) {
      const int cells = Signed ? 1 << decade : 2 << decade;
      const int first = Signed ? 2 * cells + 1 : cells, step = Signed ? 2 : 1;  // of n
      const int code = Signed ? cells : cells - 1;
      const double cell = kPowers[decade] * 0.9 / cells, low = kPowers[decade] * 0.1 + cell / 2;
      width[decade] = float(cell / step);
      offset[decade] = float(low - double(width[decade]) * first);
      if (decade > 0) above[decade - 1] = float((highest + double(level(first, decade))) / 2);
      highest = double(level(first + step * (cells - 1), decade));
      slope[decade] = float(1 / cell);
      shift[decade] = float(code - cells / 9.0);
      last[decade] = float(code + cells - 1) + 0.5f;
    }
    // The line of the lowest decade goes through the boundaries around its first level.
    const double lowest = double(level(Signed ? 3 : 2, 0)), start = lowest / 2;
    const double end = Signed ? lowest : (lowest + double(level(3, 0))) / 2;
    slope[0] = float(1 / (end - start));
    shift[0] = float(1 - start / (end - start));
    width[7] = Signed ? 1 / 256.0f : 1 / 255.0f;  // 0 for n = 1, and 1 for the last code
    offset[7] = -width[7];
    above[6] = float((highest + 1) / 2);
    above[7] = INFINITY;
    shift[7] = last[7] = float(kLast);
  }

 private:
  // The product of a float and a byte, and the sum, are exact in double.
  constexpr float level(int n, int entry) const {
    return float(double(n) * double(width[entry]) + double(offset[entry]));
  }
};

// a b + c, rounded once. Exact in double for the values of a DynamicMap, where there is no instruction for it.
PALP_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return float(double(a) * double(b) + double(c));
#endif
}

template <bool Signed>
PALP_INLINE float level_of(uint8_t code, const DynamicMap<Signed>& map) {
  const int32_t distance = int32_t(code) - DynamicMap<Signed>::kZero, sign = distance >> 31;  // 0 or -1
  const float n = float(Signed ? 2 * ((distance ^ sign) - sign) + 1 : distance + 1);
  const uint32_t entry = (float_bits(n) >> 23) & 7;
  const float level = multiply_add(n, map.width[entry], map.offset[entry]);
  return bits_float(float_bits(level) | (uint32_t(sign) & 0x80000000u));
}

// The code of the level nearest to ratio in [-1, 1], in [0, 1] if unsigned.
template <bool Signed>
PALP_INLINE uint8_t nearest_code(float ratio, const DynamicMap<Signed>& map) {
  const uint32_t bits = float_bits(ratio) & 0x7fffffffu;
  const int32_t sign = int32_t(float_bits(ratio)) >> 31;
  const float magnitude = bits_float(bits);
  const int32_t half = int32_t(bits >> 16) - DynamicMap<Signed>::kFirstHalf;
  int32_t entry = (half > 0 ? half : 0) * DynamicMap<Signed>::kHalves >> 16 & 7;
  entry += magnitude > map.above[entry];
  const float position = multiply_add(magnitude, map.slope[entry], map.shift[entry]);
  const int32_t distance = int32_t(position < map.last[entry] ? position : map.last[entry]);
  const int32_t code = DynamicMap<Signed>::kZero + ((distance ^ sign) - sign);
  return uint8_t(code < 0 ? 0 : code);  // there is no level at -1
}

// The factor from values to ratios. A block whose largest magnitude is 0, or subnormal, counts as zero.
PALP_INLINE float inverse_of(float scale) { return scale >= 0x1p-126f ? 1 / scale : 0.0f; }

}  // namespace palp_fast
