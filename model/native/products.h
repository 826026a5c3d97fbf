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

// Bytes by which a block alone is fetched before it is multiplied: within a page, as processors foresee it themselves.
enum { AHEAD = 1024 };

// Whether `count` rows from `row` on wait for the weights that they are the first to meet: a single row always, several where they are
// multiplied as fast as memory is read.
INLINE int waits(int32_t row, const int count) { return TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI ? row == 0 : count == 1; }

// What they take next is fetched while the 64 bytes at `from` are multiplied. Of a block alone that lies further on; of `blocks` side by
// side it is the same place of those that follow.
INLINE void fetch_next(const uint8_t *from, const int blocks, size_t block_bytes) {
    prefetch_early(from + (blocks == 1 ? AHEAD : blocks * block_bytes));
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
        for (int b = 0; b < blocks && waits(row, count); b++)
            fetch_next(numbers + b * matrix->block_bytes, blocks, matrix->block_bytes);
        for (int half = 0; half < halves; half++) {
            Wide parts[4][4];
            for (int r = 0; r < count; r++)
                for (int b = 0; b < blocks; b++) parts[r][b] = begin_wide(from_nothing);
            for (int quad = half * quads; quad < (half + 1) * quads; quad++) {
                if (is_four_bits(format) && quad >= quads / 2) break;
                Quads weights[4];
                for (int b = 0; b < blocks; b++) {
                    const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                    if (waits(row, count)) fetch_next(from, blocks, matrix->block_bytes);
                    weights[b] = is_four_bits(format) ? load_quads(from) : load_bytes(from);
                }
                for (int r = 0; r < count; r++) {
                    int32_t within = input % PIECE + quad * 4, own = (row + r) % TILE_ROWS;
                    Four low = four_inputs(piece, own, within);
                    if (is_four_bits(format)) {
                        Four high = four_inputs(piece, own, within + GROUP / 2);
                        for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], low, low_nibbles(weights[b]));
                        for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], high, high_nibbles(weights[b]));
                    } else {
                        for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], low, weights[b]);
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

// Step number `quad` (of four) through 32 inputs of a wide matrix: the weights of four inputs, and of four that follow 16 later.
INLINE void load_wide(const uint8_t *from, int quad, Quads steps, Quads offsets, const int format, Quads *first, Quads *second) {
    if (format == INT8_WIDE) {
        *first = load_bytes(from + quad * 4 * BLOCK), *second = load_bytes(from + (quad + 4) * 4 * BLOCK);
        return;
    }
    Quads both = load_quads(from + quad * 4 * BLOCK);
    *first = stretched(low_nibbles(both), steps, offsets), *second = stretched(high_nibbles(both), steps, offsets);
}

// `count` rows (at most 4) by `blocks` blocks (at most 4) of a wide `format`, all known when this is compiled.
INLINE void multiply_wide(const Matrix *matrix, const Rows *rows, int32_t row, const int count, int32_t block, const int blocks,
                          float *to, int32_t stride, int add_to, const int format) {
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
        for (int b = 0; b < blocks && waits(row, count); b++)
            for (size_t own = 0; own < number_bytes(format); own += 64)
                fetch_next(numbers + b * matrix->block_bytes + own, blocks, matrix->block_bytes);
        for (int32_t end = input + WIDE < matrix->inputs ? input + WIDE : matrix->inputs; input < end; input += GROUP) {
            const int8_t *piece = pieces + piece_at(input);
            Quads steps[4], offsets[4];
            for (int b = 0; b < blocks && format == INT4_WIDE; b++) {
                steps[b] = spread_steps(stretch + b * matrix->block_bytes);
                offsets[b] = spread_offsets(stretch + b * matrix->block_bytes + BLOCK);
            }
            for (int quad = 0; quad < 4; quad++) {
                Quads first[4], second[4];
                for (int b = 0; b < blocks && waits(row, count); b++) {
                    const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                    fetch_next(from, blocks, matrix->block_bytes);
                    if (format == INT8_WIDE) fetch_next(from + 4 * 4 * BLOCK, blocks, matrix->block_bytes);
                }
                for (int b = 0; b < blocks; b++)
                    load_wide(data + b * matrix->block_bytes, quad, steps[b], offsets[b], format, first + b, second + b);
                for (int r = 0; r < count; r++) {
                    int32_t within = input % PIECE + quad * 4, own = (row + r) % TILE_ROWS;
                    Four low = four_inputs(piece, own, within), high = four_inputs(piece, own, within + GROUP / 2);
                    for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], low, first[b]);
                    for (int b = 0; b < blocks; b++) parts[r][b] = add_wide(parts[r][b], high, second[b]);
                }
            }
            data += weight_bytes(format, GROUP), stretch += BLOCK * 2;
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
        for (int b = 0; b < blocks && waits(row, count); b++)
            fetch_next(numbers + b * matrix->block_bytes, blocks, matrix->block_bytes);
        Integers parts[4][4];
        for (int r = 0; r < count; r++)
            for (int b = 0; b < blocks; b++) parts[r][b] = all_integers(rows->totals[2 * (group + r * (size_t)rows->group_stride)]);
        for (int quad = 0; quad < GROUP / 4; quad++) {
            Quads weights[4];
            for (int b = 0; b < blocks; b++) {
                const uint8_t *from = data + b * matrix->block_bytes + quad * 4 * BLOCK;
                if (waits(row, count)) fetch_next(from, blocks, matrix->block_bytes);
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
            if (waits(row, count)) fetch_next(here, beside, matrix->block_bytes);
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
// itself. Where memory is slower than that, as it is for floats and for wide bytes, one block alone is read faster (measured on Zen 4).
#if TOPKAPI_LEVEL >= LEVEL_AMX
enum { BROAD = 4, BYTE_BROAD = 4, FLOAT_BROAD = 4, NARROW = 2, TALL = 8, WIDE_TALL = 4 };
#elif TOPKAPI_LEVEL >= LEVEL_AVX512_VNNI
enum { BROAD = 4, BYTE_BROAD = 1, FLOAT_BROAD = 1, NARROW = 2, TALL = 8, WIDE_TALL = 4 };
#elif TOPKAPI_LEVEL >= LEVEL_AVX_VNNI
enum { BROAD = 2, BYTE_BROAD = 2, FLOAT_BROAD = 1, NARROW = 1, TALL = 4, WIDE_TALL = 2 };
#else
enum { BROAD = 2, BYTE_BROAD = 2, FLOAT_BROAD = 1, NARROW = 1, TALL = 4, WIDE_TALL = 4 };
#endif

// The blocks from `begin` to before `end` in tiles; `tile` is one of the products above for a format that is known, of which a single row
// takes `broad` blocks at a time and others come `most` at a time.
#define IN_TILES(tile, format, broad, most)                                                                            \
    do {                                                                                                               \
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
    } while (0)

static void multiply_wide_bytes(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                                int32_t end) {
    IN_TILES(multiply_wide, INT8_WIDE, BYTE_BROAD, WIDE_TALL);
}

// The most inputs of a block of nibbles that is unpacked once for all rows.
enum { UNPACKED_INPUTS = 8192 };

#if TOPKAPI_LEVEL < LEVEL_AMX
// Fewest rows for which that pays.
enum { LEAST_UNPACKED_ROWS = 48 };

// The same products with blocks of INT4_WIDE made into bytes first.
static void multiply_unpacked(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                              int32_t end) {
    Matrix bytes = *matrix;
    bytes.format = INT8_WIDE, bytes.numbers = weight_bytes(INT8_WIDE, matrix->inputs);
    bytes.block_bytes = bytes.numbers + wide_groups(matrix->inputs) * number_bytes(INT8_WIDE);
    uint8_t *unpacked = (uint8_t *)__builtin_alloca(NARROW * bytes.block_bytes + 64);
    unpacked += -(uintptr_t)unpacked % 64;
    bytes.data = unpacked;
    for (int32_t block = begin; block < end; block += NARROW) {
        int32_t count = end - block < NARROW ? end - block : (int32_t)NARROW;
        for (int32_t b = 0; b < count; b++) {
            const uint8_t *from = matrix->data + (block + b) * matrix->block_bytes, *numbers = from + matrix->numbers;
            uint8_t *into = unpacked + b * bytes.block_bytes, *scales = into + bytes.numbers;
            for (int32_t input = 0; input < matrix->inputs; input += GROUP, into += GROUP * BLOCK) {
                const uint8_t *own = numbers + input / WIDE * number_bytes(INT4_WIDE);
                if (input % WIDE == 0) memcpy(scales + input / WIDE * number_bytes(INT8_WIDE), own, number_bytes(INT8_WIDE));
                const uint8_t *stretch = own + BLOCK * 2 + input % WIDE / GROUP * BLOCK * 2;
                Quads steps = spread_steps(stretch), offsets = spread_offsets(stretch + BLOCK), first, second;
                for (int quad = 0; quad < 4; quad++) {
                    load_wide(from + weight_bytes(INT4_WIDE, input), quad, steps, offsets, INT4_WIDE, &first, &second);
                    store_quads(into + quad * 4 * BLOCK, first);
                    store_quads(into + (quad + 4) * 4 * BLOCK, second);
                }
            }
        }
        bytes.outputs = matrix->outputs - block * BLOCK;
        if (matrix->bias) bytes.bias = matrix->bias + block * BLOCK;
        multiply_wide_bytes(&bytes, rows, to + block * BLOCK, stride, add_to, 0, count);
    }
}
#endif

static void multiply_lanes(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                           int32_t end) {
    switch (matrix->format) {
    case FLOAT32: IN_TILES(multiply_floats, FLOAT32, FLOAT_BROAD, TALL); break;
    case BFLOAT16: IN_TILES(multiply_floats, BFLOAT16, FLOAT_BROAD, TALL); break;
    case INT8: IN_TILES(multiply_integers, INT8, BROAD, 4); break;
    case INT4: IN_TILES(multiply_integers, INT4, BROAD, 4); break;
    case INT8_MINIMUM: IN_TILES(multiply_integers, INT8_MINIMUM, BROAD, 4); break;
    case INT4_MINIMUM: IN_TILES(multiply_integers, INT4_MINIMUM, BROAD, 4); break;
    case INT8_WIDE: multiply_wide_bytes(matrix, rows, to, stride, add_to, begin, end); break;
    case INT4_WIDE: IN_TILES(multiply_wide, INT4_WIDE, BROAD, WIDE_TALL); break;
    case INT8_BYTES: IN_TILES(multiply_bytes, INT8_BYTES, BROAD, 4); break;
    default: IN_TILES(multiply_integers, INT8_SIXTEENS, BROAD, 4);
    }
}

#if TOPKAPI_LEVEL >= LEVEL_AMX
#include "tiles.h"
#else
static void multiply(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                     int32_t end) {
    int unpack = matrix->format == INT4_WIDE && rows->count >= LEAST_UNPACKED_ROWS && matrix->inputs <= UNPACKED_INPUTS;
    (unpack ? multiply_unpacked : multiply_lanes)(matrix, rows, to, stride, add_to, begin, end);
}
#endif
