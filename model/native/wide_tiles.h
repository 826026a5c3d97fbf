// Products of rows with wide matrices by AMX: sixteen rows by sixteen outputs and 64 inputs in one instruction. The sums of a group are
// the same integers as anywhere, and are added up in the same order. Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights.
#pragma once

// Fewest rows for which tiles pay.
enum { LEAST_WIDE_ROWS = 3 };

// Add the products of `tall` times sixteen rows with 64 inputs of `across` blocks; both are known when this is compiled.
INLINE void add_piece(const int8_t *rows, int32_t stride, const uint8_t *const *weights, size_t at, const int tall, const int across) {
    _tile_loadd(4, rows, stride);
    _tile_loadd(6, weights[0] + at, 64);
    _tile_dpbssd(0, 4, 6);
    if (across > 1) {
        _tile_loadd(7, weights[1] + at, 64);
        _tile_dpbssd(1, 4, 7);
    }
    if (tall > 1) {
        _tile_loadd(5, rows + (size_t)TILE_ROWS * stride, stride);
        _tile_dpbssd(2, 5, 6);
        if (across > 1) _tile_dpbssd(3, 5, 7);
    } else if (across > 2) {
        _tile_loadd(6, weights[2] + at, 64);
        _tile_dpbssd(2, 4, 6);
        _tile_loadd(7, weights[3] + at, 64);
        _tile_dpbssd(3, 4, 7);
    }
}

// `tall` times up to sixteen rows from `row` on by `across` blocks, whose signed bytes are `weights`.
INLINE void multiply_pieces(const Matrix *matrix, const Rows *rows, int32_t row, int32_t block, const uint8_t *const *weights, float *to,
                            int32_t stride, int add_to, const int tall, const int across) {
    int32_t integers[2][4][TILE_ROWS * BLOCK] __attribute__((aligned(64)));
    float sums[4][TILE_ROWS * BLOCK] __attribute__((aligned(64)));
    int32_t left = rows->count - row < tall * TILE_ROWS ? rows->count - row : tall * TILE_ROWS, groups = groups_of(1, matrix->inputs);
    const int8_t *bytes = rows->bytes + (size_t)row * rows->byte_stride;
    const float *row_scales = rows->scales + (size_t)row * rows->scale_stride;
    const uint8_t *numbers = matrix->data + block * matrix->block_bytes + matrix->numbers;
    for (int32_t group = 0; group <= groups; group++) {
        if (group < groups) {
            int32_t(*into)[TILE_ROWS * BLOCK] = integers[group & 1];
            _tile_zero(0);
            if (tall * across > 1) _tile_zero(1);
            if (tall * across > 2) _tile_zero(2);
            if (tall * across > 2) _tile_zero(3);
            if (tall > 1 && across == 1) _tile_zero(2);
            int32_t end = (group + 1) * WIDE < matrix->inputs ? (group + 1) * WIDE : matrix->inputs;
            for (int32_t input = group * WIDE; input < end; input += TILE_INPUTS)
                add_piece(bytes + input, rows->byte_stride, weights, (size_t)input * BLOCK, tall, across);
            _tile_stored(0, into[0], 64);
            if (across > 1) _tile_stored(1, into[1], 64);
            if (tall > 1 || across > 2) _tile_stored(2, into[2], 64);
            if (tall * across > 2) _tile_stored(3, into[3], 64);
        }
        if (!group) continue;
        // The group before is added up while this one is multiplied.
        for (int b = 0; b < across; b++) {
            Floats scales = load_half((const uint16_t *)(numbers + b * matrix->block_bytes + (group - 1) * number_bytes(matrix->format)));
            for (int32_t r = 0; r < left; r++) {
                int tile = tall > 1 ? r / TILE_ROWS * 2 + b : b;
                size_t at = (size_t)r % TILE_ROWS * BLOCK;
                Floats scale = mul(scales, all(row_scales[(size_t)r * rows->scale_stride + group - 1]));
                Floats sum = group > 1 ? load(sums[tile] + at) : zeros();
                sum = fma(floats(load_integers(integers[(group - 1) & 1][tile] + at)), scale, sum);
                if (group < groups) store(sums[tile] + at, sum);
                else put(matrix, sum, block + b, to + (size_t)(row + r) * stride, add_to);
            }
        }
    }
}

// The signed bytes of a block: where they lie, or unpacked.
INLINE const uint8_t *signed_bytes(const Matrix *matrix, int32_t block, uint8_t *unpacked, const int format) {
    const uint8_t *from = matrix->data + block * matrix->block_bytes, *numbers = from + matrix->numbers;
    if (format == INT8_WIDE) return from;
    for (int32_t input = 0; input < matrix->inputs; input += GROUP) {
        const uint8_t *stretch = numbers + input / WIDE * number_bytes(format) + BLOCK * 2 + input % WIDE / GROUP * BLOCK * 2;
        Quads steps = spread_steps(stretch), offsets = spread_signed(stretch + BLOCK);
        for (int quad = 0; quad < 4; quad++) {
            Quads both = load_quads(from + weight_bytes(format, input) + quad * 4 * BLOCK);
            _mm512_storeu_si512(unpacked + (size_t)input * BLOCK + quad * 4 * BLOCK, stretched(low_nibbles(both), steps, offsets));
            _mm512_storeu_si512(unpacked + (size_t)input * BLOCK + (quad + 4) * 4 * BLOCK, stretched(high_nibbles(both), steps, offsets));
        }
    }
    return unpacked;
}

// All rows by `across` blocks from `block` on.
INLINE void multiply_across(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t block, uint8_t *unpacked,
                            const int across, const int format) {
    const uint8_t *weights[4];
    for (int b = 0; b < across; b++)
        weights[b] = signed_bytes(matrix, block + b, unpacked + (size_t)b * matrix->inputs * BLOCK, format);
    settle();
    int32_t row = 0;
    if (across <= 2)
        for (; rows->count - row > TILE_ROWS; row += 2 * TILE_ROWS)
            multiply_pieces(matrix, rows, row, block, weights, to, stride, add_to, 2, across);
    if (row < rows->count) multiply_pieces(matrix, rows, row, block, weights, to, stride, add_to, 1, across);
}

INLINE void multiply_wide_tiles(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                                int32_t end, uint8_t *unpacked, const int format) {
    int32_t block = begin;
    if (rows->count <= TILE_ROWS)
        for (; block + 4 <= end; block += 4) multiply_across(matrix, rows, to, stride, add_to, block, unpacked, 4, format);
    for (; block + 2 <= end; block += 2) multiply_across(matrix, rows, to, stride, add_to, block, unpacked, 2, format);
    for (; block < end; block++) multiply_across(matrix, rows, to, stride, add_to, block, unpacked, 1, format);
}
