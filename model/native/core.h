// What the parts of the native core share: matrices as they are held, the work of one pass, and the kernels of an instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

// How a matrix is held. Integers have a scale for each output and each group of inputs. Those that GGUF's blocks are held in have
// groups of 32; MINIMUM: and a number that is added to each weight of the group; SIXTEENS: two scales, one for each half of the
// group. What floats are rounded to has WIDE groups: bytes, or four bits that stand for bytes, `four bits * step + offset` with a
// step and an offset for every 32 inputs. BYTES are held as INT8 and as INT4_WIDE are, and their rows are rounded to bytes as well, a
// scale for every 32.
enum Format { FLOAT32, BFLOAT16, INT8, INT4, INT8_MINIMUM, INT4_MINIMUM, INT8_SIXTEENS, INT8_WIDE, INT4_WIDE, INT8_BYTES, INT4_BYTES };

// Inputs that share a scale, in GGUF's blocks, and in wide matrices and all rows; those of the largest piece that instructions
// multiply at once, up to which rows and wide matrices are filled.
enum Inputs { GROUP = 32, WIDE = 256, PIECE = 64 };
// Outputs that lie together in memory, one lane each.
enum { BLOCK = 16 };
// Keys that lie together in the cache, one lane each.
enum { KEYS = 16 };
// What four bits hold is counted from, where there is no minimum.
enum { MIDDLE = 8 };

inline int is_integer(int format) { return format >= INT8; }
inline int has_steps(int format) { return format == INT4_WIDE || format == INT4_BYTES; }
inline int is_wide(int format) { return format == INT8_WIDE || has_steps(format); }
inline int is_four_bits(int format) { return format == INT4 || format == INT4_MINIMUM || has_steps(format); }
inline int has_byte_rows(int format) { return format == INT8_BYTES || format == INT4_BYTES; }
inline int has_minimum(int format) { return format == INT8_MINIMUM || format == INT4_MINIMUM; }

inline int32_t rounded_up(int32_t value, int32_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int32_t group_of(int wide) { return wide ? WIDE : GROUP; }
inline int32_t groups_of(int wide, int32_t inputs) { return (inputs + group_of(wide) - 1) / group_of(wide); }
inline int32_t wide_groups(int32_t inputs) { return groups_of(1, inputs); }
// Inputs with those that are filled up with what counts as zero.
inline int32_t filled_inputs(int format, int32_t inputs) {
    return is_integer(format) ? rounded_up(inputs, is_wide(format) && !has_byte_rows(format) ? PIECE : GROUP) : inputs;
}
// Bytes of the weights of 16 outputs for that many inputs.
inline size_t weight_bytes(int format, size_t inputs) {
    if (!is_integer(format)) return inputs * BLOCK * (format == FLOAT32 ? 4 : 2);
    return inputs * BLOCK / (is_four_bits(format) ? 2 : 1);
}
// Bytes of what belongs to a group: 16 scales in half precision, then 16 scales of the second half, or 16 minima, or for every 32
// inputs 16 steps and 16 offsets, a byte each.
inline size_t number_bytes(int format) {
    if (has_steps(format)) return BLOCK * 2 + WIDE / GROUP * BLOCK * 2;
    return BLOCK * 2 * (has_minimum(format) || format == INT8_SIXTEENS ? 2 : 1);
}

// A matrix of `outputs` x `inputs` in blocks of 16 outputs. Within a block, inputs one after another:
// FLOAT32, BFLOAT16: 16 numbers for each input. INT8 …: for every four inputs (16 outputs x 4 inputs) bytes, `flip` on each of
// them; INT4 …: for every 32 inputs 4 times 64 bytes, the higher halves being what follows the lower ones 16 inputs later. Behind
// the weights, from byte `numbers` on, what belongs to each group. `inputs` are those that the packer filled up.
struct Matrix {
    const uint8_t *data;
    const float *bias;
    int32_t format, outputs, inputs, blocks;
    size_t block_bytes, numbers;
};

// Rows that are multiplied: as they are, and where the matrix is of integers as numbers of sixteen bits, 256 times a byte plus a byte,
// for whose rounding alone no model loses anything; a multiple of 16 rows is allocated. For each WIDE group a scale, and -128 times
// the sums of the former bytes and of the latter (`offsets`). For GGUF's blocks also the totals of every sixteen numbers, and those of
// every 32 as a float times their scale (`sums`). For BYTES a row is bytes alone, where else the higher ones are: `sums` are the scales
// of every 32, and of each two `totals` the first is what makes up for lifted weights, the second the total of the bytes.
struct Rows {
    const float *floats;
    int32_t stride;
    const int8_t *bytes;
    int32_t byte_stride;
    const float *scales;
    int32_t scale_stride;
    const int32_t *offsets;
    const float *sums;
    const int32_t *totals;
    int32_t group_stride, count;
};

// Rows lie in pieces of sixteen rows by 64 inputs each, then those of the next 64, as instructions for tiles like them: a piece of the
// higher bytes and one of the lower ones, or sixteen rows by 64 numbers of sixteen bits.
enum { TILE_ROWS = 16, PIECE_BYTES = TILE_ROWS * PIECE };
inline int32_t row_stride(int32_t inputs) { return rounded_up(inputs, PIECE) * 2; }
// Where the pieces begin that sixteen rows share with `row`.
inline size_t panel_begin(int32_t row, int32_t stride) { return (size_t)(row / TILE_ROWS) * TILE_ROWS * stride; }
// Where the piece of input `at` begins behind that.
inline size_t piece_at(int32_t at) { return (size_t)(at / PIECE) * 2 * PIECE_BYTES; }

// What rows are rounded to: numbers of sixteen bits, those with totals for GGUF's blocks, or bytes.
enum RowForm { WIDE_ROWS, BLOCK_ROWS, BYTE_ROWS };
inline RowForm row_form(int format) { return has_byte_rows(format) ? BYTE_ROWS : is_wide(format) ? WIDE_ROWS : BLOCK_ROWS; }

// Where one row of floats is put as bytes; `bytes` are its panel's.
struct Quantised {
    int8_t *bytes;
    int32_t row;
    float *scales, *sums;
    int32_t *offsets, *totals;
};

// The nonlinearity of feed-forward layers: GELU by tanh, and exact; the square of what is above zero.
enum Activation { SILU, GELU_TANH, GELU, RELU_SQUARED };

// How keys and values are held. Bytes have a scale for each position of a head.
enum CacheFormat { CACHE_FLOAT32, CACHE_FLOAT16, CACHE_INT8 };

inline size_t cached_bytes(int format) { return format == CACHE_INT8 ? 1 : format == CACHE_FLOAT32 ? 4 : 2; }
// Bytes of 16 positions of one head: keys `[size][16]`, values `[16][size]`; of bytes then 16 scales of keys and 16 of values.
inline size_t head_bytes(int format, int size) {
    return 2 * (size_t)size * KEYS * cached_bytes(format) + (format == CACHE_INT8 ? 2 * KEYS * sizeof(float) : 0);
}

// The cache of one layer. A block holds 16 positions of a sequence, for each layer and head `head_bytes`. Blocks of a slot follow
// one another, so that memory is taken as a sequence grows and a prefix is copied in one piece.
struct Cache {
    uint8_t *layer;  // of slot 0, block 0
    size_t slot_stride, block_stride;
    int32_t size, blocks, format;
};

// Rows of queries of one sequence that stand one after another: row `first + i` is position `position + i`.
struct Span {
    int32_t slot, first, count, position;
};

// What scores of keys are multiplied by, what they are bounded by with tanh (0: nothing), and how many keys a query sees, its own
// included (0: all up to its own).
struct Sight {
    float scale, cap;
    int32_t window;
};

// Tokens whose maximum is kept, so that most of a row of logits need not be looked at again.
enum { STRIP = 64 };

// Noise of a row's tokens: the hash of what the row is, and from which hash on a token's noise is loud.
struct Noise {
    uint64_t key, threshold;
};

struct Kernels {
    const char *name;
    // What each byte of INT8 is combined with by exclusive or when it is packed: 128 where instructions want it unsigned.
    int32_t flip;
    // to[row][output] (+)= rows x matrix + bias, for the blocks from `begin` to before `end`.
    void (*multiply)(const Matrix *, const Rows *, float *to, int32_t stride, int add, int32_t begin, int32_t end);
    void (*quantise)(const float *from, int32_t inputs, int form, const Quantised *to);
    void (*rms_norm)(const float *from, const float *weight, float eps, int32_t size, float *to);
    void (*layer_norm)(const float *from, const float *weight, const float *bias, float eps, int32_t size, float *to);
    // to = activation(from), times `up` where there is one; an `Activation`.
    void (*activate)(const float *from, const float *up, int32_t activation, int32_t size, float *to);
    // Scores divided by `divisor` and, with a `cap` above 0, bounded by it with tanh.
    void (*bound)(float *scores, int32_t size, float divisor, float cap);
    // Rotary positions on the first numbers of one head, twice `half`, halves paired.
    void (*rotate)(float *head, const float *cosines, const float *sines, int32_t half);
    // Put one head's key and value of a position, `size` floats each, into the cache; `block` is where its 16 positions begin.
    void (*keep)(const float *key, const float *value, int32_t size, int32_t format, int32_t position, uint8_t *block);
    // Attention of rows of one span for the query heads of one key-value head; `scores` has room for `QUERIES` rows of the cache's
    // positions and as many queries.
    void (*attend)(const Cache *, const Span *, int32_t head, int32_t begin, int32_t end, const float *queries,
                   int32_t query_stride, int32_t heads_per_key, const Sight *sight, float *scores, float *to, int32_t to_stride);
    // Looking through a row of logits: see scanning.h.
    void (*scan)(const float *row, int32_t size, float *maxima, float *best, int32_t *first);
    void (*scan_totals)(const float *row, int32_t size, float divisor, float best, double *sum, double *weighted);
    int32_t (*scan_collect)(const float *row, int32_t size, float divisor, const float *maxima, float floor, const Noise *noise,
                            int32_t capacity, int64_t *ids, float *values);
    int32_t (*scan_above)(const float *row, int32_t size, const float *maxima, float value);
};

// Rows of a span that attend together.
enum { QUERIES = 8 };

extern "C" const Kernels topkapi_scalar;
#if defined(__x86_64__)
extern "C" const Kernels topkapi_avx2, topkapi_avx_vnni, topkapi_avx512_vnni, topkapi_amx;
#endif
