// Elementary functions that vectorise and give the same bits on every device: + - * and square roots alone. Polynomials
// are minimax fits of the relative error.
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

}  // namespace palp_fast
