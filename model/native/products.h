// Rows times a matrix. A row's sum of one output: group after group (or input after input), each by one fused multiplication.
#pragma once

#include "core.h"
#include "integers.h"
#include "vectors.h"

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

// Bytes by which floats and integers of a block alone are fetched before they are multiplied, as suits a processor's own foresight
// (measured on Zen 4 and Zen 3).
#if TOPKAPI_LEVEL == LEVEL_AVX2
enum { AHEAD = 1024, INTEGERS_AHEAD = 8192 };
#else
enum { AHEAD = 1024, INTEGERS_AHEAD = 1024 };
#endif

// Whether rows from `row` on wait for their weights, being the first to meet them. What they take next is fetched then, while the 64
// bytes at `from` are multiplied: of a block alone that lies further on; of `blocks` side by side it is the same place of those that
// follow.
INLINE int waits(int32_t row) { return row == 0; }
INLINE void fetch_next(const uint8_t *from, const int blocks, size_t block_bytes, const int format) {
    size_t ahead = is_integer(format) ? INTEGERS_AHEAD : AHEAD;
    prefetch_early(from + (blocks == 1 ? ahead : blocks * block_bytes));
}

// What makes up for what the weights of a group of a block, or of one half of it, are counted from: minus that times the total of the
// row's numbers.
INLINE int32_t correction(const int32_t *totals, int half, const int format) {
    if (format == INT8_SIXTEENS) return -LIFTED * totals[half];
    return (format == INT4 ? -MIDDLE : format == INT4_MINIMUM ? 0 : -LIFTED) * (totals[0] + totals[1]);
}

// `count` rows (at most 4) by `blocks` blocks (at most 4) of a `format`, all known when this is compiled.
INLINE void multiply_integers(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block,
                              const int blocks, float *to, int32_t stride, int add_to, const int format) {
    const int halves = format == INT8_SIXTEENS ? 2 : 1, quads = GROUP / 4 / halves;
    const int32_t from_nothing[2] = {0, 0};
    Floats sums[4][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes, *numbers = data + matrix->numbers;
    const int8_t *pieces = rows->bytes + panel_begin(row, rows->byte_stride);
    for (int32_t input = 0; input < matrix->inputs; input += GROUP) {
        const int8_t *piece = pieces + piece_at(input);
        for (int b = 0; b < blocks && waits(row); b++)
            fetch_next(numbers + b * matrix->block_bytes, blocks, matrix->block_bytes, format);
        for (int half = 0; half < halves; half++) {
            Wide parts[4][4];
            for (int r = 0; r < count; r++)
                for (int b = 0; b < blocks; b++) parts[r][b] = begin_wide(from_nothing);
            for (int quad = half * quads; quad < (half + 1) * quads; quad++) {
                if (is_four_bits(format) && quad >= quads / 2) break;
                Quads weights[4];
                for (int b = 0; b < blocks; b++) {
                    const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                    if (waits(row)) fetch_next(from, blocks, matrix->block_bytes, format);
                    weights[b] = is_four_bits(format) ? load_quads(from) : load_bytes(from);
                }
                for (int r = 0; r < count; r++) {
                    int32_t within = input % PIECE + quad * 4, own = (row + r) % TILE_ROWS;
                    Four low = four_inputs(piece, own, within);
                    if (is_four_bits(format)) {
                        Four high = four_inputs(piece, own, within + GROUP / 2);
                        for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], low, low_ready(weights[b]));
                        for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], high, high_ready(weights[b]));
                    } else {
                        for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], low, made_ready(weights[b]));
                    }
                }
            }
            for (int b = 0; b < blocks; b++) {
                const uint16_t *own = (const uint16_t *)(numbers + b * matrix->block_bytes);
                Floats scales = load_half(own + half * BLOCK);
                for (int r = 0; r < count; r++) {
                    size_t group = (size_t)(row + r) * rows->group_stride + input / GROUP;
                    Integers part = add_integers(end_wide(parts[r][b]), all_integers(correction(rows->totals + 2 * group, half, format)));
                    float scale = rows->scales[(size_t)(row + r) * rows->scale_stride + input / WIDE];
                    sums[r][b] = fma(floats(part), mul(scales, all(scale)), sums[r][b]);
                    if (has_minimum(format)) sums[r][b] = fma(load_half(own + BLOCK), all(rows->sums[group]), sums[r][b]);
                }
            }
        }
        data += weight_bytes(format, GROUP), numbers += number_bytes(format);
    }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) put(matrix, sums[r][b], block + b, to + (size_t)(row + r) * stride, add_to);
}

// A wide matrix whose weights were made ready beforehand: a block of it, for many rows.
enum { READY_WIDE = INT4_BYTES + 1 };
INLINE size_t ready_bytes(int format, size_t inputs) {
    return format == READY_WIDE ? inputs * BLOCK / sizeof(Quads) * sizeof(Ready) : weight_bytes(format, inputs);
}

// The weights of four inputs, step number `quad` (of four) through a half, the first or the second, of the 32 that begin at `from`.
INLINE Ready load_wide(const uint8_t *from, int half, int quad, Quads steps, Quads offsets, const int format) {
    if (format == READY_WIDE) return load_ready(from + (half * 4 + quad) * sizeof(Ready));
    if (format == INT8_WIDE) return made_ready(load_bytes(from + (half * 4 + quad) * sizeof(Quads)));
    Quads both = load_quads(from + quad * sizeof(Quads));
    return made_ready(stretched(half ? high_nibbles(both) : low_nibbles(both), steps, offsets));
}

#if TOPKAPI_LEVEL == LEVEL_AVX2

// A single row by `blocks` blocks of wide nibbles as they are: sums of 32 inputs are multiplied by the steps, and the total of the
// row's numbers by the offsets, which gives the same integers and takes two thirds of the instructions. (Beyond 32 bits on the way,
// sums wrap around and come back: what they end in fits.)
INLINE void multiply_nibbles(const Matrix *matrix, const Rows *rows, int32_t row, int32_t block, const int blocks, float *to,
                             int32_t stride, int add_to) {
    Floats sums[4];
    for (int b = 0; b < blocks; b++) sums[b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes, *numbers = data + matrix->numbers;
    const int8_t *pieces = rows->bytes + panel_begin(row, rows->byte_stride);
    for (int32_t input = 0; input < matrix->inputs; numbers += number_bytes(INT4_WIDE)) {
        const float scale = rows->scales[(size_t)row * rows->scale_stride + input / WIDE];
        const uint8_t *stretch = numbers + BLOCK * 2;
        Integers wide[4];
        for (int b = 0; b < blocks; b++) wide[b] = no_integers();
        for (int b = 0; b < blocks && waits(row); b++)
            for (size_t own = 0; own < number_bytes(INT4_WIDE); own += 64)
                fetch_next(numbers + b * matrix->block_bytes + own, blocks, matrix->block_bytes, INT4_WIDE);
        for (int32_t end = input + WIDE < matrix->inputs ? input + WIDE : matrix->inputs; input < end; input += GROUP) {
            const int8_t *piece = pieces + piece_at(input);
            int32_t own = row % TILE_ROWS, within = input % PIECE;
            __m256i total = total_of_group(wide_numbers(piece, own, within));
            Integers parts[4];
            for (int b = 0; b < blocks; b++) parts[b] = no_integers();
            for (int quad = 0; quad < 4; quad++) {
                Four low = four_inputs(piece, own, within + quad * 4), high = four_inputs(piece, own, within + GROUP / 2 + quad * 4);
                for (int b = 0; b < blocks; b++) {
                    const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                    if (waits(row)) fetch_next(from, blocks, matrix->block_bytes, INT4_WIDE);
                    Quads weights = load_quads(from);
                    parts[b] = add_wide(add_wide(parts[b], low, low_ready(weights)), high, high_ready(weights));
                }
            }
            for (int b = 0; b < blocks; b++)
                wide[b] = add_stretched(wide[b], parts[b], total, stretch + b * matrix->block_bytes);
            data += weight_bytes(INT4_WIDE, GROUP), stretch += BLOCK * 2;
        }
        for (int b = 0; b < blocks; b++) {
            Floats scales = load_half((const uint16_t *)(numbers + b * matrix->block_bytes));
            sums[b] = fma(floats(wide[b]), mul(scales, all(scale)), sums[b]);
        }
    }
    for (int b = 0; b < blocks; b++) put(matrix, sums[b], block + b, to + (size_t)row * stride, add_to);
}

#endif

// `count` rows (at most 4) by `blocks` blocks (at most 4) of a wide `format`, all known when this is compiled.
INLINE void multiply_wide(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block, const int blocks,
                          float *to, int32_t stride, int add_to, const int format) {
#if TOPKAPI_LEVEL == LEVEL_AVX2
    if (count == 1 && format == INT4_WIDE) {
        multiply_nibbles(matrix, rows, row, block, blocks, to, stride, add_to);
        return;
    }
#endif
    Floats sums[4][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes, *numbers = data + matrix->numbers;
    const int8_t *pieces = rows->bytes + panel_begin(row, rows->byte_stride);
    for (int32_t input = 0; input < matrix->inputs; numbers += number_bytes(format)) {
        size_t group = input / WIDE, scale_stride = rows->scale_stride, at = (size_t)row * scale_stride + group;
        Wide parts[4][4];
        for (int r = 0; r < count; r++)
            for (int b = 0; b < blocks; b++) parts[r][b] = begin_wide(rows->offsets + 2 * (at + r * scale_stride));
        const uint8_t *stretch = numbers + BLOCK * 2;
        for (int b = 0; b < blocks && waits(row); b++)
            for (size_t own = 0; own < number_bytes(format); own += 64)
                fetch_next(numbers + b * matrix->block_bytes + own, blocks, matrix->block_bytes, format);
        for (int32_t end = input + WIDE < matrix->inputs ? input + WIDE : matrix->inputs; input < end; input += GROUP) {
            const int8_t *piece = pieces + piece_at(input);
            Quads steps[4], offsets[4];
            for (int b = 0; b < blocks && format == INT4_WIDE; b++) {
                steps[b] = spread_steps(stretch + b * matrix->block_bytes);
                offsets[b] = spread_offsets(stretch + b * matrix->block_bytes + BLOCK);
            }
            for (int quad = 0; quad < 4; quad++) {
                for (int b = 0; b < blocks && waits(row) && format != READY_WIDE; b++) {
                    const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                    fetch_next(from, blocks, matrix->block_bytes, format);
                    if (format == INT8_WIDE) fetch_next(from + 4 * 4 * BLOCK, blocks, matrix->block_bytes, format);
                }
                for (int half = 0; half < 2; half++) {
                    Ready weights[4];
                    for (int b = 0; b < blocks; b++)
                        weights[b] = load_wide(data + b * matrix->block_bytes, half, quad, steps[b], offsets[b], format);
                    for (int r = 0; r < count; r++) {
                        Four x = four_inputs(piece, (row + r) % TILE_ROWS, input % PIECE + half * GROUP / 2 + quad * 4);
                        for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], x, weights[b]);
                    }
                }
            }
            data += ready_bytes(format, GROUP), stretch += BLOCK * 2;
        }
        for (int b = 0; b < blocks; b++) {
            Floats scales = load_half((const uint16_t *)(numbers + b * matrix->block_bytes));
            for (int r = 0; r < count; r++)
                sums[r][b] = fma(floats(end_wide(parts[r][b])), mul(scales, all(rows->scales[at + r * scale_stride])), sums[r][b]);
        }
    }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) put(matrix, sums[r][b], block + b, to + (size_t)(row + r) * stride, add_to);
}

// `count` rows of bytes (at most 4) by `blocks` blocks (at most 4).
INLINE void multiply_bytes(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block, const int blocks,
                           float *to, int32_t stride, int add_to, const int format) {
    Floats sums[4][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes, *numbers = data + matrix->numbers;
    const int8_t *pieces = rows->bytes + panel_begin(row, rows->byte_stride) + row % TILE_ROWS * PIECE;
    size_t group = (size_t)row * rows->group_stride;
    for (int32_t input = 0; input < matrix->inputs; input += GROUP, group++) {
        const int8_t *piece = pieces + piece_at(input) + input % PIECE;
        for (int b = 0; b < blocks && waits(row); b++)
            fetch_next(numbers + b * matrix->block_bytes, blocks, matrix->block_bytes, format);
        Integers parts[4][4];
        for (int r = 0; r < count; r++)
            for (int b = 0; b < blocks; b++) parts[r][b] = all_integers(rows->totals[2 * (group + r * (size_t)rows->group_stride)]);
        for (int quad = 0; quad < GROUP / 4; quad++) {
            Quads weights[4];
            for (int b = 0; b < blocks; b++) {
                const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                if (waits(row)) fetch_next(from, blocks, matrix->block_bytes, format);
                weights[b] = load_bytes(from);
            }
            for (int r = 0; r < count; r++) {
                Quads four = four_bytes(piece + r * PIECE + quad * 4);
                for (int b = 0; b < blocks; b++) parts[r][b] = add_bytes(parts[r][b], four, weights[b]);
            }
        }
        for (int b = 0; b < blocks; b++) {
            Floats scales = load_half((const uint16_t *)(numbers + b * matrix->block_bytes));
            for (int r = 0; r < count; r++) {
                Floats scale = all(rows->sums[group + r * (size_t)rows->group_stride]);
                sums[r][b] = fma(floats(parts[r][b]), mul(scales, scale), sums[r][b]);
            }
        }
        data += weight_bytes(format, GROUP), numbers += number_bytes(format);
    }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) put(matrix, sums[r][b], block + b, to + (size_t)(row + r) * stride, add_to);
}

// `count` rows of bytes (at most 4) by `blocks` blocks of nibbles (at most 4).
INLINE void multiply_byte_nibbles(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block, const int blocks,
                                  float *to, int32_t stride, int add_to, const int format) {
    Floats sums[4][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes, *numbers = data + matrix->numbers;
    const int8_t *pieces = rows->bytes + panel_begin(row, rows->byte_stride) + row % TILE_ROWS * PIECE;
    size_t group = (size_t)row * rows->group_stride, group_stride = rows->group_stride;
    for (int32_t input = 0; input < matrix->inputs; numbers += number_bytes(format)) {
        const uint8_t *stretch = numbers + BLOCK * 2;
        Floats scales[4];
        for (int b = 0; b < blocks; b++) {
            const uint8_t *own = numbers + b * matrix->block_bytes;
            scales[b] = load_half((const uint16_t *)own);
            for (size_t at = 0; at < number_bytes(format) && waits(row); at += 64)
                fetch_next(own + at, blocks, matrix->block_bytes, format);
        }
        for (int32_t end = input + WIDE < matrix->inputs ? input + WIDE : matrix->inputs; input < end; input += GROUP, group++) {
            const int8_t *piece = pieces + piece_at(input) + input % PIECE;
            Nibbles parts[4][4];
            for (int r = 0; r < count; r++)
                for (int b = 0; b < blocks; b++) parts[r][b] = no_integers();
            for (int quad = 0; quad < 4; quad++) {
                Quads low[4], high[4];
                for (int b = 0; b < blocks; b++) {
                    const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                    if (waits(row)) fetch_next(from, blocks, matrix->block_bytes, format);
                    Quads both = load_quads(from);
                    low[b] = low_nibbles(both), high[b] = high_nibbles(both);
                }
                for (int r = 0; r < count; r++) {
                    const int8_t *own = piece + r * PIECE + quad * 4;
                    Quads first = four_bytes(own), second = four_bytes(own + GROUP / 2);
                    for (int b = 0; b < blocks; b++)
                        parts[r][b] = add_nibbles(add_nibbles(parts[r][b], first, low[b]), second, high[b]);
                }
            }
            for (int b = 0; b < blocks; b++) {
                Stretch own = load_stretch(stretch + b * matrix->block_bytes);
                for (int r = 0; r < count; r++) {
                    Integers part = stretched_sum(parts[r][b], rows->totals[2 * (group + r * group_stride) + 1], own);
                    sums[r][b] = fma(floats(part), mul(scales[b], all(rows->sums[group + r * group_stride])), sums[r][b]);
                }
            }
            data += weight_bytes(format, GROUP), stretch += BLOCK * 2;
        }
    }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) put(matrix, sums[r][b], block + b, to + (size_t)(row + r) * stride, add_to);
}

INLINE void multiply_floats(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block,
                            const int blocks, float *to, int32_t stride, int add_to, const int format) {
    Floats sums[8][4];
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) sums[r][b] = zeros();
    const uint8_t *data = matrix->data + block * matrix->block_bytes;
    const float *from = rows->floats + (size_t)row * rows->stride;
    // Two rows of float32 are over before what follows is there.
    const int beside = format == FLOAT32 && count == 2 ? 1 : blocks;
    for (int32_t input = 0; input < matrix->inputs; input++) {
        Floats weights[4];
        for (int b = 0; b < blocks; b++) {
            const uint8_t *here = data + b * matrix->block_bytes + weight_bytes(format, input);
            if (waits(row)) fetch_next(here, beside, matrix->block_bytes, format);
            weights[b] = format == BFLOAT16 ? load_bfloat((const uint16_t *)here) : load((const float *)here);
        }
        for (int r = 0; r < count; r++) {
            Floats x = all(from[(size_t)r * rows->stride + input]);
            for (int b = 0; b < blocks; b++) sums[r][b] = fma(x, weights[b], sums[r][b]);
        }
    }
    for (int r = 0; r < count; r++)
        for (int b = 0; b < blocks; b++) put(matrix, sums[r][b], block + b, to + (size_t)(row + r) * stride, add_to);
}

// As many sums at once as there are registers for: a single row takes more blocks side by side (`BROAD`), so that no sum waits for
// itself. Where memory is slower than that, as it is for floats and for wide bytes, one block alone is read faster on Zen 4; on Zen 3 two.
#if TOPKAPI_LEVEL >= LEVEL_AMX
enum { BROAD = 4, BYTE_BROAD = 4, FLOAT_BROAD = 4, NARROW = 2, TALL = 8, WIDE_TALL = 4 };
#elif TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
enum { BROAD = 4, BYTE_BROAD = 1, FLOAT_BROAD = 1, NARROW = 2, TALL = 8, WIDE_TALL = 4 };
#elif TOPKAPI_LEVEL >= LEVEL_AVX_VNNI
enum { BROAD = 2, BYTE_BROAD = 2, FLOAT_BROAD = 1, NARROW = 1, TALL = 4, WIDE_TALL = 2 };
#else
enum { BROAD = 2, BYTE_BROAD = 2, FLOAT_BROAD = 2, NARROW = 1, TALL = 4, WIDE_TALL = 4 };
#endif

// The blocks from `begin` to before `end` in tiles; `tile` is one of the products above for a format that is known, of which a single row
// takes `broad` blocks at a time and others come `most` at a time. A function for each: in one for all, compilers find fewer registers.
#define IN_TILES(name, tile, format, broad, most)                                                                      \
    static __attribute__((noinline)) void name(const Matrix *matrix, const Rows *rows, float *to, int32_t stride,      \
                                               int add_to, int32_t begin, int32_t end) {                               \
        int32_t block = begin, count = rows->count;                                                                    \
        if (count == 1)                                                                                                \
            for (; block + broad <= end; block += broad) tile(matrix, rows, 0, 1, block, broad, to, stride, add_to, format); \
        for (; block + NARROW <= end; block += NARROW) {                                                               \
            int32_t row = 0;                                                                                           \
            for (; row + most <= count; row += most)                                                                   \
                tile(matrix, rows, row, most, block, NARROW, to, stride, add_to, format);                              \
            for (; most > 4 && row + 4 <= count; row += 4)                                                             \
                tile(matrix, rows, row, 4, block, NARROW, to, stride, add_to, format);                                 \
            for (; row + 2 <= count; row += 2) tile(matrix, rows, row, 2, block, NARROW, to, stride, add_to, format);  \
            if (row < count) tile(matrix, rows, row, 1, block, NARROW, to, stride, add_to, format);                    \
        }                                                                                                              \
        for (; block < end; block++)                                                                                   \
            for (int32_t row = 0; row < count; row++)                                                                  \
                tile(matrix, rows, row, 1, block, 1, to, stride, add_to, format);                                      \
    }

IN_TILES(multiply_float32, multiply_floats, FLOAT32, FLOAT_BROAD, TALL)
IN_TILES(multiply_bfloat16, multiply_floats, BFLOAT16, FLOAT_BROAD, TALL)
IN_TILES(multiply_int8, multiply_integers, INT8, BROAD, 4)
IN_TILES(multiply_int4, multiply_integers, INT4, BROAD, 4)
IN_TILES(multiply_int8_minimum, multiply_integers, INT8_MINIMUM, BROAD, 4)
IN_TILES(multiply_int4_minimum, multiply_integers, INT4_MINIMUM, BROAD, 4)
IN_TILES(multiply_int8_sixteens, multiply_integers, INT8_SIXTEENS, BROAD, 4)
IN_TILES(multiply_int8_wide, multiply_wide, INT8_WIDE, BYTE_BROAD, WIDE_TALL)
IN_TILES(multiply_int4_wide, multiply_wide, INT4_WIDE, BROAD, WIDE_TALL)
IN_TILES(multiply_int8_bytes, multiply_bytes, INT8_BYTES, BROAD, 4)
IN_TILES(multiply_int4_bytes, multiply_byte_nibbles, INT4_BYTES, BROAD, 4)

// By their format's number.
static void multiply_lanes(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                           int32_t end) {
    static void (*const products[])(const Matrix *, const Rows *, float *, int32_t, int, int32_t, int32_t) = {
        multiply_float32,      multiply_bfloat16,      multiply_int8,      multiply_int4,      multiply_int8_minimum,
        multiply_int4_minimum, multiply_int8_sixteens, multiply_int8_wide, multiply_int4_wide, multiply_int8_bytes,
        multiply_int4_bytes};
    products[matrix->format](matrix, rows, to, stride, add_to, begin, end);
}

// The most inputs of a block that is made ready, or unpacked, once for all rows.
enum { READY_INPUTS = 8192 };

#if TOPKAPI_LEVEL < LEVEL_AMX
IN_TILES(multiply_made_ready, multiply_wide, READY_WIDE, BYTE_BROAD, WIDE_TALL)

// Fewest rows for which that pays.
enum { LEAST_READY_ROWS = TOPKAPI_LEVEL == LEVEL_AVX2 ? 16 : 48 };
INLINE int pays_ready(const Matrix *matrix, const Rows *rows) {
    int simple = matrix->format == INT8_WIDE || matrix->format == BFLOAT16;
    int shorter = matrix->format == INT4_WIDE || (simple && TOPKAPI_LEVEL == LEVEL_AVX2);
    return shorter && rows->count >= LEAST_READY_ROWS && matrix->inputs <= READY_INPUTS;
}

INLINE void make_block_ready(const Matrix *matrix, int32_t block, uint8_t *to, uint8_t *scales, const int format) {
    const uint8_t *from = matrix->data + block * matrix->block_bytes, *numbers = from + matrix->numbers;
    for (int32_t input = 0; input < matrix->inputs; input += GROUP) {
        const uint8_t *own = numbers + input / WIDE * number_bytes(format);
        if (input % WIDE == 0) memcpy(scales + input / WIDE * number_bytes(READY_WIDE), own, number_bytes(READY_WIDE));
        Quads steps, offsets;
        if (format == INT4_WIDE) {
            const uint8_t *stretch = own + BLOCK * 2 + input % WIDE / GROUP * BLOCK * 2;
            steps = spread_steps(stretch), offsets = spread_offsets(stretch + BLOCK);
        }
        for (int half = 0; half < 2; half++)
            for (int quad = 0; quad < 4; quad++, to += sizeof(Ready))
                store_ready(to, load_wide(from + weight_bytes(format, input), half, quad, steps, offsets, format));
    }
}

INLINE void make_floats_ready(const Matrix *matrix, int32_t block, uint8_t *to) {
    const uint16_t *from = (const uint16_t *)(matrix->data + block * matrix->block_bytes);
    for (int32_t input = 0; input < matrix->inputs; input++, from += BLOCK, to += BLOCK * sizeof(float))
        store((float *)to, load_bfloat(from));
}

// The same products with blocks made ready first.
static void multiply_ready(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin, int32_t end) {
    Matrix ready = *matrix;
    ready.format = matrix->format == BFLOAT16 ? FLOAT32 : (int)READY_WIDE, ready.numbers = ready_bytes(ready.format, matrix->inputs);
    size_t groups = is_integer(ready.format) ? wide_groups(matrix->inputs) : 0;
    ready.block_bytes = rounded_up(ready.numbers + groups * number_bytes(ready.format), sizeof(Quads));
    uint8_t *memory = (uint8_t *)__builtin_alloca(NARROW * ready.block_bytes + 64);
    memory += -(uintptr_t)memory % 64;
    ready.data = memory;
    for (int32_t block = begin; block < end; block += NARROW) {
        int32_t count = end - block < NARROW ? end - block : (int32_t)NARROW;
        for (int32_t b = 0; b < count; b++) {
            uint8_t *into = memory + b * ready.block_bytes, *scales = into + ready.numbers;
            if (matrix->format == BFLOAT16) make_floats_ready(matrix, block + b, into);
            else if (matrix->format == INT4_WIDE) make_block_ready(matrix, block + b, into, scales, INT4_WIDE);
            else make_block_ready(matrix, block + b, into, scales, INT8_WIDE);
        }
        ready.outputs = matrix->outputs - block * BLOCK;
        if (matrix->bias) ready.bias = matrix->bias + block * BLOCK;
        (ready.format == FLOAT32 ? multiply_float32 : multiply_made_ready)(&ready, rows, to + block * BLOCK, stride, add_to, 0, count);
    }
}
#endif

#if TOPKAPI_LEVEL >= LEVEL_AMX
#include "tiles.h"
#else
static void multiply(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                     int32_t end) {
    (pays_ready(matrix, rows) ? multiply_ready : multiply_lanes)(matrix, rows, to, stride, add_to, begin, end);
}
#endif
