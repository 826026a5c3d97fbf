// Products of bytes summed into integers, sixteen outputs at a time: four inputs into each of sixteen 32-bit lanes.
// Sums of integers are exact, so each instruction set may add as suits it.
#pragma once

#include "core.h"
#include "vectors.h"

// `Quads` are four bytes for each of sixteen outputs. `load_bytes` brings weights of eight bits, packed with `FLIP`, into the form that
// is multiplied, in which they are larger by `LIFTED`. Sixteen steps and offsets, spread by `spread_steps` and `spread_offsets`, make such
// weights of nibbles: `stretched`.
//
// Numbers of sixteen bits of rows are put into their pieces by `store_wide`, which adds up what `begin_wide` makes up for where weights
// are lifted. `Wide` is the sum of their products with weights, `Four` four of a row's numbers sixteen times, and `Ready` weights in the
// form in which they are multiplied with those.

#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI

typedef __m512i Quads;
INLINE Quads load_quads(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE void store_quads(uint8_t *to, Quads x) { _mm512_storeu_si512(to, x); }
#if TOPKAPI_LEVEL >= LEVEL_AMX
// Tiles multiply signed bytes.
enum { FLIP = 0 };
INLINE Quads load_bytes(const uint8_t *from) { return _mm512_xor_si512(load_quads(from), _mm512_set1_epi8(-128)); }
#else
enum { FLIP = 128 };
INLINE Quads load_bytes(const uint8_t *from) { return load_quads(from); }
#endif
INLINE Quads four_bytes(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}
INLINE Quads low_nibbles(Quads x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Quads high_nibbles(Quads x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
INLINE Quads spread(const uint8_t *from, __m512i pattern) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)from)), pattern);
}
// The steps of sixteen outputs twice in their lanes, sixteen bits each; the offsets four times, a byte each.
INLINE Quads spread_steps(const uint8_t *from) {
    const int no = (int)0x80008000;
    return spread(from, _mm512_or_si512(_mm512_set1_epi32(no), _mm512_set_epi32(0xf000f, 0xe000e, 0xd000d, 0xc000c, 0xb000b, 0xa000a,
        0x90009, 0x80008, 0x70007, 0x60006, 0x50005, 0x40004, 0x30003, 0x20002, 0x10001, 0)));
}
INLINE Quads spread_signed(const uint8_t *from) {
    return spread(from, _mm512_set_epi32(0xf0f0f0f, 0xe0e0e0e, 0xd0d0d0d, 0xc0c0c0c, 0xb0b0b0b, 0xa0a0a0a, 0x9090909, 0x8080808,
        0x7070707, 0x6060606, 0x5050505, 0x4040404, 0x3030303, 0x2020202, 0x1010101, 0));
}
INLINE Quads spread_offsets(const uint8_t *from) { return _mm512_xor_si512(spread_signed(from), _mm512_set1_epi8(-128)); }
INLINE Quads stretched(Quads nibbles, Quads steps, Quads offsets) {
    return _mm512_add_epi8(_mm512_mullo_epi16(nibbles, steps), offsets);
}
INLINE Integers all_integers(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Integers add_bytes(Integers sum, Quads row, Quads weights) { return _mm512_dpbusd_epi32(sum, weights, row); }

#elif TOPKAPI_LEVEL >= LEVEL_AVX2

typedef Integers Quads;
INLINE Quads load_quads(const uint8_t *from) { return load_integers((const int32_t *)from); }
INLINE void store_quads(uint8_t *to, Quads x) {
    _mm256_storeu_si256((__m256i *)to, x.a);
    _mm256_storeu_si256((__m256i *)(to + 32), x.b);
}
INLINE Quads load_bytes(const uint8_t *from) { return load_quads(from); }
INLINE Quads four_bytes(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    __m256i all_alike = _mm256_set1_epi32(four);
    return PAIR(Quads, all_alike, all_alike);
}
INLINE Quads low_nibbles(Quads x) {
    __m256i mask = _mm256_set1_epi8(15);
    return PAIR(Quads, _mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
}
INLINE Quads high_nibbles(Quads x) {
    return low_nibbles(PAIR(Quads, _mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)));
}
INLINE Quads spread(const uint8_t *from, __m256i low, __m256i high) {
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
    return PAIR(Quads, _mm256_shuffle_epi8(twice, low), _mm256_shuffle_epi8(twice, high));
}
INLINE Quads spread_steps(const uint8_t *from) {
    __m256i no = _mm256_set1_epi32((int)0x80008000);
    __m256i low = _mm256_set_epi32(0x70007, 0x60006, 0x50005, 0x40004, 0x30003, 0x20002, 0x10001, 0);
    return spread(from, _mm256_or_si256(low, no), _mm256_or_si256(_mm256_add_epi32(low, _mm256_set1_epi32(0x80008)), no));
}
INLINE Quads spread_signed(const uint8_t *from) {
    __m256i low = _mm256_set_epi32(0x7070707, 0x6060606, 0x5050505, 0x4040404, 0x3030303, 0x2020202, 0x1010101, 0);
    return spread(from, low, _mm256_add_epi32(low, _mm256_set1_epi32(0x8080808)));
}
INLINE Quads stretched(Quads nibbles, Quads steps, Quads offsets) {
    return PAIR(Quads, _mm256_add_epi8(_mm256_mullo_epi16(nibbles.a, steps.a), offsets.a),
                _mm256_add_epi8(_mm256_mullo_epi16(nibbles.b, steps.b), offsets.b));
}
INLINE Integers all_integers(int32_t x) { return PAIR(Integers, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }

#if TOPKAPI_LEVEL >= LEVEL_AVX_VNNI

enum { FLIP = 128 };
INLINE Quads spread_offsets(const uint8_t *from) {
    Quads offsets = spread_signed(from);
    __m256i sign = _mm256_set1_epi8(-128);
    return PAIR(Quads, _mm256_xor_si256(offsets.a, sign), _mm256_xor_si256(offsets.b, sign));
}
INLINE Integers add_bytes(Integers sum, Quads row, Quads weights) {
    return PAIR(Integers, _mm256_dpbusd_avx_epi32(sum.a, weights.a, row.a),
                _mm256_dpbusd_avx_epi32(sum.b, weights.b, row.b));
}

#else

enum { FLIP = 0 };
INLINE Quads spread_offsets(const uint8_t *from) { return spread_signed(from); }
// Left to themselves, compilers put off what is added to `sum` until all products are there, for which there are no registers.
INLINE __m256i add_in_order(__m256i sum, __m256i products) {
    sum = _mm256_add_epi32(sum, products);
    asm("" : "+x"(sum));
    return sum;
}
// Signed bytes from -127 to 127: magnitudes by what has the signs of both. Sums of two products fit into sixteen bits.
INLINE __m256i eight_bytes(__m256i sum, __m256i row, __m256i weights) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(row, weights));
    return add_in_order(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE Integers add_bytes(Integers sum, Quads row, Quads weights) {
    return PAIR(Integers, eight_bytes(sum.a, row.a, weights.a), eight_bytes(sum.b, row.b, weights.b));
}
#endif

#else

enum { FLIP = 0 };
typedef struct { int8_t at[4 * LANES]; } Quads;
INLINE Quads load_quads(const uint8_t *from) {
    Quads result;
    memcpy(result.at, from, sizeof result.at);
    return result;
}
INLINE void store_quads(uint8_t *to, Quads x) { memcpy(to, x.at, sizeof x.at); }
INLINE Quads load_bytes(const uint8_t *from) { return load_quads(from); }
INLINE Quads low_nibbles(Quads x) {
    for (int i = 0; i < 4 * LANES; i++) x.at[i] &= 15;
    return x;
}
INLINE Quads high_nibbles(Quads x) {
    for (int i = 0; i < 4 * LANES; i++) x.at[i] = (int8_t)((uint8_t)x.at[i] >> 4);
    return x;
}
INLINE Quads spread_steps(const uint8_t *from) { EACH_OF(4 * LANES, Quads, (int8_t)from[i / 4]); }
INLINE Quads spread_offsets(const uint8_t *from) { EACH_OF(4 * LANES, Quads, (int8_t)from[i / 4]); }
INLINE Quads stretched(Quads nibbles, Quads steps, Quads offsets) {
    EACH_OF(4 * LANES, Quads, (int8_t)(nibbles.at[i] * steps.at[i] + offsets.at[i]));
}
INLINE Integers all_integers(int32_t x) { EACH(Integers, x); }
INLINE Quads four_bytes(const int8_t *from) { EACH_OF(4 * LANES, Quads, from[i % 4]); }
INLINE Integers add_bytes(Integers sum, Quads row, Quads weights) {
    for (int i = 0; i < 4 * LANES; i++) sum.at[i / 4] += row.at[i] * weights.at[i];
    return sum;
}

#endif

// `Nibbles` are sums of products of nibbles with signed bytes of 32 inputs of a row. `stretched_sum` is what they come to with the
// steps and offsets of sixteen outputs, and with the total of those bytes.
typedef Integers Nibbles;

#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI

typedef struct { __m512i steps, offsets; } Stretch;
INLINE Stretch load_stretch(const uint8_t *from) {
    return (Stretch){_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)),
                     _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + BLOCK)))};
}
INLINE Nibbles add_nibbles(Nibbles sum, Quads row, Quads nibbles) { return _mm512_dpbusd_epi32(sum, nibbles, row); }
INLINE Integers stretched_sum(Nibbles sum, int32_t total, Stretch by) {
    return _mm512_add_epi32(_mm512_mullo_epi32(sum, by.steps), _mm512_mullo_epi32(by.offsets, _mm512_set1_epi32(total)));
}

#elif TOPKAPI_LEVEL >= LEVEL_AVX2

INLINE Integers load_offsets(const uint8_t *from) {
    __m128i offsets = _mm_loadu_si128((const __m128i *)from);
    return PAIR(Integers, _mm256_cvtepi8_epi32(offsets), _mm256_cvtepi8_epi32(_mm_srli_si128(offsets, 8)));
}
INLINE Integers times_integer(Integers x, int32_t by) {
    __m256i all_alike = _mm256_set1_epi32(by);
    return PAIR(Integers, _mm256_mullo_epi32(x.a, all_alike), _mm256_mullo_epi32(x.b, all_alike));
}
typedef struct { Integers steps, offsets; } Stretch;

#if TOPKAPI_LEVEL >= LEVEL_AVX_VNNI

INLINE Stretch load_stretch(const uint8_t *from) {
    __m128i steps = _mm_loadu_si128((const __m128i *)from);
    return (Stretch){PAIR(Integers, _mm256_cvtepu8_epi32(steps), _mm256_cvtepu8_epi32(_mm_srli_si128(steps, 8))), load_offsets(from + BLOCK)};
}
INLINE Nibbles add_nibbles(Nibbles sum, Quads row, Quads nibbles) { return add_bytes(sum, row, nibbles); }
INLINE Integers stretched_sum(Nibbles sum, int32_t total, Stretch by) {
    Integers stretched = PAIR(Integers, _mm256_mullo_epi32(sum.a, by.steps.a), _mm256_mullo_epi32(sum.b, by.steps.b));
    return add_integers(stretched, times_integer(by.offsets, total));
}

#else

// Sixteen bits hold eight sums of two products each: 8 * 2 * 15 * 127 is 30,480. Steps multiply while two of them are added.
INLINE Stretch load_stretch(const uint8_t *from) { return (Stretch){spread_steps(from), load_offsets(from + BLOCK)}; }
INLINE __m256i add_sixteen_bits(__m256i sum, __m256i products) {
    sum = _mm256_add_epi16(sum, products);
    asm("" : "+x"(sum));
    return sum;
}
INLINE Nibbles add_nibbles(Nibbles sum, Quads row, Quads nibbles) {
    return PAIR(Nibbles, add_sixteen_bits(sum.a, _mm256_maddubs_epi16(nibbles.a, row.a)),
                add_sixteen_bits(sum.b, _mm256_maddubs_epi16(nibbles.b, row.b)));
}
INLINE Integers stretched_sum(Nibbles sum, int32_t total, Stretch by) {
    Integers stretched = PAIR(Integers, _mm256_madd_epi16(sum.a, by.steps.a), _mm256_madd_epi16(sum.b, by.steps.b));
    return add_integers(stretched, times_integer(by.offsets, total));
}

#endif

#else

typedef struct { const uint8_t *steps; } Stretch;
INLINE Stretch load_stretch(const uint8_t *from) { return (Stretch){from}; }
INLINE Nibbles add_nibbles(Nibbles sum, Quads row, Quads nibbles) { return add_bytes(sum, row, nibbles); }
INLINE Integers stretched_sum(Nibbles sum, int32_t total, Stretch by) {
    EACH(Integers, sum.at[i] * by.steps[i] + total * (int8_t)by.steps[BLOCK + i]);
}

#endif

#if TOPKAPI_LEVEL == LEVEL_AVX2

// Numbers of sixteen bits: of each four the first and the third, and the second and the fourth.
typedef struct { Quads even, odd; } Ready;
INLINE __m256i even_numbers(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
INLINE Ready made_ready(Quads x) {
    return (Ready){PAIR(Quads, even_numbers(x.a), even_numbers(x.b)),
                   PAIR(Quads, _mm256_srai_epi16(x.a, 8), _mm256_srai_epi16(x.b, 8))};
}
INLINE Ready load_ready(const uint8_t *from) { return (Ready){load_quads(from), load_quads(from + sizeof(Quads))}; }
INLINE void store_ready(uint8_t *to, Ready x) {
    store_quads(to, x.even);
    store_quads(to + sizeof(Quads), x.odd);
}
// `made_ready` of nibbles without a detour by bytes.
INLINE Ready low_ready(Quads x) {
    __m256i mask = _mm256_set1_epi16(15);
    return (Ready){PAIR(Quads, _mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)),
                   PAIR(Quads, _mm256_and_si256(_mm256_srli_epi16(x.a, 8), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 8), mask))};
}
INLINE Ready high_ready(Quads x) {
    __m256i mask = _mm256_set1_epi16(15);
    return (Ready){PAIR(Quads, _mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)),
                   PAIR(Quads, _mm256_srli_epi16(x.a, 12), _mm256_srli_epi16(x.b, 12))};
}

#else

typedef Quads Ready;
INLINE Ready made_ready(Quads x) { return x; }
INLINE Ready load_ready(const uint8_t *from) { return load_quads(from); }
INLINE void store_ready(uint8_t *to, Ready x) { store_quads(to, x); }
INLINE Ready low_ready(Quads x) { return made_ready(low_nibbles(x)); }
INLINE Ready high_ready(Quads x) { return made_ready(high_nibbles(x)); }

#endif

#if TOPKAPI_LEVEL >= LEVEL_AVX_VNNI

enum { LIFTED = 128 };
// 256 times a byte plus a byte: products of both are summed.
typedef struct { Integers high, low; } Wide;
typedef struct { Quads high, low; } Four;
INLINE void store_wide(int8_t *piece, int32_t row, int32_t at, Integers x, Integers *sums) {
    Integers high = higher_bytes(x), low = sub_integers(x, times_256(high));
    store_bytes(piece + row * PIECE + at, high);
    store_bytes(piece + PIECE_BYTES + row * PIECE + at, low);
    sums[0] = add_integers(sums[0], high), sums[1] = add_integers(sums[1], low);
}
INLINE Wide begin_wide(const int32_t *offsets) { return (Wide){all_integers(offsets[0]), all_integers(offsets[1])}; }
INLINE Four four_inputs(const int8_t *piece, int32_t row, int32_t at) {
    return (Four){four_bytes(piece + row * PIECE + at), four_bytes(piece + PIECE_BYTES + row * PIECE + at)};
}
INLINE Wide add_wide(Wide sum, Four row, Ready weights) {
    return (Wide){add_bytes(sum.high, row.high, weights), add_bytes(sum.low, row.low, weights)};
}
INLINE Integers end_wide(Wide sum) { return add_integers(times_256(sum.high), sum.low); }

#else

enum { LIFTED = 0 };
// Numbers of sixteen bits as they are, of four the second and the third changed over.
typedef Integers Wide;
INLINE Wide begin_wide(const int32_t *) { return no_integers(); }
INLINE Integers end_wide(Wide sum) { return sum; }
INLINE const int16_t *wide_numbers(const int8_t *piece, int32_t row, int32_t at) { return (const int16_t *)piece + row * PIECE + at; }
INLINE void store_wide(int8_t *piece, int32_t row, int32_t at, Integers x, Integers *) {
    store_crossed((int16_t *)wide_numbers(piece, row, at), x);
}

#if TOPKAPI_LEVEL >= LEVEL_AVX2

// The first and the third of four numbers, and the second and the fourth.
typedef struct { __m256i even, odd; } Four;
INLINE __m256i both_numbers(const int16_t *from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return _mm256_set1_epi32(both);
}
INLINE Four four_inputs(const int8_t *piece, int32_t row, int32_t at) {
    const int16_t *from = wide_numbers(piece, row, at);
    return (Four){both_numbers(from), both_numbers(from + 2)};
}
INLINE Wide add_wide(Wide sum, Four row, Ready weights) {
    sum.a = add_in_order(sum.a, _mm256_madd_epi16(row.even, weights.even.a));
    sum.b = add_in_order(sum.b, _mm256_madd_epi16(row.even, weights.even.b));
    sum.a = add_in_order(sum.a, _mm256_madd_epi16(row.odd, weights.odd.a));
    sum.b = add_in_order(sum.b, _mm256_madd_epi16(row.odd, weights.odd.b));
    return sum;
}

#if TOPKAPI_LEVEL == LEVEL_AVX2
// The total of 32 of a row's numbers, in every lane.
INLINE __m256i total_of_group(const int16_t *from) {
    __m256i one = _mm256_set1_epi16(1), pairs = _mm256_add_epi32(_mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)from), one),
                                                                 _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)(from + 16)), one));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm256_broadcastd_epi32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// sum + part * steps + total * offsets, of sixteen outputs whose steps lie at `from` and whose offsets follow, a byte each.
INLINE Integers add_stretched(Integers sum, Integers part, __m256i total, const uint8_t *from) {
    __m128i steps = _mm_loadu_si128((const __m128i *)from), offsets = _mm_loadu_si128((const __m128i *)(from + BLOCK));
    Integers stretched = PAIR(Integers, _mm256_mullo_epi32(part.a, _mm256_cvtepu8_epi32(steps)),
                              _mm256_mullo_epi32(part.b, _mm256_cvtepu8_epi32(_mm_srli_si128(steps, 8))));
    Integers lifted = PAIR(Integers, _mm256_mullo_epi32(total, _mm256_cvtepi8_epi32(offsets)),
                           _mm256_mullo_epi32(total, _mm256_cvtepi8_epi32(_mm_srli_si128(offsets, 8))));
    return add_integers(add_integers(sum, stretched), lifted);
}
#endif

#else

typedef const int16_t *Four;
INLINE Four four_inputs(const int8_t *piece, int32_t row, int32_t at) { return wide_numbers(piece, row, at); }
INLINE Wide add_wide(Wide sum, Four row, Ready weights) {
    for (int i = 0; i < LANES; i++)
        sum.at[i] += row[0] * weights.at[4 * i] + row[1] * weights.at[4 * i + 2] + row[2] * weights.at[4 * i + 1] +
                     row[3] * weights.at[4 * i + 3];
    return sum;
}

#endif
#endif
