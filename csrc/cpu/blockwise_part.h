// Between codes and floats, a vector at a time.
#pragma once

#include "palp_fast/blockwise.h"
#include "vector.h"

namespace palp_fast::cpu::PALP_LEVEL {

#ifdef PALP_VECTOR

// level_of for a vector of codes, times a scale.
template <bool Signed>
struct VectorLevels {
  using Map = DynamicMap<Signed>;
  const Table width, offset;
  const Floats scale;

  PALP_INLINE VectorLevels(const Map& map, float scale_of_block)
      : width(map.width), offset(map.offset), scale(scale_of_block) {}

  PALP_INLINE Floats operator()(const uint8_t* codes) const {
    const Floats distance = converted(load_bytes(codes) - Words(Map::kZero));
    const Floats magnitude = Signed ? floats(bits(distance) & Words(0x7fffffff)) : distance;
    const Floats n = Signed ? multiply_add(magnitude, 2.0f, 1.0f) : magnitude + 1.0f;
    const Words entry = shifted_down<23>(bits(n));
    const Floats level = multiply_add(n, width[entry], offset[entry]);
    if (!Signed) return level * scale;
    return floats(bits(level) | (bits(distance) & Words(INT32_MIN))) * scale;
  }
};

// nearest_code for a vector of values times the inverse of a scale; -1 stands for 0.
template <bool Signed>
struct VectorCodes {
  using Map = DynamicMap<Signed>;
  const Table slope, shift, last, above;
  const Floats inverse;

  PALP_INLINE VectorCodes(const Map& map, float scale_of_block)
      : slope(map.slope), shift(map.shift), last(map.last), above(map.above), inverse(inverse_of(scale_of_block)) {}

  PALP_INLINE Words operator()(Floats value) const {
    const Floats ratio = value * inverse;
    const Floats magnitude = Signed ? floats(bits(ratio) & Words(0x7fffffff)) : ratio;
    const Words halves = less_by(shifted_down<16>(bits(magnitude)), Words(Map::kFirstHalf));
    const Words below = upper_product(halves, Words(Map::kHalves));
    const Words entry = plus_one_where_above(below, magnitude, above[below]);
    const Floats position = multiply_add(magnitude, slope[entry], shift[entry]);
    const Words distance = truncated(at_most(position, last[entry]));
    return Signed ? with_sign_of(distance, ratio) + Words(Map::kZero) : distance;
  }

  // kWidth codes for each of four vectors.
  PALP_INLINE void operator()(const float* values, uint8_t* codes) const {
    const VectorCodes& code = *this;
    store_bytes(
        code(load_floats(values)), code(load_floats(values + kWidth)), code(load_floats(values + 2 * kWidth)),
        code(load_floats(values + 3 * kWidth)), codes);
  }
};

#endif

}  // namespace palp_fast::cpu::PALP_LEVEL
