// Attention over the cache: products of queries and keys, their weights, and the weighted values, over keys in order.
#pragma once

#include "caching.h"
#include "core.h"
#include "vectors.h"

// The keys and values of one head of a sequence: those of 16 positions `stride` bytes behind the 16 before.
struct Head {
    const uint8_t *keys, *values;
    size_t stride;
    int32_t size;
};

// As many sums at once as there are registers for.
#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
enum { SUMS = 16 };
#else
enum { SUMS = 4 };
#endif
INLINE int together(const int count) { return SUMS / count < 4 ? SUMS / count : 4; }

// Call `part(q, 8 or 4 or 2 or 1, …)` for all of `count` queries: as many as there are sums for, known when this is compiled.
#define IN_PARTS(part, count, ...)                                                                                     \
    for (int32_t q = 0; q < (count);) {                                                                                \
        int32_t left = (count) - q;                                                                                    \
        if (SUMS >= 8 && left >= 8) part(q, 8, __VA_ARGS__), q += 8;                                                   \
        else if (left >= 4) part(q, 4, __VA_ARGS__), q += 4;                                                           \
        else if (left >= 2) part(q, 2, __VA_ARGS__), q += 2;                                                           \
        else part(q, 1, __VA_ARGS__), q += 1;                                                                          \
    }

// The products of `count` queries from number `q` on with 16 keys each in `blocks` blocks, all known when this is compiled; of the
// queries first all first components, then all second ones, so that one register leads to them.
INLINE void score_blocks(int32_t q, const int count, const Head *head, const float *queries, float scale, float *scores,
                         int32_t stride, int32_t block, const int blocks, const int format) {
    Floats sums[8][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *from = head->keys + block * head->stride;
    for (int32_t d = 0; d < head->size; d++) {
        Floats parts[4];
        for (int b = 0; b < blocks; b++) parts[b] = load_cached(from + b * head->stride, (size_t)d * KEYS, format);
        for (int r = 0; r < count; r++) {
            Floats query = all(queries[d * QUERIES + q + r]);
            for (int b = 0; b < blocks; b++) sums[r][b] = fma(parts[b], query, sums[r][b]);
        }
    }
    for (int b = 0; b < blocks; b++) {
        Floats scales = all(scale);
        if (format == CACHE_INT8) scales = mul(scales, load(cached_scales(from + b * head->stride, head->size)));
        for (int r = 0; r < count; r++) store(scores + (size_t)(q + r) * stride + (block + b) * KEYS, mul(sums[r][b], scales));
    }
}

INLINE void score(int32_t q, const int count, const Head *head, const float *queries, float scale, float *scores,
                  int32_t stride, int32_t blocks, const int format) {
    int32_t block = 0;
    for (; block + together(count) <= blocks; block += together(count))
        score_blocks(q, count, head, queries, scale, scores, stride, block, together(count), format);
    for (; block < blocks; block++) score_blocks(q, count, head, queries, scale, scores, stride, block, 1, format);
}

// Scores of the keys from `start` to before `length` become weights, those of the rest of their blocks zero; returns one over their
// sum. `start` lies in the first 16 of some query, blocks before its own are left out. What values are scaled by goes into weights.
INLINE float weigh(const Head *head, float *scores, int32_t start, int32_t length, float cap, const int format) {
    int32_t blocks = (length + KEYS - 1) / KEYS;
    for (int32_t at = 0; at < length && cap > 0; at += KEYS) store(scores + at, capped(load(scores + at), all(cap)));
    for (int32_t at = 0; at < start; at++) scores[at] = -__builtin_inff();
    for (int32_t at = length; at < blocks * KEYS; at++) scores[at] = -__builtin_inff();
    Floats most = all(-__builtin_inff());
    for (int32_t block = 0; block < blocks; block++) most = largest(most, load(scores + block * KEYS));
    Floats highest = all(largest_lane(most)), sum = zeros();
    for (int32_t block = 0; block < blocks; block++) {
        float *here = scores + block * KEYS;
        Floats weight = exponential(sub(load(here), highest));
        store(here, weight);
        if (block == blocks - 1 || block * KEYS < start) {
            for (int32_t at = length; at < blocks * KEYS; at++) scores[at] = 0.0f;
            for (int32_t at = 0; at < start; at++) scores[at] = 0.0f;
            weight = load(here);
        }
        sum = add(sum, weight);
        if (format == CACHE_INT8)
            store(here, mul(weight, load(cached_scales(head->keys + block * head->stride, head->size) + KEYS)));
    }
    return 1.0f / total(sum);
}

// 16 times `parts` components of the weighted values of `count` queries, keys in order. Those before `everybodys` are read once for
// all; what lies before a query's window or behind its own length is not even read, for it may be anything.
INLINE void mix_parts(int32_t q, const int count, const Head *head, int32_t at, const int parts, const float *weights, int32_t stride,
                      const int32_t *starts, const int32_t *lengths, const float *inverse, float *const *to, const int format) {
    Floats sums[8][4];
    int32_t everybodys = lengths[q], begin = starts[q], size = head->size;
    for (int r = 0; r < count; r++) {
        everybodys = lengths[q + r] < everybodys ? lengths[q + r] : everybodys;
        begin = starts[q + r] > begin ? starts[q + r] : begin;
        for (int p = 0; p < parts; p++) sums[r][p] = zeros();
    }
    // Where windows are so short that they have nothing in common, each is looked through alone.
    if (begin > everybodys) begin = everybodys;
    for (int r = 0; r < count; r++)
        for (int32_t key = starts[q + r]; key < begin; key++) {
            const uint8_t *block = head->values + (size_t)(key / KEYS) * head->stride;
            Floats weight = all(weights[(size_t)(q + r) * stride + key]);
            for (int p = 0; p < parts; p++)
                sums[r][p] = fma(weight, load_cached(block, key % KEYS * size + at + p * LANES, format), sums[r][p]);
        }
    for (int32_t first = begin / KEYS * KEYS; first < everybodys; first += KEYS) {
        const uint8_t *block = head->values + (size_t)(first / KEYS) * head->stride;
        int32_t here = everybodys - first < KEYS ? everybodys - first : KEYS;
        for (int32_t key = begin > first ? begin - first : 0; key < here; key++) {
            Floats value[4];
            for (int p = 0; p < parts; p++) value[p] = load_cached(block, key * size + at + p * LANES, format);
            for (int r = 0; r < count; r++) {
                Floats weight = all(weights[(size_t)(q + r) * stride + first + key]);
                for (int p = 0; p < parts; p++) sums[r][p] = fma(weight, value[p], sums[r][p]);
            }
        }
    }
    for (int r = 0; r < count; r++) {
        for (int32_t key = starts[q + r] > everybodys ? starts[q + r] : everybodys; key < lengths[q + r]; key++) {
            const uint8_t *block = head->values + (size_t)(key / KEYS) * head->stride;
            Floats weight = all(weights[(size_t)(q + r) * stride + key]);
            for (int p = 0; p < parts; p++)
                sums[r][p] = fma(weight, load_cached(block, key % KEYS * size + at + p * LANES, format), sums[r][p]);
        }
        for (int p = 0; p < parts; p++) store(to[q + r] + at + p * LANES, mul(sums[r][p], all(inverse[q + r])));
    }
}

INLINE void mix(int32_t q, const int count, const Head *head, const float *weights, int32_t stride, const int32_t *starts,
                const int32_t *lengths, const float *inverse, float *const *to, const int format) {
    int32_t at = 0, size = head->size;
    for (; at + together(count) * LANES <= size; at += together(count) * LANES)
        mix_parts(q, count, head, at, together(count), weights, stride, starts, lengths, inverse, to, format);
    for (; at + LANES <= size; at += LANES)
        mix_parts(q, count, head, at, 1, weights, stride, starts, lengths, inverse, to, format);
    for (; at < size; at++)
        for (int r = q; r < q + count; r++) {
            float sum = 0.0f;
            for (int32_t key = starts[r]; key < lengths[r]; key++) {
                const uint8_t *block = head->values + (size_t)(key / KEYS) * head->stride;
                sum = __builtin_fmaf(weights[(size_t)r * stride + key], one_cached(block, key % KEYS * size + at, format), sum);
            }
            to[r][at] = sum * inverse[r];
        }
}

INLINE void attend_as(const Cache *cache, const Span *span, int32_t number, int32_t begin, int32_t end, const float *queries,
                      int32_t query_stride, int32_t heads_per_key, const Sight *sight, float *scores, float *to, int32_t to_stride,
                      const int format) {
    int32_t size = cache->size, stride = cache->blocks * KEYS, count = (end - begin) * heads_per_key;
    const uint8_t *all_keys = cache->layer + span->slot * cache->slot_stride + number * head_bytes(format, size);
    for (int32_t first = 0; first < count; first += QUERIES) {
        float *packed = scores + (size_t)QUERIES * stride;
        float *mixed[QUERIES], inverse[QUERIES];
        int32_t here = count - first < QUERIES ? count - first : QUERIES, starts[QUERIES], lengths[QUERIES], longest = 0;
        // Blocks that nobody sees any more are left out: they would add zeros. Positions count from the first that is seen.
        int32_t earliest = span->position + begin + first / heads_per_key + 1 - sight->window, hidden = 0;
        if (sight->window && earliest > 0) hidden = earliest / KEYS;
        for (int32_t q = 0; q < here; q++) {
            int32_t row = begin + (first + q) / heads_per_key, own = number * heads_per_key + (first + q) % heads_per_key;
            const float *from = queries + (size_t)(span->first + row) * query_stride + own * size;
            for (int32_t d = 0; d < size; d++) packed[d * QUERIES + q] = from[d];
            mixed[q] = to + (size_t)(span->first + row) * to_stride + own * size;
            lengths[q] = span->position + row + 1 - hidden * KEYS;
            starts[q] = sight->window && lengths[q] > sight->window ? lengths[q] - sight->window : 0;
            longest = lengths[q] > longest ? lengths[q] : longest;
        }
        const uint8_t *keys = all_keys + hidden * cache->block_stride;
        Head head = {keys, keys + size * KEYS * cached_bytes(format), cache->block_stride, size};
        IN_PARTS(score, here, &head, packed, sight->scale, scores, stride, (longest + KEYS - 1) / KEYS, format);
        for (int32_t q = 0; q < here; q++)
            inverse[q] = weigh(&head, scores + (size_t)q * stride, starts[q], lengths[q], sight->cap, format);
        IN_PARTS(mix, here, &head, scores, stride, starts, lengths, inverse, mixed, format);
    }
}

static void attend(const Cache *cache, const Span *span, int32_t head, int32_t begin, int32_t end, const float *queries,
                   int32_t query_stride, int32_t heads_per_key, const Sight *sight, float *scores, float *to, int32_t to_stride) {
#define ATTEND(format)                                                                                                 \
    attend_as(cache, span, head, begin, end, queries, query_stride, heads_per_key, sight, scores, to, to_stride, format)
    switch (cache->format) {
    case CACHE_FLOAT16: ATTEND(CACHE_FLOAT16); break;
    case CACHE_INT8: ATTEND(CACHE_INT8); break;
    default: ATTEND(CACHE_FLOAT32);
    }
#undef ATTEND
}
