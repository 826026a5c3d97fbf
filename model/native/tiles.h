// Products of many rows by AMX: sixteen rows by sixteen outputs and 32 inputs in one instruction. The sums of a group are the same
// integers as anywhere, and are added up in the same order.
#pragma once

struct TileConfig {
    uint8_t palette, start;
    uint8_t reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed));

enum { TILE_ROWS = 16, LEAST_TILE_ROWS = 8 };

// Sixteen rows from `row` on by one block; `format` is known when this is compiled.
INLINE void multiply_tile(const Matrix *matrix, const Rows *rows, int32_t row, int32_t block, float *to, int32_t stride,
                          int add_to, const int format) {
    int32_t integers[2][TILE_ROWS * BLOCK] __attribute__((aligned(64)));
    uint8_t unpacked[GROUP * BLOCK] __attribute__((aligned(64)));
    const uint8_t *data = matrix->data + block * matrix->block_bytes;
    int32_t groups = matrix->inputs / GROUP;
    Floats sums[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) sums[r] = zeros();
    const int8_t *bytes = rows->bytes + (size_t)row * rows->byte_stride;
    for (int32_t group = 0; group <= groups; group++) {
        if (group < groups) {
            const uint8_t *weights = data + (size_t)group * group_bytes(format);
            if (is_four_bits(format)) {
                for (int quad = 0; quad < GROUP / 8; quad++) {
                    Quads both = load_quads(weights + quad * 4 * BLOCK);
                    _mm512_store_si512(unpacked + quad * 4 * BLOCK, low_nibbles(both));
                    _mm512_store_si512(unpacked + (quad + GROUP / 8) * 4 * BLOCK, high_nibbles(both));
                }
                weights = unpacked;
            }
            _tile_loadd(2, bytes + group * GROUP, rows->byte_stride);
            _tile_loadd(3, weights, 64);
            if (group & 1) {
                _tile_zero(1);
                _tile_dpbsud(1, 2, 3);
                _tile_stored(1, integers[1], 64);
            } else {
                _tile_zero(0);
                _tile_dpbsud(0, 2, 3);
                _tile_stored(0, integers[0], 64);
            }
        }
        if (!group) continue;
        // The group before is added up while this one is multiplied.
        const int32_t *done = integers[(group - 1) & 1];
        const uint8_t *before = data + (size_t)(group - 1) * group_bytes(format) + integer_bytes(format);
        Floats scales = load_half((const uint16_t *)before);
        for (int r = 0; r < TILE_ROWS; r++) {
            size_t at = (size_t)(row + r) * rows->scale_stride + group - 1;
            Integers sum = load_integers(done + r * BLOCK);
            if (format != INT4_MINIMUM)
                sum = _mm512_add_epi32(sum, all_integers(correction(rows, row + r, group - 1, 0, 2, format)));
            sums[r] = fma(floats(sum), mul(scales, all(rows->scales[at])), sums[r]);
            if (has_minimum(format))
                sums[r] = add_minimum(sums[r], load_half((const uint16_t *)before + BLOCK), rows, row + r, group - 1);
        }
    }
    int32_t left = rows->count - row < TILE_ROWS ? rows->count - row : TILE_ROWS;
    for (int r = 0; r < left; r++) put(matrix, sums[r], block, to + (size_t)(row + r) * stride, add_to);
}

#define ALL_TILES(format)                                                                                              \
    for (int32_t block = begin; block < end; block++)                                                                  \
        for (int32_t row = 0; row < rows->count; row += TILE_ROWS)                                                     \
            multiply_tile(matrix, rows, row, block, to, stride, add_to, format)

static void multiply(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                     int32_t end) {
    if (!is_integer(matrix->format) || matrix->format == INT8_SIXTEENS || rows->count < LEAST_TILE_ROWS) {
        multiply_lanes(matrix, rows, to, stride, add_to, begin, end);
        return;
    }
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 4; tile++) {
        config.bytes[tile] = tile == 2 ? GROUP : 64;
        config.rows[tile] = tile == 3 ? GROUP / 4 : TILE_ROWS;
    }
    _tile_loadconfig(&config);
    switch (matrix->format) {
    case INT8: ALL_TILES(INT8); break;
    case INT4: ALL_TILES(INT4); break;
    case INT8_MINIMUM: ALL_TILES(INT8_MINIMUM); break;
    default: ALL_TILES(INT4_MINIMUM);
    }
    _tile_release();
}
