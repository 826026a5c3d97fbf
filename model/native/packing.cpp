#include "packing.h"

#include "halves.h"
#include "rounding.h"

#include <cmath>
#include <stdexcept>

namespace {

uint16_t half_at(const uint8_t *from) { return (uint16_t)(from[0] | from[1] << 8); }

// 32 weights: integers with a scale for each half and a minimum. Scales are held in half precision.
struct Group {
    int8_t values[GROUP];
    uint16_t scales[2], minimum;
};

// ---- from GGUF's blocks ----------------------------------------------------------------------------------------------

struct Layout {
    int kind, weights, bytes, format;
};

const Layout LAYOUTS[] = {{Q4_0, 32, 18, INT4},         {Q4_1, 32, 20, INT4_MINIMUM},   {Q5_0, 32, 22, INT8},
                          {Q5_1, 32, 24, INT8_MINIMUM}, {Q8_0, 32, 34, INT8},           {Q4_K, 256, 144, INT4_MINIMUM},
                          {Q5_K, 256, 176, INT8_MINIMUM}, {Q6_K, 256, 210, INT8_SIXTEENS}};

const Layout *layout_of(int kind) {
    for (const Layout &layout : LAYOUTS)
        if (layout.kind == kind) return &layout;
    return nullptr;
}

// Scale and minimum number `at` of the eight that lie in 12 bytes, six bits each.
void six_bits(const uint8_t *from, int at, int &scale, int &minimum) {
    if (at < 4) {
        scale = from[at] & 63, minimum = from[at + 4] & 63;
    } else {
        scale = (from[at + 4] & 15) | (from[at - 4] >> 6) << 4;
        minimum = from[at + 4] >> 4 | (from[at] >> 6) << 4;
    }
}

// Group number `at` of a block of 256.
void read_large(int kind, const uint8_t *block, int at, Group &group) {
    if (kind == Q6_K) {
        const uint8_t *low = block + at / 4 * 64 + at % 2 * 32, *high = block + 128 + at / 4 * 32;
        const int8_t *scales = (const int8_t *)block + 192;
        for (int i = 0; i < GROUP; i++) {
            int four = at % 4 < 2 ? low[i] & 15 : low[i] >> 4, two = high[i] >> (at % 4 * 2) & 3;
            group.values[i] = (int8_t)((four | two << 4) - 32);
        }
        float scale = float_from_half(half_at(block + 208));
        for (int half = 0; half < 2; half++) group.scales[half] = half_from_float(scale * scales[2 * at + half]);
        return;
    }
    int scale, minimum;
    six_bits(block + 4, at, scale, minimum);
    const uint8_t *low = block + (kind == Q5_K ? 48 : 16) + at / 2 * 32;
    for (int i = 0; i < GROUP; i++) {
        int value = at % 2 ? low[i] >> 4 : low[i] & 15;
        if (kind == Q5_K) value |= (block[16 + i] >> at & 1) << 4;
        group.values[i] = (int8_t)value;
    }
    group.scales[0] = group.scales[1] = half_from_float(float_from_half(half_at(block)) * (float)scale);
    group.minimum = half_from_float(-float_from_half(half_at(block + 2)) * (float)minimum);
}

void read_small(int kind, const uint8_t *block, Group &group) {
    bool five = kind == Q5_0 || kind == Q5_1, own_minimum = kind == Q4_1 || kind == Q5_1;
    group.scales[0] = group.scales[1] = half_at(block);
    if (own_minimum) group.minimum = half_at(block + 2);
    const uint8_t *at = block + (own_minimum ? 4 : 2);
    if (kind == Q8_0) {
        // -128, which no quantiser writes, would be one too large for the plainest instructions.
        for (int i = 0; i < GROUP; i++) group.values[i] = std::max<int8_t>(-127, (int8_t)at[i]);
        return;
    }
    uint32_t fifth = 0;
    if (five) {
        memcpy(&fifth, at, 4);
        at += 4;
    }
    for (int i = 0; i < GROUP; i++) {
        int value = i < GROUP / 2 ? at[i] & 15 : at[i - GROUP / 2] >> 4;
        if (five) value |= (int)(fifth >> i & 1) << 4;
        group.values[i] = (int8_t)(kind == Q5_0 ? value - 16 : value);
    }
}

void read_group(const Layout &layout, const uint8_t *row, int number, Group &group) {
    group.minimum = 0;
    int groups = layout.weights / GROUP;
    const uint8_t *block = row + (size_t)(number / groups) * layout.bytes;
    if (groups > 1) read_large(layout.kind, block, number % groups, group);
    else read_small(layout.kind, block, group);
}

// ---- into blocks of sixteen outputs ----------------------------------------------------------------------------------

// Where input number `at` of one output lies among the weights of its block, and in which half of the byte.
size_t place(int format, int at, int lane, int &half) {
    int within = at % GROUP;
    half = is_four_bits(format) ? within / (GROUP / 2) : 0;
    if (is_four_bits(format)) within %= GROUP / 2;
    return weight_bytes(format, at / GROUP * GROUP) + within / 4 * 4 * BLOCK + lane * 4 + within % 4;
}

void put_wide(const WideGroup &group, int format, int flip, int lane, int first, uint8_t *to, uint8_t *numbers) {
    for (int i = 0; i < group.count; i++) {
        int half;
        uint8_t *at = to + place(format, first + i, lane, half);
        if (is_four_bits(format)) *at |= (uint8_t)(group.values[i] << 4 * half);
        else *at = (uint8_t)(group.values[i] ^ flip);
    }
    memcpy(numbers + 2 * lane, &group.scale, 2);
    if (!has_steps(format)) return;
    for (int part = 0; part < WIDE / GROUP; part++) {
        uint8_t *stretch = numbers + BLOCK * 2 + part * BLOCK * 2;
        stretch[lane] = group.steps[part], stretch[BLOCK + lane] = (uint8_t)group.offsets[part];
    }
}

void put_group(const Group &group, int format, int flip, int lane, uint8_t *to, uint16_t *numbers) {
    for (int i = 0; i < GROUP; i++) {
        int half;
        uint8_t *at = to + place(format, i, lane, half);
        if (is_four_bits(format)) *at |= (uint8_t)(group.values[i] << 4 * half);
        else *at = (uint8_t)(group.values[i] ^ flip);
    }
    numbers[lane] = group.scales[0];
    if (has_minimum(format)) numbers[BLOCK + lane] = group.minimum;
    else if (format == INT8_SIXTEENS) numbers[BLOCK + lane] = group.scales[1];
}

void floats_of(const Source &source, int row, float *to) {
    size_t at = (size_t)row * source.inputs;
    if (source.kind == STORED_FLOAT32) {
        memcpy(to, (const float *)source.weights + at, source.inputs * sizeof(float));
        return;
    }
    const uint16_t *from = (const uint16_t *)source.weights + at;
    for (int i = 0; i < source.inputs; i++)
        to[i] = source.kind == STORED_BFLOAT16 ? float_from_bfloat(from[i]) : float_from_half(from[i]);
}

void pack_block(const Matrix &matrix, uint8_t *begin, const Source &source, const Layout *layout, int flip, int block) {
    uint8_t *to = begin + block * matrix.block_bytes;
    std::vector<float> floats(source.inputs);
    int rows = std::min<int>(BLOCK, matrix.outputs - block * BLOCK);
    // Outputs that are not there have scales of zero.
    for (int lane = 0; lane < rows; lane++) {
        int row = block * BLOCK + lane;
        uint8_t *numbers = to + matrix.numbers;
        if (!layout) floats_of(source, row, floats.data());
        if (matrix.format == FLOAT32) {
            for (int input = 0; input < source.inputs; input++) ((float *)to)[(size_t)input * BLOCK + lane] = floats[input];
        } else if (matrix.format == BFLOAT16) {
            for (int input = 0; input < source.inputs; input++)
                ((uint16_t *)to)[(size_t)input * BLOCK + lane] = bfloat_from_float(floats[input]);
        } else if (is_wide(matrix.format)) {
            for (int first = 0; first < matrix.inputs; first += WIDE, numbers += number_bytes(matrix.format)) {
                WideGroup group = rounded(floats.data() + first, std::min<int>(WIDE, source.inputs - first), is_four_bits(matrix.format));
                group.count = std::min(group.count, matrix.inputs - first);
                put_wide(group, matrix.format, flip, lane, first, to, numbers);
            }
        } else if (matrix.format == INT8_BYTES) {
            for (int first = 0; first < matrix.inputs; first += GROUP, numbers += number_bytes(matrix.format)) {
                WideGroup from = rounded(floats.data() + first, std::min<int>(GROUP, source.inputs - first), false);
                Group group;
                memcpy(group.values, from.values, GROUP);
                group.scales[0] = from.scale;
                put_group(group, matrix.format, flip, lane, to + weight_bytes(matrix.format, first), (uint16_t *)numbers);
            }
        } else {
            size_t row_bytes = (size_t)source.inputs / layout->weights * layout->bytes;
            for (int number = 0; number < matrix.inputs / GROUP; number++, numbers += number_bytes(matrix.format)) {
                Group group;
                read_group(*layout, (const uint8_t *)source.weights + row * row_bytes, number, group);
                put_group(group, matrix.format, flip, lane, to + weight_bytes(matrix.format, number * GROUP), (uint16_t *)numbers);
            }
        }
    }
}

}  // namespace

OwnMatrix packed(const Source &source, int flip, Weights &weights, Threads &threads) {
    const Layout *layout = layout_of(source.kind);
    bool floats = source.kind == STORED_FLOAT32 || source.kind == STORED_FLOAT16 || source.kind == STORED_BFLOAT16;
    int format = layout ? layout->format : source.format;
    bool known = layout ? source.inputs % layout->weights == 0
                        : floats && (format == FLOAT32 || format == BFLOAT16 || is_wide(format) || has_byte_rows(format));
    if (!known || source.outputs < 1 || source.inputs < 1) throw std::invalid_argument("weights that are not known");
    OwnMatrix matrix;
    matrix.format = format, matrix.outputs = source.outputs;
    matrix.inputs = filled_inputs(format, source.inputs);
    matrix.blocks = (source.outputs + BLOCK - 1) / BLOCK;
    matrix.numbers = weight_bytes(format, matrix.inputs);
    size_t groups = is_integer(format) ? groups_of(is_wide(format), matrix.inputs) : 0;
    matrix.block_bytes = (matrix.numbers + groups * number_bytes(format) + 63) / 64 * 64;
    uint8_t *memory = weights.take(matrix.blocks * matrix.block_bytes);
    matrix.data = memory;
    matrix.own_bias = copied(source.bias, source.outputs);
    matrix.bias = matrix.own_bias.get();
    threads.each(matrix.blocks, [&](int block, int) { pack_block(matrix, memory, source, layout, flip, block); });
    return matrix;
}

void read_row(const Matrix &matrix, int flip, int row, float *to, int inputs) {
    const uint8_t *block = matrix.data + row / BLOCK * matrix.block_bytes;
    int lane = row % BLOCK, format = matrix.format;
    for (int i = 0; i < inputs; i++) {
        if (format == FLOAT32) {
            to[i] = ((const float *)block)[(size_t)i * BLOCK + lane];
        } else if (format == BFLOAT16) {
            to[i] = float_from_bfloat(((const uint16_t *)block)[(size_t)i * BLOCK + lane]);
        } else {
            int half, group = i / group_of(is_wide(format));
            uint8_t byte = block[place(format, i, lane, half)];
            int value = is_four_bits(format) ? byte >> 4 * half & 15 : (int8_t)(byte ^ flip);
            const uint8_t *own = block + matrix.numbers + group * number_bytes(format);
            const uint16_t *numbers = (const uint16_t *)own;
            if (format == INT4) value -= MIDDLE;
            if (has_steps(format)) {
                const uint8_t *stretch = own + BLOCK * 2 + i % WIDE / GROUP * BLOCK * 2;
                value = value * stretch[lane] + (int8_t)stretch[BLOCK + lane];
            }
            bool second = format == INT8_SIXTEENS && i % GROUP >= GROUP / 2;
            float scale = float_from_half(numbers[second ? BLOCK + lane : lane]);
            to[i] = scale * (float)value + (has_minimum(format) ? float_from_half(numbers[BLOCK + lane]) : 0.0f);
        }
    }
}
