// What of a row of logits decides about its next token: maxima, sums, and the tokens that stand out. Everything but the maxima is
// of the logits divided by a number of the row, as its temperature asks for. Pieces whose maximum is too small are passed over.
#pragma once

#include "core.h"
#include "vectors.h"

// Bit i: whether lane i of a is at least, or more than, that of b; whether it is no number.
#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
INLINE uint32_t lanes_at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE uint32_t lanes_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE uint32_t lanes_wrong(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
#elif TOPKAPI_LEVEL >= LEVEL_AVX2
#define MASKS(x, y, kind)                                                                                              \
    ((uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((x).a, (y).a, kind)) |                                                 \
     (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((x).b, (y).b, kind)) << 8)
INLINE uint32_t lanes_at_least(Floats a, Floats b) { return MASKS(a, b, _CMP_GE_OQ); }
INLINE uint32_t lanes_above(Floats a, Floats b) { return MASKS(a, b, _CMP_GT_OQ); }
INLINE uint32_t lanes_wrong(Floats a) { return MASKS(a, a, _CMP_UNORD_Q); }
#else
#define MASK(condition)                                                                                                \
    do {                                                                                                               \
        uint32_t mask = 0;                                                                                             \
        for (int i = 0; i < LANES; i++) mask |= (uint32_t)(condition) << i;                                            \
        return mask;                                                                                                   \
    } while (0)
INLINE uint32_t lanes_at_least(Floats a, Floats b) { MASK(a.at[i] >= b.at[i]); }
INLINE uint32_t lanes_above(Floats a, Floats b) { MASK(a.at[i] > b.at[i]); }
INLINE uint32_t lanes_wrong(Floats a) { MASK(a.at[i] != a.at[i]); }
#endif

// Lanes behind the end of a row hold what no token is chosen by.
INLINE Floats lanes_of(const float *from, int32_t left) {
    if (left >= LANES) return load(from);
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = i < left ? from[i] : -__builtin_inff();
    return load(lanes);
}

static void scan(const float *row, int32_t size, float *maxima, float *best, int32_t *first) {
    uint32_t wrong = 0;
    Floats most = all(-__builtin_inff());
    for (int32_t piece = 0, at = 0; at < size; piece++, at += STRIP) {
        Floats largest_here = all(-__builtin_inff());
        for (int32_t i = at; i < at + STRIP && i < size; i += LANES) {
            Floats x = lanes_of(row + i, size - i);
            wrong |= lanes_wrong(x);
            largest_here = largest(x, largest_here);
        }
        maxima[piece] = largest_lane(largest_here);
        most = largest(largest_here, most);
    }
    *best = wrong ? __builtin_nanf("") : largest_lane(most);
    *first = 0;
    for (int32_t piece = 0, at = 0; at < size && !wrong; piece++, at += STRIP) {
        if (maxima[piece] != *best) continue;
        while (row[at] != *best) at++;
        *first = at;
        return;
    }
}

// The sum of exp(logit - best), and of that times (best - logit); each piece is summed by itself, so that few numbers are added in
// single precision.
static void scan_totals(const float *row, int32_t size, float divisor, float best, double *sum, double *weighted) {
    double sums[2] = {0, 0};
    for (int32_t at = 0; at < size; at += 4 * STRIP) {
        Floats part = zeros(), weighted_part = zeros();
        for (int32_t i = at; i < at + 4 * STRIP && i < size; i += LANES) {
            // Exponentials end at -87; what is ruled out must not be infinitely far, or it weighs no number.
            Floats below = largest(sub(divide(lanes_of(row + i, size - i), all(divisor)), all(best)), all(-100.0f));
            Floats weight = exponential(below);
            part = add(part, weight);
            weighted_part = fma(weight, below, weighted_part);
        }
        sums[0] += total(part);
        sums[1] -= total(weighted_part);
    }
    *sum = sums[0];
    *weighted = sums[1];
}

// Bit i: whether token `first + i` has loud noise. The upper bits of SplitMix64's hash, as model/decoding/noise.py has it.
INLINE uint64_t loud_tokens(uint64_t key, uint64_t threshold, int32_t first) {
    const uint64_t GOLDEN = 0x9E3779B97F4A7C15u, FIRST = 0xBF58476D1CE4E5B9u, SECOND = 0x94D049BB133111EBu;
    uint64_t start = key + (uint64_t)first * GOLDEN, mask = 0;
#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
    __m512i x = _mm512_add_epi64(
        _mm512_set1_epi64((int64_t)start),
        _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64((int64_t)GOLDEN)));
    for (int i = 0; i < STRIP; i += 8) {
        __m512i y = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)), _mm512_set1_epi64((int64_t)FIRST));
        y = _mm512_mullo_epi64(_mm512_xor_si512(y, _mm512_srli_epi64(y, 27)), _mm512_set1_epi64((int64_t)SECOND));
        mask |= (uint64_t)_mm512_cmpge_epu64_mask(y, _mm512_set1_epi64((int64_t)threshold)) << i;
        x = _mm512_add_epi64(x, _mm512_set1_epi64((int64_t)(8 * GOLDEN)));
    }
#else
    for (int i = 0; i < STRIP; i++, start += GOLDEN) {
        uint64_t x = (start ^ start >> 30) * FIRST;
        x = (x ^ x >> 27) * SECOND;
        mask |= (uint64_t)(x >= threshold) << i;
    }
#endif
    return mask;
}

// The tokens at least `floor`, and those with loud noise where there is a `noise`, in order; how many there are, of which no more
// than `capacity` are written.
static int32_t scan_collect(const float *row, int32_t size, float divisor, const float *maxima, float floor,
                            const Noise *noise, int32_t capacity, int64_t *ids, float *values) {
    int32_t count = 0, pieces = (size + STRIP - 1) / STRIP;
    for (int32_t sixteen = 0; sixteen < pieces; sixteen += LANES) {
        uint32_t high = lanes_at_least(divide(lanes_of(maxima + sixteen, pieces - sixteen), all(divisor)), all(floor));
        for (int32_t piece = sixteen; piece < sixteen + LANES && piece < pieces; piece++) {
            uint64_t mask = noise ? loud_tokens(noise->key, noise->threshold, piece * STRIP) : 0;
            if (high >> (piece - sixteen) & 1)
                for (int32_t i = 0; i < STRIP && piece * STRIP + i < size; i += LANES) {
                    Floats x = lanes_of(row + piece * STRIP + i, size - piece * STRIP - i);
                    mask |= (uint64_t)lanes_at_least(divide(x, all(divisor)), all(floor)) << i;
                }
            for (; mask; mask &= mask - 1) {
                int32_t token = piece * STRIP + __builtin_ctzll(mask);
                if (token >= size) break;
                if (count < capacity) ids[count] = token, values[count] = row[token] / divisor;
                count++;
            }
        }
    }
    return count;
}

// How many logits are more than `value`; nothing is divided.
static int32_t scan_above(const float *row, int32_t size, const float *maxima, float value) {
    int32_t count = 0;
    for (int32_t piece = 0, at = 0; at < size; piece++, at += STRIP)
        if (maxima[piece] > value)
            for (int32_t i = at; i < at + STRIP && i < size; i += LANES)
                count += __builtin_popcount(lanes_above(lanes_of(row + i, size - i), all(value)));
    return count;
}
