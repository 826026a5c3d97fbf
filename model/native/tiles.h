// Products of many rows by AMX: sixteen rows by sixteen outputs and 32 inputs in one instruction. The sums of a group are the same
// integers as anywhere, and are added up in the same order.
#pragma once

struct TileConfig {
    uint8_t palette, start;
    uint8_t reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed));

// Fewest rows for which tiles pay.
enum { LEAST_TILE_ROWS = 8 };

// gcc does not know that tiles and what configures them are loaded from memory: what was written there has to be there.
INLINE void settle() { __asm__ volatile("" : : : "memory"); }

// One group of nibbles as signed bytes.
INLINE void unpack(const uint8_t *from, uint8_t *to, const int format) {
    for (int quad = 0; quad < GROUP / 8; quad++) {
        Quads both = load_quads(from + quad * 4 * BLOCK), low = low_nibbles(both), high = high_nibbles(both);
        if (format == INT4) low = _mm512_sub_epi8(low, _mm512_set1_epi8(MIDDLE)), high = _mm512_sub_epi8(high, _mm512_set1_epi8(MIDDLE));
        _mm512_storeu_si512(to + quad * 4 * BLOCK, low);
        _mm512_storeu_si512(to + (quad + GROUP / 8) * 4 * BLOCK, high);
    }
}

// Sixteen rows from `row` on by one block; `format` is known when this is compiled. `weights` are the block's, signed. Tiles 0 and 1 hold
// sums of higher bytes, of one group and of the next, 4 and 5 those of lower ones, 2 and 6 rows, 3 weights.
INLINE void multiply_tile(const Matrix *matrix, const Rows *rows, int32_t row, int32_t block, const uint8_t *weights, float *to,
                           int32_t stride, int add_to, const int format) {
    int32_t integers[2][2][TILE_ROWS * BLOCK] __attribute__((aligned(64)));
    const uint8_t *data = matrix->data + block * matrix->block_bytes + matrix->numbers;
    int32_t groups = matrix->inputs / GROUP;
    Floats sums[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) sums[r] = zeros();
    const int8_t *pieces = rows->bytes + panel_begin(row, rows->byte_stride);
    const float *row_scales = rows->scales + (size_t)row * rows->scale_stride;
    const float *row_sums = rows->sums + (size_t)row * rows->group_stride;
    for (int32_t group = 0; group <= groups; group++) {
        if (group < groups) {
            const int8_t *from = pieces + piece_at(group * GROUP) + group * GROUP % PIECE;
            _tile_loadd(2, from, PIECE);
            _tile_loadd(6, from + PIECE_BYTES, PIECE);
            _tile_loadd(3, weights + group * GROUP * BLOCK, 64);
            if (group & 1) {
                _tile_zero(1);
                _tile_zero(5);
                _tile_dpbssd(1, 2, 3);
                _tile_dpbssd(5, 6, 3);
                _tile_stored(1, integers[1][0], 64);
                _tile_stored(5, integers[1][1], 64);
            } else {
                _tile_zero(0);
                _tile_zero(4);
                _tile_dpbssd(0, 2, 3);
                _tile_dpbssd(4, 6, 3);
                _tile_stored(0, integers[0][0], 64);
                _tile_stored(4, integers[0][1], 64);
            }
        }
        if (!group) continue;
        // The group before is added up while this one is multiplied.
        int32_t(*done)[TILE_ROWS * BLOCK] = integers[(group - 1) & 1];
        const uint16_t *numbers = (const uint16_t *)(data + (size_t)(group - 1) * number_bytes(format));
        Floats scales = load_half(numbers), minimum = has_minimum(format) ? load_half(numbers + BLOCK) : zeros();
        for (int r = 0; r < TILE_ROWS; r++) {
            Integers sum = add_integers(times_256(load_integers(done[0] + r * BLOCK)), load_integers(done[1] + r * BLOCK));
            float scale = row_scales[(size_t)r * rows->scale_stride + (group - 1) * GROUP / WIDE];
            sums[r] = fma(floats(sum), mul(scales, all(scale)), sums[r]);
            if (has_minimum(format)) sums[r] = fma(minimum, all(row_sums[(size_t)r * rows->group_stride + group - 1]), sums[r]);
        }
    }
    int32_t left = rows->count - row < TILE_ROWS ? rows->count - row : TILE_ROWS;
    for (int r = 0; r < left; r++) put(matrix, sums[r], block, to + (size_t)(row + r) * stride, add_to);
}

// All rows by the blocks from `begin` to before `end`; `unpacked` has room for the bytes of a block of nibbles.
INLINE void multiply_tiles(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin, int32_t end,
                           uint8_t *unpacked, const int format) {
    for (int32_t block = begin; block < end; block++) {
        const uint8_t *weights = matrix->data + block * matrix->block_bytes;
        if (is_four_bits(format)) {
            for (int32_t group = 0; group < matrix->inputs / GROUP; group++)
                unpack(weights + weight_bytes(format, group * GROUP), unpacked + group * GROUP * BLOCK, format);
            weights = unpacked;
        }
        settle();
        for (int32_t row = 0; row < rows->count; row += TILE_ROWS)
            multiply_tile(matrix, rows, row, block, weights, to, stride, add_to, format);
    }
}

#include "wide_tiles.h"

// Tiles of `rows` rows; weights and rows have 64 inputs where they are `wide`, else 32.
INLINE void configure(int32_t rows, int wide) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        int of_rows = wide ? tile == 4 || tile == 5 : tile == 2 || tile == 6, of_weights = wide ? tile > 5 : tile == 3;
        config.bytes[tile] = of_rows ? (wide ? PIECE : GROUP) : 64;
        config.rows[tile] = of_weights ? (wide ? PIECE : GROUP) / 4 : rows < TILE_ROWS ? rows : (int32_t)TILE_ROWS;
    }
    settle();
    _tile_loadconfig(&config);
}

static void multiply(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                     int32_t end) {
    int format = matrix->format, wide = is_wide(format), large = is_four_bits(format) && matrix->inputs > READY_INPUTS;
    int least = wide ? (int)LEAST_WIDE_ROWS : (int)LEAST_TILE_ROWS;
    if (!is_integer(format) || format == INT8_SIXTEENS || has_byte_rows(format) || large || rows->count < least) {
        multiply_lanes(matrix, rows, to, stride, add_to, begin, end);
        return;
    }
    configure(wide ? rows->count : TILE_ROWS, wide);
    size_t room = is_four_bits(format) ? (size_t)matrix->inputs * BLOCK * (wide ? 2 : 1) : 0;
    uint8_t *unpacked = (uint8_t *)__builtin_alloca(room + 64);
    unpacked += -(uintptr_t)unpacked % 64;
#define MULTIPLY(by, format) by(matrix, rows, to, stride, add_to, begin, end, unpacked, format)
    switch (format) {
    case INT8: MULTIPLY(multiply_tiles, INT8); break;
    case INT4: MULTIPLY(multiply_tiles, INT4); break;
    case INT8_MINIMUM: MULTIPLY(multiply_tiles, INT8_MINIMUM); break;
    case INT4_MINIMUM: MULTIPLY(multiply_tiles, INT4_MINIMUM); break;
    case INT8_WIDE: MULTIPLY(multiply_wide_tiles, INT8_WIDE); break;
    default: MULTIPLY(multiply_wide_tiles, INT4_WIDE);
    }
#undef MULTIPLY
    _tile_release();
}
