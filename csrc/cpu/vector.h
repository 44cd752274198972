// As many numbers at a time as a register holds, sixteen or eight, with the arithmetic of one: what is written for one
// serves both. PALP_VECTOR is defined where the instruction set has look-ups of eight words.
#pragma once

#include <cstring>

#include "palp_fast/convert.h"
#include "palp_fast/elementary.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#define PALP_VECTOR
#include <immintrin.h>
#endif

namespace palp_fast::cpu::PALP_LEVEL {

// Asks for memory that is read soon. The processor asks by itself, but not across pages, and late for short runs. What
// is no memory of ours does no harm.
PALP_INLINE void ask_for(const void* from, int64_t offset, int64_t count) {
#ifdef PALP_VECTOR
  constexpr int64_t kLine = 64;
  const char* const first = static_cast<const char*>(from) + offset;
  for (int64_t byte = 0; byte < count; byte += kLine) _mm_prefetch(first + byte, _MM_HINT_T0);
#endif
}

// Copies past the caches what is not read soon: memory that is only written is then not read first. Addresses and count
// are multiples of 64 bytes.
PALP_INLINE void stream_bytes(const char* from, int64_t count, char* to) {
#if defined(__AVX512F__)
  for (int64_t byte = 0; byte < count; byte += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + byte), _mm512_loadu_si512(from + byte));
  }
  _mm_sfence();
#elif defined(__AVX2__)
  for (int64_t byte = 0; byte < count; byte += 32) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + byte));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + byte), value);
  }
  _mm_sfence();
#else
  std::memcpy(to, from, size_t(count));
#endif
}

#if defined(__AVX512F__)

constexpr int64_t kWidth = 16;
using FloatRegister = __m512;
using WordRegister = __m512i;
#define PALP_ALL(operation) _mm512_##operation
#define PALP_BITWISE(operation) _mm512_##operation##si512

#elif defined(__AVX2__)

constexpr int64_t kWidth = 8;
using FloatRegister = __m256;
using WordRegister = __m256i;
#define PALP_ALL(operation) _mm256_##operation
#define PALP_BITWISE(operation) _mm256_##operation##si256

#endif

#ifdef PALP_VECTOR

struct Floats {
  FloatRegister value;

  PALP_INLINE Floats(FloatRegister all) : value(all) {}
  PALP_INLINE Floats(float each) : value(PALP_ALL(set1_ps)(each)) {}
};

struct Words {
  WordRegister value;

  PALP_INLINE Words(WordRegister all) : value(all) {}
  PALP_INLINE Words(int32_t each) : value(PALP_ALL(set1_epi32)(each)) {}
};

PALP_INLINE Floats load_floats(const float* from) { return PALP_ALL(loadu_ps)(from); }
PALP_INLINE void store_floats(Floats a, float* to) { PALP_ALL(storeu_ps)(to, a.value); }

PALP_INLINE Floats operator+(Floats a, Floats b) { return PALP_ALL(add_ps)(a.value, b.value); }
PALP_INLINE Floats operator-(Floats a, Floats b) { return PALP_ALL(sub_ps)(a.value, b.value); }
PALP_INLINE Floats operator*(Floats a, Floats b) { return PALP_ALL(mul_ps)(a.value, b.value); }
PALP_INLINE Floats operator/(Floats a, Floats b) { return PALP_ALL(div_ps)(a.value, b.value); }
PALP_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return PALP_ALL(fmadd_ps)(a.value, b.value, c.value); }
PALP_INLINE Floats square_root(Floats a) { return PALP_ALL(sqrt_ps)(a.value); }
PALP_INLINE Floats at_most(Floats a, Floats limit) { return PALP_ALL(min_ps)(a.value, limit.value); }

PALP_INLINE Words operator+(Words a, Words b) { return PALP_ALL(add_epi32)(a.value, b.value); }
PALP_INLINE Words operator-(Words a, Words b) { return PALP_ALL(sub_epi32)(a.value, b.value); }
PALP_INLINE Words operator&(Words a, Words b) { return PALP_BITWISE(and_)(a.value, b.value); }
PALP_INLINE Words operator|(Words a, Words b) { return PALP_BITWISE(or_)(a.value, b.value); }
template <int kBits>
PALP_INLINE Words shifted_down(Words a) {
  return PALP_ALL(srli_epi32)(a.value, kBits);
}
template <int kBits>
PALP_INLINE Words shifted_up(Words a) {
  return PALP_ALL(slli_epi32)(a.value, kBits);
}
PALP_INLINE Words larger(Words a, Words b) { return PALP_ALL(max_epi32)(a.value, b.value); }

// By halves of words, without sign: a - b or 0; the upper half of the product.
PALP_INLINE Words less_by(Words a, Words b) { return PALP_ALL(subs_epu16)(a.value, b.value); }
PALP_INLINE Words upper_product(Words a, Words b) { return PALP_ALL(mulhi_epu16)(a.value, b.value); }

PALP_INLINE Words bits(Floats a) { return PALP_BITWISE(castps_)(a.value); }
PALP_INLINE Floats converted(Words a) { return PALP_ALL(cvtepi32_ps)(a.value); }
PALP_INLINE Words truncated(Floats a) { return PALP_ALL(cvttps_epi32)(a.value); }

#endif

#if defined(__AVX512F__)

PALP_INLINE Floats floats(Words a) { return _mm512_castsi512_ps(a.value); }
PALP_INLINE Words load_halves(const void* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
PALP_INLINE Floats widened(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
PALP_INLINE Words load_bytes(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
PALP_INLINE int32_t largest(Words a) { return _mm512_reduce_max_epi32(a.value); }
PALP_INLINE Words plus_one_where_above(Words count, Floats a, Floats b) {
  const __mmask16 above = _mm512_cmp_ps_mask(a.value, b.value, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(count.value, above, count.value, _mm512_set1_epi32(1));
}
PALP_INLINE Words with_sign_of(Words a, Floats b) {
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(b.value));
  return _mm512_mask_sub_epi32(a.value, negative, _mm512_setzero_si512(), a.value);
}
PALP_INLINE Floats sign_of(Floats a) {
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  const __m512 up = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.value, zero, _CMP_GT_OQ), one);
  return _mm512_mask_sub_ps(up, _mm512_cmp_ps_mask(a.value, zero, _CMP_LT_OQ), zero, one);
}

// Eight floats, looked up by the three lowest bits of each word.
struct Table {
  const __m512 values;

  PALP_INLINE explicit Table(const float* eight) : values(_mm512_broadcast_f32x8(_mm256_loadu_ps(eight))) {}
  PALP_INLINE Floats operator[](Words entry) const { return _mm512_permutexvar_ps(entry.value, values); }
};

// Four vectors of words as bytes, what is below 0 as 0.
PALP_INLINE void store_bytes(Words a, Words b, Words c, Words d, uint8_t* to) {
  const __m512i left = _mm512_packus_epi32(a.value, b.value), right = _mm512_packus_epi32(c.value, d.value);
  // Packing takes 128 bits of its arguments in turn.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(left, right)));
}

#elif defined(__AVX2__)

PALP_INLINE Floats floats(Words a) { return _mm256_castsi256_ps(a.value); }
PALP_INLINE Words load_halves(const void* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
PALP_INLINE Floats widened(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
PALP_INLINE Words load_bytes(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
PALP_INLINE int32_t largest(Words a) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(a.value), _mm256_extracti128_si256(a.value, 1));
  const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1)));
}
PALP_INLINE Words plus_one_where_above(Words count, Floats a, Floats b) {
  return _mm256_sub_epi32(count.value, _mm256_castps_si256(_mm256_cmp_ps(a.value, b.value, _CMP_GT_OQ)));
}
PALP_INLINE Words with_sign_of(Words a, Floats b) { return _mm256_sign_epi32(a.value, _mm256_castps_si256(b.value)); }
PALP_INLINE Floats sign_of(Floats a) {
  const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1.0f);
  const __m256 up = _mm256_and_ps(_mm256_cmp_ps(a.value, zero, _CMP_GT_OQ), one);
  return _mm256_sub_ps(up, _mm256_and_ps(_mm256_cmp_ps(a.value, zero, _CMP_LT_OQ), one));
}

// Eight floats, looked up by the three lowest bits of each word.
struct Table {
  const __m256 values;

  PALP_INLINE explicit Table(const float* eight) : values(_mm256_loadu_ps(eight)) {}
  PALP_INLINE Floats operator[](Words entry) const { return _mm256_permutevar8x32_ps(values, entry.value); }
};

// Four vectors of words as bytes, what is below 0 as 0.
PALP_INLINE void store_bytes(Words a, Words b, Words c, Words d, uint8_t* to) {
  const __m256i left = _mm256_packus_epi32(a.value, b.value), right = _mm256_packus_epi32(c.value, d.value);
  // Packing takes 128 bits of its arguments in turn.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(left, right), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
}

#endif

#ifdef PALP_VECTOR

// As many stored numbers as a register holds, without rounding.
PALP_INLINE Floats widened(const float* from) { return load_floats(from); }
PALP_INLINE Floats widened(const BFloat16* from) { return floats(shifted_up<16>(load_halves(from))); }

#endif

}  // namespace palp_fast::cpu::PALP_LEVEL
