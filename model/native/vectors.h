// Sixteen numbers at a time, in whatever registers the target has. Every operation rounds as IEEE 754 says and every sum
// has one order, so that the same arithmetic gives the same bits on each instruction set: tests hold them to the scalar one.
//
// Included by one kernels_*.cpp per instruction set, which defines the macro TOPKAPI_LEVEL. Nothing here may come from the C++
// library: what it inlines would be shared with code for other processors.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LEVEL_SCALAR 0
#define LEVEL_AVX2 1
#define LEVEL_AVX_VNNI 2
#define LEVEL_AVX512_VNNI 3
#define LEVEL_AMX 4

#if TOPKAPI_LEVEL > LEVEL_SCALAR
#include <immintrin.h>
#endif

#include "halves.h"

enum { LANES = 16 };

INLINE void prefetch(const void *from) { __builtin_prefetch(from); }
// To the cache behind the first.
INLINE void prefetch_early(const void *from) { __builtin_prefetch(from, 0, 2); }
INLINE void prefetch_to_write(const void *to) { __builtin_prefetch(to, 1); }

#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI

typedef __m512 Floats;
typedef __m512i Integers;

INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats all(float x) { return _mm512_set1_ps(x); }
INLINE Floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
INLINE Floats load_half(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE Floats load_bfloat(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE void store_half(uint16_t *to, Floats x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE Floats load_byte_floats(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats largest(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats absolute(Floats a) { return _mm512_abs_ps(a); }
INLINE Integers no_integers() { return _mm512_setzero_si512(); }
INLINE Integers load_integers(const int32_t *from) { return _mm512_loadu_si512(from); }
INLINE Integers add_integers(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
INLINE Integers sub_integers(Integers a, Integers b) { return _mm512_sub_epi32(a, b); }
INLINE Integers times_256(Integers a) { return _mm512_slli_epi32(a, 8); }
// The nearest multiples of 256, divided by it.
INLINE Integers higher_bytes(Integers a) { return _mm512_srai_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(128)), 8); }
INLINE Integers rounded(Floats a) { return _mm512_cvtps_epi32(a); }
INLINE Floats floats(Integers a) { return _mm512_cvtepi32_ps(a); }
INLINE Floats power_of_two(Integers a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23));
}
INLINE void store_bytes(int8_t *to, Integers a) { _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(a)); }

#elif TOPKAPI_LEVEL >= LEVEL_AVX2

typedef struct { __m256 a, b; } Floats;
typedef struct { __m256i a, b; } Integers;

#define PAIR(type, low, high) ((type){(low), (high)})
INLINE Floats zeros() { return PAIR(Floats, _mm256_setzero_ps(), _mm256_setzero_ps()); }
INLINE Floats all(float x) { return PAIR(Floats, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE Floats load(const float *from) { return PAIR(Floats, _mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)); }
INLINE void store(float *to, Floats x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
INLINE Floats load_half(const uint16_t *from) {
    return PAIR(Floats, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8))));
}
INLINE __m256 bfloats(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}
INLINE Floats load_bfloat(const uint16_t *from) { return PAIR(Floats, bfloats(from), bfloats(from + 8)); }
INLINE void store_half(uint16_t *to, Floats x) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(to + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m256 byte_floats(const int8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}
INLINE Floats load_byte_floats(const int8_t *from) { return PAIR(Floats, byte_floats(from), byte_floats(from + 8)); }
INLINE Floats add(Floats x, Floats y) { return PAIR(Floats, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE Floats sub(Floats x, Floats y) { return PAIR(Floats, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
INLINE Floats mul(Floats x, Floats y) { return PAIR(Floats, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE Floats divide(Floats x, Floats y) { return PAIR(Floats, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
INLINE Floats fma(Floats x, Floats y, Floats z) {
    return PAIR(Floats, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
INLINE Floats largest(Floats x, Floats y) { return PAIR(Floats, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE Floats least(Floats x, Floats y) { return PAIR(Floats, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
INLINE Floats absolute(Floats x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return PAIR(Floats, _mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}
INLINE Integers no_integers() { return PAIR(Integers, _mm256_setzero_si256(), _mm256_setzero_si256()); }
INLINE Integers load_integers(const int32_t *from) {
    return PAIR(Integers, _mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 8)));
}
INLINE Integers add_integers(Integers x, Integers y) {
    return PAIR(Integers, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b));
}
INLINE Integers sub_integers(Integers x, Integers y) {
    return PAIR(Integers, _mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b));
}
INLINE Integers times_256(Integers x) { return PAIR(Integers, _mm256_slli_epi32(x.a, 8), _mm256_slli_epi32(x.b, 8)); }
INLINE Integers higher_bytes(Integers x) {
    __m256i half = _mm256_set1_epi32(128);
    return PAIR(Integers, _mm256_srai_epi32(_mm256_add_epi32(x.a, half), 8), _mm256_srai_epi32(_mm256_add_epi32(x.b, half), 8));
}
// As numbers of sixteen bits, of each four the second and the third changed over.
INLINE void store_crossed(int16_t *to, Integers x) {
    __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11,
                                     14, 15);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm256_storeu_si256((__m256i *)to, _mm256_shuffle_epi8(words, order));
}
INLINE Integers rounded(Floats x) { return PAIR(Integers, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
INLINE Floats floats(Integers x) { return PAIR(Floats, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE __m256 eight_powers(__m256i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(127)), 23));
}
INLINE Floats power_of_two(Integers x) { return PAIR(Floats, eight_powers(x.a), eight_powers(x.b)); }
INLINE void store_bytes(int8_t *to, Integers x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128((__m128i *)to, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#else

typedef struct { float at[LANES]; } Floats;
typedef struct { int32_t at[LANES]; } Integers;

#define EACH_OF(count, type, expression)                                                                               \
    do {                                                                                                               \
        type result;                                                                                                   \
        for (int i = 0; i < (count); i++) result.at[i] = (expression);                                                 \
        return result;                                                                                                 \
    } while (0)
#define EACH(type, expression) EACH_OF(LANES, type, expression)
INLINE Floats zeros() { EACH(Floats, 0.0f); }
INLINE Floats all(float x) { EACH(Floats, x); }
INLINE Floats load(const float *from) { EACH(Floats, from[i]); }
INLINE void store(float *to, Floats x) { memcpy(to, x.at, sizeof x.at); }
INLINE Floats load_half(const uint16_t *from) { EACH(Floats, float_from_half(from[i])); }
INLINE Floats load_bfloat(const uint16_t *from) { EACH(Floats, float_from_bfloat(from[i])); }
INLINE void store_half(uint16_t *to, Floats x) {
    for (int i = 0; i < LANES; i++) to[i] = half_from_float(x.at[i]);
}
INLINE Floats load_byte_floats(const int8_t *from) { EACH(Floats, (float)from[i]); }
INLINE Floats add(Floats a, Floats b) { EACH(Floats, a.at[i] + b.at[i]); }
INLINE Floats sub(Floats a, Floats b) { EACH(Floats, a.at[i] - b.at[i]); }
INLINE Floats mul(Floats a, Floats b) { EACH(Floats, a.at[i] * b.at[i]); }
INLINE Floats divide(Floats a, Floats b) { EACH(Floats, a.at[i] / b.at[i]); }
INLINE Floats fma(Floats a, Floats b, Floats c) { EACH(Floats, __builtin_fmaf(a.at[i], b.at[i], c.at[i])); }
// As the instructions do: where one is no number, the second is taken.
INLINE Floats largest(Floats a, Floats b) { EACH(Floats, a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }
INLINE Floats least(Floats a, Floats b) { EACH(Floats, a.at[i] < b.at[i] ? a.at[i] : b.at[i]); }
INLINE Floats absolute(Floats a) { EACH(Floats, __builtin_fabsf(a.at[i])); }
INLINE Integers no_integers() { EACH(Integers, 0); }
INLINE Integers load_integers(const int32_t *from) { EACH(Integers, from[i]); }
INLINE Integers add_integers(Integers a, Integers b) { EACH(Integers, a.at[i] + b.at[i]); }
INLINE void store_crossed(int16_t *to, Integers a) {
    for (int i = 0; i < LANES; i++) to[i] = (int16_t)a.at[i % 4 == 1 ? i + 1 : i % 4 == 2 ? i - 1 : i];
}
INLINE int32_t nearest(float x) { return x >= -0x1p31f && x < 0x1p31f ? (int32_t)__builtin_rintf(x) : INT32_MIN; }
INLINE Integers rounded(Floats a) { EACH(Integers, nearest(a.at[i])); }
INLINE Floats floats(Integers a) { EACH(Floats, (float)a.at[i]); }
INLINE float power(int32_t exponent) {
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE Floats power_of_two(Integers a) { EACH(Floats, power(a.at[i])); }
INLINE void store_bytes(int8_t *to, Integers a) {
    for (int i = 0; i < LANES; i++) to[i] = (int8_t)(a.at[i] > 127 ? 127 : a.at[i] < -128 ? -128 : a.at[i]);
}

#endif

// The sum of sixteen lanes, in one order everywhere: halves upon halves.
INLINE float total(Floats x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// The largest of sixteen lanes, and sums of integers: the same in every order, where all are numbers.
#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
INLINE float largest_lane(Floats x) { return _mm512_reduce_max_ps(x); }
INLINE int32_t total_integers(Integers x) { return _mm512_reduce_add_epi32(x); }
#else
INLINE float largest_lane(Floats x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}
INLINE int32_t total_integers(Integers x) {
    uint32_t lanes[LANES], sum = 0;
    memcpy(lanes, &x, sizeof lanes);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return (int32_t)sum;
}
#endif

// exp(x) to within 2 units in the last place; 0 below -87 and finite above 88 (Cody and Waite's reduction, a polynomial of degree 6).
INLINE Floats exponential(Floats x) {
    // The second operand is what remains of one that is no number.
    x = least(all(88.0f), largest(all(-87.0f), x));
    Floats turns = floats(rounded(mul(x, all(1.44269504088896341f))));
    Floats rest = fma(turns, all(-0.693359375f), x);
    rest = fma(turns, all(2.12194440e-4f), rest);
    Floats y = all(1.9875691500e-4f);
    y = fma(y, rest, all(1.3981999507e-3f));
    y = fma(y, rest, all(8.3334519073e-3f));
    y = fma(y, rest, all(4.1665795894e-2f));
    y = fma(y, rest, all(1.6666665459e-1f));
    y = fma(y, rest, all(5.0000001201e-1f));
    y = fma(y, mul(rest, rest), add(rest, all(1.0f)));
    return mul(y, power_of_two(rounded(turns)));
}
