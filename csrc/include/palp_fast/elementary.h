// Elementary functions that vectorise and give the same bits on every device: + - * /, square roots and multiply-adds
// of one rounding alone. Polynomials are minimax fits of the relative error.
#pragma once

#include <math.h>

#include <cstdint>

#include "palp_fast/convert.h"

namespace palp_fast {

PALP_INLINE float square_root(float value) { return sqrtf(value); }
PALP_INLINE double square_root(double value) { return sqrt(value); }

// log of a normal number in (0, 1], within 1 unit in the last place.
PALP_INLINE float log_of_fraction(float value) {
  // value = 2^exponent (1 + f) with f in [-1/3, 1/3).
  const int32_t bits = int32_t(float_bits(value)), exponent = (bits - 0x3f2aaaab) >> 23;
  const float f = bits_float(uint32_t(bits - exponent * (1 << 23))) - 1.0f;
  float p = -0.1289168505f;
  p = p * f + 0.1398443637f;
  p = p * f - 0.1218426101f;
  p = p * f + 0.1400586910f;
  p = p * f - 0.1668048735f;
  p = p * f + 0.2001040591f;
  p = p * f - 0.2499979767f;
  p = p * f + 0.3333321598f;
  const float square = f * f, e = float(exponent);
  // log 2 in two parts: the product with the first is exact.
  return e * 0.693359375f + (f + (square * (f * p - 0.5f) + e * -2.12194440e-4f));
}

struct SinCos {
  float sin, cos;
};

// Of 2 pi word / 2^32, within 3 units in the last place. The nearest quarter turn is taken off in integers, where
// nothing is rounded.
PALP_INLINE SinCos sincos_of_turn(uint32_t word) {
  const uint32_t quarter = (word + (1u << 29)) >> 30;
  const float x = float(int32_t(word - (quarter << 30))) * 1.46291807926715968e-9f, y = x * x;
  const float sin = x + x * (y * ((-1.95172987016e-4f * y + 8.33217814414e-3f) * y - 0.166666549437f));
  const float cos = 1.0f + y * (y * ((2.44384515951e-5f * y - 1.38873675158e-3f) * y + 4.16666468664e-2f) - 0.5f);
  const uint32_t swap = 0u - (quarter & 1u), sin_bits = float_bits(sin), cos_bits = float_bits(cos);
  const uint32_t negative_sin = (quarter & 2u) << 30, negative_cos = ((quarter + 1u) & 2u) << 30;
  return {
      bits_float(((sin_bits & ~swap) | (cos_bits & swap)) ^ negative_sin),
      bits_float(((cos_bits & ~swap) | (sin_bits & swap)) ^ negative_cos)};
}

// a b + c, rounded once: one instruction, but for old processors, where it is a slow call.
PALP_INLINE float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
PALP_INLINE double fma_of(double a, double b, double c) { return fma(a, b, c); }

// exp, within 1.02 units in the last place; infinite above 88.7, 1.2e-38 below -87.3.
PALP_INLINE float exp_of(float value) {
  const float bounded = value > 88.75f ? 88.75f : value < -87.3f ? -87.3f : value;  // NaN stays
  // Adding 1.5 x 2^23 rounds to a whole number, which then stands in the lowest bits.
  const float shifted = fma_of(bounded, 1.44269502f, 12582912.0f), whole = shifted - 12582912.0f;
  const float r = fma_of(whole, 2.12194440e-4f, fma_of(whole, -0.693359375f, bounded));
  float p = 0.001381461f;
  p = fma_of(p, r, 0.00836871f);
  p = fma_of(p, r, 0.04166839f);
  p = fma_of(p, r, 0.16666521f);
  p = fma_of(p, r, 0.49999994f);
  p = fma_of(r * r, p, r) + 1.0f;
  // In two factors: 2^128 is no float.
  const uint32_t exponent = float_bits(shifted) - 0x4b400000u, half = uint32_t(int32_t(exponent) >> 1);
  return p * bits_float((half + 127u) << 23) * bits_float((exponent - half + 127u) << 23);
}
PALP_INLINE double exp_of(double value) { return exp(value); }

// erf, with an error of at most 7.6e-8: 1 - exp(-x q(x)) for x >= 0, q fitted to the error of the result.
PALP_INLINE float erf_of(float value) {
  const float size = fabsf(value), x = size > 3.95f ? 3.95f : size;  // 1 - 2.3e-8 there
  float q = -8.043861e-6f;
  q = fma_of(q, x, 1.0602699e-4f);
  q = fma_of(q, x, -5.879519e-4f);
  q = fma_of(q, x, 1.5767625e-3f);
  q = fma_of(q, x, -5.8783990e-5f);
  q = fma_of(q, x, -1.9217141e-2f);
  q = fma_of(q, x, 0.10279921f);
  q = fma_of(q, x, 0.63661611f);
  q = fma_of(q, x, 1.1283793f);
  return copysignf(1.0f - exp_of(-x * q), value);
}
PALP_INLINE double erf_of(double value) { return erf(value); }

}  // namespace palp_fast
