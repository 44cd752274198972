// Stored types to computed ones and back: 16-bit floats by bit arithmetic, without branches so that compilers vectorise
// it. Rounds to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "palp_fast/portable.h"

namespace palp_fast {

// Storage types: the bits alone.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

PALP_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

PALP_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PALP_INLINE float widen(float value) { return value; }
PALP_INLINE double widen(double value) { return value; }
PALP_INLINE float widen(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

PALP_INLINE float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  // 2^112 moves the exponent from bias 15 to bias 127, subnormal numbers included.
  const uint32_t finite = float_bits(bits_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_float(finite | special | sign);
}

PALP_INLINE void round_to(double value, double& out) { out = value; }
PALP_INLINE void round_to(double value, float& out) { out = float(value); }

PALP_INLINE void round_to(float value, BFloat16& out) {
  const uint32_t bits = float_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = uint16_t(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PALP_INLINE void round_to(float value, Half& out) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  // One unit in the last place of 0.5f is the spacing of subnormal halves.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

// As PyTorch: fp64 goes to 16 bits by way of fp32.
PALP_INLINE void round_to(double value, BFloat16& out) { round_to(float(value), out); }
PALP_INLINE void round_to(double value, Half& out) { round_to(float(value), out); }
PALP_INLINE void round_to(float value, float& out) { out = value; }
PALP_INLINE void round_to(float value, double& out) { out = double(value); }

}  // namespace palp_fast
