// Parts of blocks between codes and floats: eight at a time where the processor can look up eight words at once.
#pragma once

#include "palp_fast/blockwise.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace palp_fast::cpu::PALP_LEVEL {

#ifdef __AVX2__

// level_of, eight times.
template <bool Signed>
struct LevelsOfEight {
  using Map = DynamicMap<Signed>;
  const __m256 width, offset;

  PALP_INLINE explicit LevelsOfEight(const Map& map)
      : width(_mm256_loadu_ps(map.width)), offset(_mm256_loadu_ps(map.offset)) {}

  PALP_INLINE __m256 operator()(const uint8_t* codes) const {
    const __m256i all = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256i distance = _mm256_sub_epi32(all, _mm256_set1_epi32(Map::kZero));
    const __m256i magnitude = Signed ? _mm256_slli_epi32(_mm256_abs_epi32(distance), 1) : all;
    const __m256 n = _mm256_cvtepi32_ps(_mm256_add_epi32(magnitude, _mm256_set1_epi32(1)));
    const __m256i entry = _mm256_srli_epi32(_mm256_castps_si256(n), 23);  // look-ups take its three lowest bits
    const __m256 level =
        _mm256_fmadd_ps(n, _mm256_permutevar8x32_ps(width, entry), _mm256_permutevar8x32_ps(offset, entry));
    if (!Signed) return level;
    return _mm256_or_ps(level, _mm256_and_ps(_mm256_castsi256_ps(distance), _mm256_set1_ps(-0.0f)));
  }
};

// nearest_code of values times inverse, eight times; -1 stands for 0.
template <bool Signed>
struct CodesOfEight {
  using Map = DynamicMap<Signed>;
  const __m256 slope, shift, last, above, inverse;

  PALP_INLINE CodesOfEight(const Map& map, float inverse_scale)
      : slope(_mm256_loadu_ps(map.slope)),
        shift(_mm256_loadu_ps(map.shift)),
        last(_mm256_loadu_ps(map.last)),
        above(_mm256_loadu_ps(map.above)),
        inverse(_mm256_set1_ps(inverse_scale)) {}

  PALP_INLINE __m256i operator()(const float* values) const {
    const __m256 ratio = _mm256_mul_ps(_mm256_loadu_ps(values), inverse);
    const __m256 magnitude = Signed ? _mm256_andnot_ps(_mm256_set1_ps(-0.0f), ratio) : ratio;
    const __m256i half = _mm256_srli_epi32(_mm256_castps_si256(magnitude), 16);
    const __m256i halves = _mm256_subs_epu16(half, _mm256_set1_epi32(Map::kFirstHalf));
    __m256i entry = _mm256_mulhi_epu16(halves, _mm256_set1_epi32(Map::kHalves));
    const __m256 higher = _mm256_cmp_ps(magnitude, _mm256_permutevar8x32_ps(above, entry), _CMP_GT_OQ);
    entry = _mm256_sub_epi32(entry, _mm256_castps_si256(higher));
    const __m256 position = _mm256_fmadd_ps(
        magnitude, _mm256_permutevar8x32_ps(slope, entry), _mm256_permutevar8x32_ps(shift, entry));
    const __m256i distance = _mm256_cvttps_epi32(_mm256_min_ps(position, _mm256_permutevar8x32_ps(last, entry)));
    if (!Signed) return distance;
    const __m256i with_sign = _mm256_sign_epi32(distance, _mm256_castps_si256(ratio));
    return _mm256_add_epi32(with_sign, _mm256_set1_epi32(Map::kZero));
  }
};

#endif

template <bool Signed>
void dequantise(const DynamicMap<Signed>& map, const uint8_t* codes, float scale, int64_t count, float* out) {
  int64_t i = 0;
#ifdef __AVX2__
  const LevelsOfEight<Signed> eight(map);
  const __m256 scales = _mm256_set1_ps(scale);
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_mul_ps(eight(codes + i), scales));
#endif
  for (; i < count; ++i) out[i] = level_of(codes[i], map) * scale;
}

template <bool Signed>
void quantise(const DynamicMap<Signed>& map, const float* values, float scale, int64_t count, uint8_t* codes) {
  const float inverse = inverse_of(scale);
  int64_t i = 0;
#ifdef __AVX2__
  const CodesOfEight<Signed> eight(map, inverse);
  // Packing takes halves of its arguments in turn, and -1 to 0.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; i + 32 <= count; i += 32) {
    const __m256i left = _mm256_packus_epi32(eight(values + i), eight(values + i + 8));
    const __m256i right = _mm256_packus_epi32(eight(values + i + 16), eight(values + i + 24));
    const __m256i ordered = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(left, right), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), ordered);
  }
#endif
  for (; i < count; ++i) codes[i] = nearest_code(values[i] * inverse, map);
}

}  // namespace palp_fast::cpu::PALP_LEVEL
