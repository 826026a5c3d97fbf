// Products of rows with wide matrices by AMX: sixteen rows by sixteen outputs and 64 inputs in one instruction, for the higher bytes
// of rows and for the lower ones. The sums of a group are the same integers as anywhere, and are added up in the same order. Tiles 0
// and 1 hold the sums of higher bytes for two blocks, 2 and 3 those of lower ones, 4 and 5 rows, 6 and 7 weights.
#pragma once

// Fewest rows for which tiles pay, and the rows that blocks go through in turn: their bytes stay in the cache of a core.
enum { LEAST_WIDE_ROWS = 3, CHUNK = 128 };

// Add the products of sixteen rows with 64 inputs of one or two blocks, which is known when this is compiled.
INLINE void add_piece(const int8_t *rows, const uint8_t *const *weights, size_t at, const int across) {
    _tile_loadd(4, rows, PIECE);
    _tile_loadd(6, weights[0] + at, PIECE);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, rows + PIECE_BYTES, PIECE);
    _tile_dpbssd(2, 5, 6);
    if (across < 2) return;
    _tile_loadd(7, weights[1] + at, PIECE);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(3, 5, 7);
}

// Sums of one group for `count` rows by a block become floats and are added to those `before`. Each case has a loop of its own: with
// branches in it, it takes longer than the products do.
INLINE void add_up(const int32_t *high, const int32_t *low, Floats scales, const float *row_scales, int32_t scale_stride, int32_t count,
                   const float *before, int32_t before_stride, const float *bias, float *to, int32_t stride, const int biased,
                   const int adding) {
    Floats more = biased ? load(bias) : zeros();
    for (int32_t r = 0; r < count; r++) {
        Integers integers = add_integers(times_256(load_integers(high)), load_integers(low));
        Floats sum = fma(floats(integers), mul(scales, all(*row_scales)), load(before));
        if (biased) sum = add(sum, more);
        store(to, adding ? add(load(to), sum) : sum);
        high += BLOCK, low += BLOCK, row_scales += scale_stride, before += before_stride, to += stride;
    }
}

// What comes of up to sixteen rows from `row` on by `across` blocks and the inputs from `input` to before `last`, one group, is added to
// `sums` [across][CHUNK][16], or in the last group put where it belongs. `weights` are the signed bytes of the blocks.
INLINE void multiply_group(const Matrix *matrix, const Rows *rows, int32_t row, int32_t block, const uint8_t *const *weights, int32_t input,
                           int32_t last, float *sums, float *to, int32_t stride, int add_to, const int across) {
    int32_t integers[4][TILE_ROWS * BLOCK] __attribute__((aligned(64)));
    int32_t left = rows->count - row < TILE_ROWS ? rows->count - row : (int32_t)TILE_ROWS, at_end = last == matrix->inputs;
    // What is written at the end lies far apart: it is fetched while the products are computed.
    for (int32_t r = 0; r < left && at_end; r++)
        for (int b = 0; b < across; b++) prefetch_to_write(to + (size_t)(row + r) * stride + (block + b) * BLOCK);
    const int8_t *bytes = rows->bytes + panel_begin(row, rows->byte_stride);
    static const float nothing[BLOCK] = {0};
    size_t group = input / WIDE, at_scale = (size_t)row * rows->scale_stride + group;
    const uint8_t *numbers = matrix->data + block * matrix->block_bytes + matrix->numbers + group * number_bytes(matrix->format);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; input < last; input += PIECE) {
        const int8_t *piece = bytes + (size_t)input * 2 * TILE_ROWS;
        add_piece(piece, weights, (size_t)input * BLOCK, across);
    }
    _tile_stored(0, integers[0], 64);
    _tile_stored(2, integers[2], 64);
    if (across > 1) _tile_stored(1, integers[1], 64);
    if (across > 1) _tile_stored(3, integers[3], 64);
    for (int b = 0; b < across; b++) {
        Floats scales = load_half((const uint16_t *)(numbers + b * matrix->block_bytes));
        float *own = sums + ((size_t)b * CHUNK + row % CHUNK) * BLOCK, *out = to + (size_t)row * stride + (block + b) * BLOCK;
        const float *bias = matrix->bias ? matrix->bias + (block + b) * BLOCK : nullptr;
        bool put_there = at_end && matrix->outputs - (block + b) * BLOCK >= BLOCK;
#define ADD_UP(to, stride, biased, adding)                                                                             \
    add_up(integers[b], integers[2 + b], scales, rows->scales + at_scale, rows->scale_stride, left, group ? own : nothing,  \
           group ? (int)BLOCK : 0, bias, to, stride, biased, adding)
        if (!put_there) ADD_UP(own, BLOCK, 0, 0);
        else if (bias && add_to) ADD_UP(out, stride, 1, 1);
        else if (bias) ADD_UP(out, stride, 1, 0);
        else if (add_to) ADD_UP(out, stride, 0, 1);
        else ADD_UP(out, stride, 0, 0);
#undef ADD_UP
        for (int32_t r = 0; r < left && at_end && !put_there; r++)
            put(matrix, load(own + r * BLOCK), block + b, to + (size_t)(row + r) * stride, add_to);
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

// The rows from `begin` to before `end`, at most CHUNK, by `across` blocks from `block` on. The weights of a group stay at hand for all.
INLINE void multiply_across(const Matrix *matrix, const Rows *rows, int32_t begin, int32_t end, float *to, int32_t stride, int add_to,
                            int32_t block, uint8_t *unpacked, const int across, const int format) {
    float sums[2 * CHUNK * BLOCK] __attribute__((aligned(64)));
    const uint8_t *weights[2];
    int32_t inputs = matrix->inputs;
    for (int b = 0; b < across; b++)
        weights[b] = signed_bytes(matrix, block + b, unpacked + (size_t)b * inputs * BLOCK, format);
    settle();
    for (int32_t input = 0; input < inputs; input += WIDE)
        for (int32_t row = begin; row < end; row += TILE_ROWS)
            multiply_group(matrix, rows, row, block, weights, input, input + WIDE < inputs ? input + WIDE : inputs, sums, to, stride,
                           add_to, across);
}

INLINE void multiply_wide_tiles(const Matrix *matrix, const Rows *rows, float *to, int32_t stride, int add_to, int32_t begin,
                                int32_t end, uint8_t *unpacked, const int format) {
    for (int32_t row = 0; row < rows->count; row += CHUNK) {
        int32_t last = row + CHUNK < rows->count ? row + (int32_t)CHUNK : rows->count, block = begin;
        for (; block + 2 <= end; block += 2)
            multiply_across(matrix, rows, row, last, to, stride, add_to, block, unpacked, 2, format);
        if (block < end) multiply_across(matrix, rows, row, last, to, stride, add_to, block, unpacked, 1, format);
    }
}
