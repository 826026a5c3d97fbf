// Attention over the cache: products of queries and keys, their weights, and the weighted values, over keys in order.
#pragma once

#include "core.h"
#include "vectors.h"

// The products of `count` queries with 16 keys each in `blocks` blocks, both known when this is compiled.
INLINE void score_blocks(const float *keys, size_t block_stride, int32_t size, const float *const *queries, const int count,
                         const int blocks, float scale, float *scores, int32_t score_stride, int32_t block) {
    Floats sums[8][4];
    for (int q = 0; q < count; q++)
        for (int b = 0; b < blocks; b++) sums[q][b] = zeros();
    const float *from = keys + block * block_stride;
    for (int32_t d = 0; d < size; d++) {
        Floats parts[4];
        for (int b = 0; b < blocks; b++) parts[b] = load(from + b * block_stride + (size_t)d * KEYS);
        for (int q = 0; q < count; q++)
            for (int b = 0; b < blocks; b++) sums[q][b] = fma(parts[b], all(queries[q][d]), sums[q][b]);
    }
    for (int q = 0; q < count; q++)
        for (int b = 0; b < blocks; b++)
            store(scores + (size_t)q * score_stride + (block + b) * KEYS, mul(sums[q][b], all(scale)));
}

// Scores of `count` queries (known when this is compiled), scaled; few queries take more blocks side by side.
INLINE void score_all(const float *keys, size_t stride, int32_t size, const float *const *queries, const int count,
                      float scale, float *scores, int32_t score_stride, int32_t blocks) {
    const int together = count <= 2 ? 4 : count <= 4 ? 2 : 1;
    int32_t block = 0;
    for (; block + together <= blocks; block += together)
        score_blocks(keys, stride, size, queries, count, together, scale, scores, score_stride, block);
    for (; block < blocks; block++)
        score_blocks(keys, stride, size, queries, count, 1, scale, scores, score_stride, block);
}

// Scores of the keys before `length` become weights, those of the rest of the last block zero; returns one over their sum.
INLINE float weigh(float *scores, int32_t length) {
    int32_t blocks = (length + KEYS - 1) / KEYS;
    for (int32_t at = length; at < blocks * KEYS; at++) scores[at] = -__builtin_inff();
    Floats most = all(-__builtin_inff());
    for (int32_t block = 0; block < blocks; block++) most = largest(most, load(scores + block * KEYS));
    Floats highest = all(largest_lane(most)), sum = zeros();
    for (int32_t block = 0; block < blocks; block++) {
        Floats weight = exponential(sub(load(scores + block * KEYS), highest));
        store(scores + block * KEYS, weight);
        if (block == blocks - 1) {
            for (int32_t at = length; at < blocks * KEYS; at++) scores[at] = 0.0f;
            weight = load(scores + block * KEYS);
        }
        sum = add(sum, weight);
    }
    return 1.0f / total(sum);
}

// 16 times `parts` components of the weighted values of `count` queries, keys in order. Those before `together` are everybody's;
// what lies behind a query's own length is not even read, for it may be anything.
INLINE void mix(const float *values, size_t block_stride, int32_t size, int32_t at, const int parts, const float *weights,
                int32_t weight_stride, const int count, const int32_t *lengths, const float *inverse, float *const *to) {
    Floats sums[4][8];
    int32_t together = lengths[0];
    for (int q = 0; q < count; q++) {
        together = lengths[q] < together ? lengths[q] : together;
        for (int p = 0; p < parts; p++) sums[q][p] = zeros();
    }
    for (int32_t first = 0; first < together; first += KEYS) {
        const float *block = values + (size_t)(first / KEYS) * block_stride + at;
        int32_t here = together - first < KEYS ? together - first : KEYS;
        for (int32_t key = 0; key < here; key++) {
            Floats value[8];
            for (int p = 0; p < parts; p++) value[p] = load(block + key * size + p * LANES);
            for (int q = 0; q < count; q++) {
                Floats weight = all(weights[(size_t)q * weight_stride + first + key]);
                for (int p = 0; p < parts; p++) sums[q][p] = fma(weight, value[p], sums[q][p]);
            }
        }
    }
    for (int q = 0; q < count; q++) {
        for (int32_t key = together; key < lengths[q]; key++) {
            const float *value = values + (size_t)(key / KEYS) * block_stride + key % KEYS * size + at;
            Floats weight = all(weights[(size_t)q * weight_stride + key]);
            for (int p = 0; p < parts; p++) sums[q][p] = fma(weight, load(value + p * LANES), sums[q][p]);
        }
        for (int p = 0; p < parts; p++) store(to[q] + at + p * LANES, mul(sums[q][p], all(inverse[q])));
    }
}

// As many parts of as many queries as there are registers for.
#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
enum { PARTS = 4 };
#else
enum { PARTS = 1 };
#endif

INLINE void mix_all(const float *values, size_t stride, int32_t size, const int parts, const float *weights,
                    int32_t weight_stride, const int count, const int32_t *lengths, const float *inverse, float *const *to) {
    int32_t at = 0;
    for (; at + parts * LANES <= size; at += parts * LANES)
        mix(values, stride, size, at, parts, weights, weight_stride, count, lengths, inverse, to);
    if (parts > 1)
        for (; at + LANES <= size; at += LANES)
            mix(values, stride, size, at, 1, weights, weight_stride, count, lengths, inverse, to);
}

INLINE float mix_one(const float *values, size_t block_stride, int32_t size, int32_t at, const float *weights, int32_t length) {
    float sum = 0.0f;
    for (int32_t key = 0; key < length; key++)
        sum = __builtin_fmaf(weights[key], values[(size_t)(key / KEYS) * block_stride + key % KEYS * size + at], sum);
    return sum;
}

static void attend(const Cache *cache, const Span *span, int32_t head, int32_t begin, int32_t end, const float *queries,
                   int32_t query_stride, int32_t heads_per_key, float scale, float *scores, float *to, int32_t to_stride) {
    int32_t size = cache->size, score_stride = cache->blocks * KEYS, count = (end - begin) * heads_per_key;
    size_t stride = cache->block_stride;
    const float *keys = cache->layer + span->slot * cache->slot_stride + (size_t)head * 2 * size * KEYS;
    const float *values = keys + size * KEYS;
    for (int32_t first = 0; first < count; first += QUERIES) {
        const float *from[QUERIES];
        float *mixed[QUERIES];
        int32_t here = count - first < QUERIES ? count - first : QUERIES, lengths[QUERIES], longest = 0;
        for (int32_t q = 0; q < here; q++) {
            int32_t row = begin + (first + q) / heads_per_key, own = head * heads_per_key + (first + q) % heads_per_key;
            from[q] = queries + (size_t)(span->first + row) * query_stride + own * size;
            mixed[q] = to + (size_t)(span->first + row) * to_stride + own * size;
            lengths[q] = span->position + row + 1;
            longest = lengths[q] > longest ? lengths[q] : longest;
        }
        int32_t blocks = (longest + KEYS - 1) / KEYS;
        for (int32_t q = 0; q < here;) {
            float *into = scores + (size_t)q * score_stride;
            if (here - q >= 8) score_all(keys, stride, size, from + q, 8, scale, into, score_stride, blocks), q += 8;
            else if (here - q >= 4) score_all(keys, stride, size, from + q, 4, scale, into, score_stride, blocks), q += 4;
            else if (here - q >= 2) score_all(keys, stride, size, from + q, 2, scale, into, score_stride, blocks), q += 2;
            else score_all(keys, stride, size, from + q, 1, scale, into, score_stride, blocks), q += 1;
        }
        float inverse[QUERIES];
        for (int32_t q = 0; q < here; q++) inverse[q] = weigh(scores + (size_t)q * score_stride, lengths[q]);
        for (int32_t q = 0; q < here;) {
            const float *weights = scores + (size_t)q * score_stride;
            if (here - q >= 4) {
                mix_all(values, stride, size, PARTS, weights, score_stride, 4, lengths + q, inverse + q, mixed + q), q += 4;
            } else if (here - q >= 2) {
                mix_all(values, stride, size, PARTS, weights, score_stride, 2, lengths + q, inverse + q, mixed + q), q += 2;
            } else {
                mix_all(values, stride, size, 4, weights, score_stride, 1, lengths + q, inverse + q, mixed + q), q += 1;
            }
        }
        for (int32_t q = 0; q < here; q++)
            for (int32_t at = size / LANES * LANES; at < size; at++)
                mixed[q][at] = mix_one(values, stride, size, at, scores + (size_t)q * score_stride, lengths[q]) * inverse[q];
    }
}
