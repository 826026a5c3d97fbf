// The kernels, written once over the sixteen lanes of vectors.h; each kernels_*.cpp compiles them for one instruction set.
// The sums of a row are added in one order whatever other rows are computed, on however many threads, by whichever instructions.
#pragma once

#include "core.h"
#include "vectors.h"

// ---- int8: four products of bytes into each of sixteen integers ------------------------------------------------------

#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI

// The instruction wants unsigned bytes on one side: 128 is added to the row's, and 128 times the weights' sum is taken off.
enum { OFFSET = 1 };
typedef __m512i Quads;
INLINE Quads load_quads(const int8_t *from) { return _mm512_loadu_si512(from); }
INLINE Quads four_bytes(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four ^ (int32_t)0x80808080);
}
INLINE Integers dot(Integers sum, Quads row, Quads weights) { return _mm512_dpbusd_epi32(sum, row, weights); }
INLINE Integers sum_bytes(Integers sum, Quads weights) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), weights); }
INLINE Integers without_offset(Integers sum, Integers weights) {
    return _mm512_sub_epi32(sum, _mm512_slli_epi32(weights, 7));
}

#elif TOPKAPI_LEVEL >= LEVEL_AVX2

enum { OFFSET = TOPKAPI_LEVEL >= LEVEL_AVX_VNNI };
typedef Integers Quads;
INLINE Quads load_quads(const int8_t *from) { return load_integers((const int32_t *)from); }
#if TOPKAPI_LEVEL >= LEVEL_AVX_VNNI
INLINE Quads four_bytes(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    __m256i all_alike = _mm256_set1_epi32(four ^ (int32_t)0x80808080);
    return PAIR(Quads, all_alike, all_alike);
}
INLINE Integers dot(Integers sum, Quads row, Quads weights) {
    return PAIR(Integers, _mm256_dpbusd_avx_epi32(sum.a, row.a, weights.a),
                _mm256_dpbusd_avx_epi32(sum.b, row.b, weights.b));
}
INLINE Integers sum_bytes(Integers sum, Quads weights) {
    __m256i one = _mm256_set1_epi8(1);
    return dot(sum, PAIR(Quads, one, one), weights);
}
INLINE Integers without_offset(Integers sum, Integers weights) {
    return PAIR(Integers, _mm256_sub_epi32(sum.a, _mm256_slli_epi32(weights.a, 7)),
                _mm256_sub_epi32(sum.b, _mm256_slli_epi32(weights.b, 7)));
}
#else
INLINE Quads four_bytes(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    __m256i all_alike = _mm256_set1_epi32(four);
    return PAIR(Quads, all_alike, all_alike);
}
// |row| times the weights with the row's sign: pairs of products stay below 2 * 127 * 127, which 16 bits hold.
INLINE __m256i eight_dots(__m256i sum, __m256i row, __m256i weights) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(weights, row));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE Integers dot(Integers sum, Quads row, Quads weights) {
    return PAIR(Integers, eight_dots(sum.a, row.a, weights.a), eight_dots(sum.b, row.b, weights.b));
}
INLINE Integers sum_bytes(Integers sum, Quads) { return sum; }
INLINE Integers without_offset(Integers sum, Integers) { return sum; }
#endif

#else

enum { OFFSET = 0 };
typedef struct { int8_t at[4 * LANES]; } Quads;
INLINE Quads load_quads(const int8_t *from) {
    Quads result;
    memcpy(result.at, from, sizeof result.at);
    return result;
}
INLINE Quads four_bytes(const int8_t *from) {
    Quads result;
    for (int i = 0; i < LANES; i++) memcpy(result.at + 4 * i, from, 4);
    return result;
}
INLINE Integers dot(Integers sum, Quads row, Quads weights) {
    for (int i = 0; i < 4 * LANES; i++) sum.at[i / 4] += row.at[i] * weights.at[i];
    return sum;
}
INLINE Integers sum_bytes(Integers sum, Quads) { return sum; }
INLINE Integers without_offset(Integers sum, Integers) { return sum; }

#endif

enum { GROUP_BYTES = GROUP * BLOCK + BLOCK * 2 };

// ---- products --------------------------------------------------------------------------------------------------------

INLINE void put(const Matrix *matrix, Floats sum, int32_t block, float *row, int add_to) {
    int32_t at = block * BLOCK, left = matrix->outputs - at;
    float *to = row + at;
    if (left >= BLOCK) {
        if (matrix->bias) sum = add(sum, load(matrix->bias + at));
        store(to, add_to ? add(load(to), sum) : sum);
        return;
    }
    float lanes[LANES];
    store(lanes, sum);
    for (int i = 0; i < left; i++) {
        float value = matrix->bias ? lanes[i] + matrix->bias[at + i] : lanes[i];
        to[i] = add_to ? to[i] + value : value;
    }
}

// `count` rows (at most 4) by `blocks` blocks (at most 4), both known when this is compiled.
INLINE void multiply_int8(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block,
                          const int blocks, float *to, int32_t stride, int add_to) {
    Floats sums[4][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes;
    for (int32_t group = 0; group < matrix->inputs / GROUP; group++) {
        Integers parts[4][4], weights_sum[4];
        for (int b = 0; b < blocks; b++) {
            weights_sum[b] = no_integers();
            for (int r = 0; r < count; r++) parts[r][b] = no_integers();
        }
        const uint8_t *here = data + (size_t)group * GROUP_BYTES;
        for (int four = 0; four < GROUP / 4; four++) {
            Quads weights[4];
            for (int b = 0; b < blocks; b++) {
                weights[b] = load_quads((const int8_t *)(here + b * matrix->block_bytes) + four * 4 * BLOCK);
                if (OFFSET) weights_sum[b] = sum_bytes(weights_sum[b], weights[b]);
            }
            for (int r = 0; r < count; r++) {
                Quads bytes = four_bytes(rows->bytes + (size_t)(row + r) * rows->byte_stride + group * GROUP + four * 4);
                for (int b = 0; b < blocks; b++) parts[r][b] = dot(parts[r][b], bytes, weights[b]);
            }
        }
        for (int b = 0; b < blocks; b++) {
            Floats scales = load_half((const uint16_t *)(here + b * matrix->block_bytes + GROUP * BLOCK));
            for (int r = 0; r < count; r++) {
                Floats scale = mul(scales, all(rows->scales[(size_t)(row + r) * rows->scale_stride + group]));
                sums[r][b] = fma(floats(without_offset(parts[r][b], weights_sum[b])), scale, sums[r][b]);
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) put(matrix, sums[r][b], block + b, to + (size_t)(row + r) * stride, add_to);
}

INLINE void multiply_floats(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block,
                            const int blocks, float *to, int32_t stride, int add_to, const int bfloats16) {
    Floats sums[4][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes;
    const float *from = rows->floats + (size_t)row * rows->stride;
    for (int32_t input = 0; input < matrix->inputs; input++) {
        Floats weights[4];
        for (int b = 0; b < blocks; b++) {
            const uint8_t *here = data + b * matrix->block_bytes;
            weights[b] = bfloats16 ? load_bfloat((const uint16_t *)here + (size_t)input * BLOCK)
                                   : load((const float *)here + (size_t)input * BLOCK);
        }
        for (int r = 0; r < count; r++) {
            Floats x = all(from[(size_t)r * rows->stride + input]);
            for (int b = 0; b < blocks; b++) sums[r][b] = fma(x, weights[b], sums[r][b]);
        }
    }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) put(matrix, sums[r][b], block + b, to + (size_t)(row + r) * stride, add_to);
}

INLINE void multiply_tile(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block,
                          const int blocks, float *to, int32_t stride, int add_to) {
    if (matrix->format == INT8) multiply_int8(matrix, rows, row, count, block, blocks, to, stride, add_to);
    else if (matrix->format == BFLOAT16) multiply_floats(matrix, rows, row, count, block, blocks, to, stride, add_to, 1);
    else multiply_floats(matrix, rows, row, count, block, blocks, to, stride, add_to, 0);
}

// As many sums at once as there are registers for: a single row takes more blocks side by side, so that no sum waits for itself.
#if TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
enum { WIDE = 4, NARROW = 2 };
#else
enum { WIDE = 2, NARROW = 1 };
#endif

static void multiply_lanes(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                           int32_t end) {
    int32_t block = begin;
    if (rows->count == 1)
        for (; block + WIDE <= end; block += WIDE) multiply_tile(matrix, rows, 0, 1, block, WIDE, to, stride, add_to);
    for (; block + NARROW <= end; block += NARROW) {
        int32_t row = 0;
        for (; row + 4 <= rows->count; row += 4) multiply_tile(matrix, rows, row, 4, block, NARROW, to, stride, add_to);
        for (; row + 2 <= rows->count; row += 2) multiply_tile(matrix, rows, row, 2, block, NARROW, to, stride, add_to);
        if (row < rows->count) multiply_tile(matrix, rows, row, 1, block, NARROW, to, stride, add_to);
    }
    for (; block < end; block++)
        for (int32_t row = 0; row < rows->count; row++) multiply_tile(matrix, rows, row, 1, block, 1, to, stride, add_to);
}

#if TOPKAPI_LEVEL >= LEVEL_AMX

// Sixteen rows by sixteen outputs and 32 inputs in one instruction; the sums of a group are the same integers.
struct TileConfig {
    uint8_t palette, start;
    uint8_t reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed));

enum { TILE_ROWS = 16, LEAST_TILE_ROWS = 8 };

static void multiply_tiles(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                           int32_t end) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 4; tile++) {
        int of_rows = tile == 2;
        config.bytes[tile] = of_rows ? GROUP : 64;
        config.rows[tile] = tile == 3 ? GROUP / 4 : TILE_ROWS;
    }
    _tile_loadconfig(&config);
    int32_t integers[2][TILE_ROWS * BLOCK] __attribute__((aligned(64)));
    int32_t groups = matrix->inputs / GROUP;
    for (int32_t block = begin; block < end; block++) {
        const uint8_t *data = matrix->data + block * matrix->block_bytes;
        for (int32_t row = 0; row < rows->count; row += TILE_ROWS) {
            Floats sums[TILE_ROWS];
            for (int r = 0; r < TILE_ROWS; r++) sums[r] = zeros();
            const int8_t *bytes = rows->bytes + (size_t)row * rows->byte_stride;
            const float *row_scales = rows->scales + (size_t)row * rows->scale_stride;
            for (int32_t group = 0; group <= groups; group++) {
                if (group < groups) {
                    _tile_loadd(2, bytes + group * GROUP, rows->byte_stride);
                    _tile_loadd(3, data + (size_t)group * GROUP_BYTES, 64);
                    if (group & 1) {
                        _tile_zero(1);
                        _tile_dpbssd(1, 2, 3);
                        _tile_stored(1, integers[1], 64);
                    } else {
                        _tile_zero(0);
                        _tile_dpbssd(0, 2, 3);
                        _tile_stored(0, integers[0], 64);
                    }
                }
                if (!group) continue;
                // The group before is added up while this one is multiplied.
                const int32_t *done = integers[(group - 1) & 1];
                Floats scales = load_half((const uint16_t *)(data + (size_t)(group - 1) * GROUP_BYTES + GROUP * BLOCK));
                for (int r = 0; r < TILE_ROWS; r++) {
                    Floats scale = mul(scales, all(row_scales[(size_t)r * rows->scale_stride + group - 1]));
                    sums[r] = fma(floats(load_integers(done + r * BLOCK)), scale, sums[r]);
                }
            }
            int32_t left = rows->count - row < TILE_ROWS ? rows->count - row : TILE_ROWS;
            for (int r = 0; r < left; r++) put(matrix, sums[r], block, to + (size_t)(row + r) * stride, add_to);
        }
    }
    _tile_release();
}

static void multiply(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                     int32_t end) {
    if (matrix->format == INT8 && rows->count >= LEAST_TILE_ROWS)
        multiply_tiles(matrix, rows, to, stride, add_to, begin, end);
    else multiply_lanes(matrix, rows, to, stride, add_to, begin, end);
}

#else

static void multiply(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                     int32_t end) {
    multiply_lanes(matrix, rows, to, stride, add_to, begin, end);
}

#endif

// ---- rows ------------------------------------------------------------------------------------------------------------

INLINE Floats some(const float *from, int32_t count) {
    float lanes[LANES] = {0};
    for (int i = 0; i < count; i++) lanes[i] = from[i];
    return load(lanes);
}
INLINE Floats some_or_all(const float *from, int32_t left) { return left >= LANES ? load(from) : some(from, left); }
INLINE void store_some(float *to, Floats x, int32_t left) {
    if (left >= LANES) {
        store(to, x);
        return;
    }
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < left; i++) to[i] = lanes[i];
}

static void quantise(const float *from, int32_t inputs, int8_t *bytes, float *scales) {
    for (int32_t at = 0; at < inputs; at += GROUP) {
        Floats x = some_or_all(from + at, inputs - at);
        Floats y = inputs - at > LANES ? some_or_all(from + at + LANES, inputs - at - LANES) : zeros();
        float most = largest_lane(largest(absolute(x), absolute(y)));
        // What is no number, or infinite, is seen in the result: zero times it is no number.
        float damage = total(fma(y, zeros(), mul(x, zeros())));
        Floats inverse = all(most > 1e-30f ? 127.0f / most : 0.0f);
        store_bytes(bytes + at, rounded(mul(x, inverse)));
        store_bytes(bytes + at + LANES, rounded(mul(y, inverse)));
        scales[at / GROUP] = most / 127.0f + damage;
    }
}

static void rms_norm(const float *from, const float *weight, float eps, int32_t size, float *to) {
    Floats sum = zeros();
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = some_or_all(from + at, size - at);
        sum = fma(x, x, sum);
    }
    Floats scale = all(1.0f / __builtin_sqrtf(total(sum) / (float)size + eps));
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = mul(some_or_all(from + at, size - at), scale);
        store_some(to + at, mul(x, some_or_all(weight + at, size - at)), size - at);
    }
}

static void layer_norm(const float *from, const float *weight, const float *bias, float eps, int32_t size, float *to) {
    Floats sum = zeros();
    for (int32_t at = 0; at < size; at += LANES) sum = add(sum, some_or_all(from + at, size - at));
    float mean = total(sum) / (float)size;
    sum = zeros();
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = sub(some_or_all(from + at, size - at), all(mean));
        if (size - at < LANES) {
            float lanes[LANES];
            store(lanes, x);
            x = some(lanes, size - at);
        }
        sum = fma(x, x, sum);
    }
    Floats scale = all(1.0f / __builtin_sqrtf(total(sum) / (float)size + eps));
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = mul(sub(some_or_all(from + at, size - at), all(mean)), scale);
        x = fma(x, some_or_all(weight + at, size - at), some_or_all(bias + at, size - at));
        store_some(to + at, x, size - at);
    }
}

INLINE Floats sigmoid(Floats x) { return divide(all(1.0f), add(all(1.0f), exponential(sub(zeros(), x)))); }

static void silu_gate(const float *gate, const float *up, int32_t size, float *to) {
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = some_or_all(gate + at, size - at);
        store_some(to + at, mul(mul(x, sigmoid(x)), some_or_all(up + at, size - at)), size - at);
    }
}

// gelu by tanh is x times the sigmoid of twice the argument of tanh.
static void gelu(const float *from, int32_t size, float *to) {
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = some_or_all(from + at, size - at);
        Floats cubic = fma(mul(mul(x, x), x), all(0.044715f), x);
        store_some(to + at, mul(x, sigmoid(mul(cubic, all(1.5957691216057308f)))), size - at);
    }
}

static void rotate(float *head, const float *cosines, const float *sines, int32_t half) {
    for (int32_t at = 0; at < half; at += LANES) {
        int32_t left = half - at;
        Floats first = some_or_all(head + at, left), second = some_or_all(head + half + at, left);
        Floats cosine = some_or_all(cosines + at, left), sine = some_or_all(sines + at, left);
        store_some(head + at, sub(mul(first, cosine), mul(second, sine)), left);
        store_some(head + half + at, add(mul(second, cosine), mul(first, sine)), left);
    }
}

// ---- attention -------------------------------------------------------------------------------------------------------

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

// 16 times `parts` components (at most 8 parts) of one query's weighted values, keys in order.
INLINE void mix(const float *values, size_t block_stride, int32_t size, int32_t at, const int parts, const float *weights,
                int32_t length, float scale, float *to) {
    Floats sums[8];
    for (int p = 0; p < parts; p++) sums[p] = zeros();
    for (int32_t first = 0; first < length; first += KEYS) {
        const float *block = values + (size_t)(first / KEYS) * block_stride + at;
        int32_t here = length - first < KEYS ? length - first : KEYS;
        for (int32_t key = 0; key < here; key++) {
            Floats weight = all(weights[first + key]);
            for (int p = 0; p < parts; p++) sums[p] = fma(weight, load(block + key * size + p * LANES), sums[p]);
        }
    }
    for (int p = 0; p < parts; p++) store(to + at + p * LANES, mul(sums[p], all(scale)));
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
        for (int32_t q = 0; q < here; q++) {
            float *weights = scores + (size_t)q * score_stride;
            float inverse = weigh(weights, lengths[q]);
            int32_t at = 0;
            for (; at + 8 * LANES <= size; at += 8 * LANES)
                mix(values, stride, size, at, 8, weights, lengths[q], inverse, mixed[q]);
            for (; at + 4 * LANES <= size; at += 4 * LANES)
                mix(values, stride, size, at, 4, weights, lengths[q], inverse, mixed[q]);
            for (; at + LANES <= size; at += LANES)
                mix(values, stride, size, at, 1, weights, lengths[q], inverse, mixed[q]);
            for (; at < size; at++) mixed[q][at] = mix_one(values, stride, size, at, weights, lengths[q]) * inverse;
        }
    }
}

#define KERNELS(variable, title)                                                                                       \
    extern "C" const Kernels variable = {title,     multiply, quantise, rms_norm, layer_norm,                          \
                                         silu_gate, gelu,     rotate,   attend}
