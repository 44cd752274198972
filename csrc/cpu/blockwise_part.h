// Part of a block between codes and floats: eight at a time where the processor can look up eight words at once.
#pragma once

#include "palp_fast/blockwise.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace palp_fast::cpu::PALP_LEVEL {

#ifdef __AVX2__

// The tables of a map, one register each, and the functions of blockwise.h on eight values.
template <bool Signed>
struct Lanes {
  using Map = DynamicMap<Signed>;
  const Map& map;

  PALP_INLINE static __m256 look_up(const float* table, __m256i entries) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), entries);
  }

  PALP_INLINE __m256 levels(const uint8_t* codes) const {
    const __m256i all = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256i distance = _mm256_sub_epi32(all, _mm256_set1_epi32(Map::kZero));
    const __m256i magnitude = Signed ? _mm256_slli_epi32(_mm256_abs_epi32(distance), 1) : all;
    const __m256 n = _mm256_cvtepi32_ps(_mm256_add_epi32(magnitude, _mm256_set1_epi32(1)));
    const __m256i entries = _mm256_srli_epi32(_mm256_castps_si256(n), 23);
    const __m256 level = _mm256_fmadd_ps(n, look_up(map.width, entries), look_up(map.offset, entries));
    if (!Signed) return level;
    return _mm256_or_ps(level, _mm256_and_ps(_mm256_castsi256_ps(distance), _mm256_set1_ps(-0.0f)));
  }

  PALP_INLINE __m256i codes(__m256 ratio) const {
    const __m256 magnitude = Signed ? _mm256_andnot_ps(_mm256_set1_ps(-0.0f), ratio) : ratio;
    const __m256i half = _mm256_srli_epi32(_mm256_castps_si256(magnitude), 16);
    const __m256i distance_up = _mm256_subs_epu16(half, _mm256_set1_epi32(Map::kFirstHalf));
    __m256i decade = _mm256_mulhi_epu16(distance_up, _mm256_set1_epi32(Map::kHalves));
    const __m256 higher = _mm256_cmp_ps(magnitude, look_up(map.above, decade), _CMP_GT_OQ);
    decade = _mm256_sub_epi32(decade, _mm256_castps_si256(higher));
    const __m256 position = _mm256_fmadd_ps(magnitude, look_up(map.slope, decade), look_up(map.shift, decade));
    __m256i distance = _mm256_cvttps_epi32(_mm256_min_ps(position, look_up(map.last, decade)));
    if (Signed) distance = _mm256_sign_epi32(distance, _mm256_castps_si256(ratio));
    const __m256 nearest_to_one = _mm256_cmp_ps(ratio, _mm256_set1_ps(map.one), _CMP_GT_OQ);
    const __m256i code = _mm256_add_epi32(distance, _mm256_set1_epi32(Map::kZero));
    return _mm256_sub_epi32(code, _mm256_castps_si256(nearest_to_one));
  }

  PALP_INLINE __m256i codes_of_values(const float* values, __m256 inverse) const {
    return codes(_mm256_mul_ps(_mm256_loadu_ps(values), inverse));
  }
};

#endif

template <bool Signed>
void dequantise(const DynamicMap<Signed>& map, const uint8_t* codes, float scale, int64_t count, float* out) {
  int64_t i = 0;
#ifdef __AVX2__
  const Lanes<Signed> lanes{map};
  const __m256 scales = _mm256_set1_ps(scale);
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_mul_ps(lanes.levels(codes + i), scales));
#endif
  for (; i < count; ++i) out[i] = level_of(codes[i], map) * scale;
}

template <bool Signed>
void quantise(const DynamicMap<Signed>& map, const float* values, float scale, int64_t count, uint8_t* codes) {
  const float inverse = inverse_of(scale);
  int64_t i = 0;
#ifdef __AVX2__
  const Lanes<Signed> lanes{map};
  const __m256 inverses = _mm256_set1_ps(inverse);
  // Packing takes halves of its arguments in turn.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; i + 32 <= count; i += 32) {
    const __m256i a = lanes.codes_of_values(values + i, inverses), b = lanes.codes_of_values(values + i + 8, inverses);
    const __m256i c = lanes.codes_of_values(values + i + 16, inverses);
    const __m256i d = lanes.codes_of_values(values + i + 24, inverses);
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    const __m256i ordered = _mm256_permutevar8x32_epi32(packed, order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), ordered);
  }
#endif
  for (; i < count; ++i) codes[i] = nearest_code(values[i] * inverse, map);
}

}  // namespace palp_fast::cpu::PALP_LEVEL
