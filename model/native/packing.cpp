#include "packing.h"

#include <cmath>
#include <stdexcept>

namespace {

uint16_t half_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (magnitude < 0x38800000) {
        // Below the smallest normal number: rounded by an addition that leaves no smaller bits.
        float small;
        memcpy(&small, &magnitude, 4);
        small += 0.5f;
        uint32_t rounded;
        memcpy(&rounded, &small, 4);
        return (uint16_t)(sign | (rounded - 0x3f000000));
    }
    uint32_t odd = magnitude >> 13 & 1;
    return (uint16_t)(sign | ((magnitude + 0xfff + odd - 0x38000000) >> 13));
}

float float_from_half(uint16_t half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                  : exponent > 0 ? std::ldexp((float)(1024 + fraction), exponent - 25)
                                 : std::ldexp((float)fraction, -24);
    return half & 0x8000 ? -value : value;
}

uint16_t bfloat_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float_from_bfloat(uint16_t stored) {
    uint32_t bits = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t half_at(const uint8_t *from) { return (uint16_t)(from[0] | from[1] << 8); }

// 32 weights: integers with a scale for each half and a minimum. Scales are held in half precision.
struct Group {
    int8_t values[GROUP];
    uint16_t scales[2], minimum;
};

// ---- from floats -----------------------------------------------------------------------------------------------------

bool all_finite(const float *from, int count) {
    for (int i = 0; i < count; i++)
        if (!std::isfinite(from[i])) return false;
    return true;
}

// A scale that is no number makes damage show in whatever is multiplied.
void damaged(Group &group) { group.scales[0] = group.scales[1] = 0x7e00; }

// By the largest magnitude, counted in the scale as it is held.
void round_bytes(const float *from, int count, Group &group) {
    float most = 0;
    for (int i = 0; i < count; i++) most = std::max(most, std::fabs(from[i]));
    group.scales[0] = group.scales[1] = half_from_float(most / 127);
    float scale = float_from_half(group.scales[0]), inverse = scale > 0 ? 1 / scale : 0;
    for (int i = 0; i < count; i++)
        group.values[i] = (int8_t)std::max(-127.f, std::min(127.f, std::nearbyint(from[i] * inverse)));
}

// Of several scales and minima, those with the smallest squared error: the range is left a little where few weights lie.
void round_nibbles(const float *from, int count, bool minimum, Group &group) {
    float low = from[0], high = from[0], extreme = from[0];
    for (int i = 1; i < count; i++) {
        low = std::min(low, from[i]), high = std::max(high, from[i]);
        if (std::fabs(from[i]) > std::fabs(extreme)) extreme = from[i];
    }
    float least_error = INFINITY;
    const int TRIES = 17;
    for (int at = 0; at < TRIES; at++) {
        float share = 1.04f - 0.02f * at;
        uint16_t scale_held, minimum_held = 0;
        if (minimum) {
            float middle = (low + high) / 2;
            scale_held = half_from_float((high - low) * share / 15);
            minimum_held = half_from_float(middle - (high - low) * share / 2);
        } else {
            // The largest magnitude becomes -8, so that one more step is of use; its sign is the scale's.
            scale_held = half_from_float(extreme * share / -MIDDLE);
        }
        float scale = float_from_half(scale_held), inverse = scale != 0 ? 1 / scale : 0;
        float offset = minimum ? float_from_half(minimum_held) : -MIDDLE * scale, error = 0;
        int8_t values[GROUP];
        for (int i = 0; i < count; i++) {
            float steps = std::max(0.f, std::min(15.f, std::nearbyint((from[i] - offset) * inverse)));
            float off = from[i] - (steps * scale + offset);
            values[i] = (int8_t)steps;
            error += off * off;
        }
        if (error >= least_error) continue;
        least_error = error;
        memcpy(group.values, values, count);
        group.scales[0] = group.scales[1] = scale_held, group.minimum = minimum_held;
    }
}

void round_group(const float *from, int count, int format, Group &group) {
    // What pads a group counts as zero, or is multiplied by zeros.
    memset(group.values, format == INT4 ? MIDDLE : 0, GROUP);
    group.minimum = 0;
    if (!all_finite(from, count)) damaged(group);
    else if (is_four_bits(format)) round_nibbles(from, count, has_minimum(format), group);
    else round_bytes(from, count, group);
}

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

void put_group(const Group &group, int format, int flip, int lane, uint8_t *to) {
    for (int i = 0; i < GROUP; i++) {
        if (is_four_bits(format)) {
            int half = i / (GROUP / 2), quad = i % (GROUP / 2) / 4;
            to[quad * 4 * BLOCK + lane * 4 + i % 4] |= (uint8_t)(group.values[i] << 4 * half);
        } else {
            to[i / 4 * 4 * BLOCK + lane * 4 + i % 4] = (uint8_t)(group.values[i] ^ flip);
        }
    }
    uint16_t *numbers = (uint16_t *)(to + integer_bytes(format));
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

void pack_block(OwnMatrix &matrix, const Source &source, const Layout *layout, int flip, int block) {
    uint8_t *to = matrix.memory.get() + block * matrix.block_bytes;
    size_t stride = group_bytes(matrix.format);
    std::vector<float> floats(source.inputs);
    int rows = std::min<int>(BLOCK, matrix.outputs - block * BLOCK);
    // Outputs that are not there have scales of zero.
    for (int lane = 0; lane < rows; lane++) {
        int row = block * BLOCK + lane;
        if (!layout) floats_of(source, row, floats.data());
        if (matrix.format == FLOAT32) {
            for (int input = 0; input < source.inputs; input++) ((float *)to)[(size_t)input * BLOCK + lane] = floats[input];
        } else if (matrix.format == BFLOAT16) {
            for (int input = 0; input < source.inputs; input++)
                ((uint16_t *)to)[(size_t)input * BLOCK + lane] = bfloat_from_float(floats[input]);
        } else {
            for (int number = 0; number < matrix.inputs / GROUP; number++) {
                Group group;
                if (layout) {
                    size_t row_bytes = (size_t)source.inputs / layout->weights * layout->bytes;
                    read_group(*layout, (const uint8_t *)source.weights + row * row_bytes, number, group);
                } else {
                    int at = number * GROUP;
                    round_group(floats.data() + at, std::min<int>(GROUP, source.inputs - at), matrix.format, group);
                }
                put_group(group, matrix.format, flip, lane, to + number * stride);
            }
        }
    }
}

}  // namespace

OwnMatrix packed(const Source &source, int flip, Threads &threads) {
    const Layout *layout = layout_of(source.kind);
    bool floats = source.kind == STORED_FLOAT32 || source.kind == STORED_FLOAT16 || source.kind == STORED_BFLOAT16;
    int format = layout ? layout->format : source.format;
    bool known = (layout && source.inputs % layout->weights == 0) || (floats && format >= FLOAT32 && format < INT8_MINIMUM) ||
                 (floats && format == INT4_MINIMUM);
    if (!known || source.outputs < 1 || source.inputs < 1) throw std::invalid_argument("weights that are not known");
    OwnMatrix matrix;
    matrix.format = format, matrix.outputs = source.outputs;
    matrix.inputs = is_integer(format) ? (source.inputs + GROUP - 1) / GROUP * GROUP : source.inputs;
    matrix.blocks = (source.outputs + BLOCK - 1) / BLOCK;
    matrix.block_bytes = is_integer(format) ? (size_t)matrix.inputs / GROUP * group_bytes(format)
                                            : (size_t)matrix.inputs * BLOCK * (format == FLOAT32 ? 4 : 2);
    matrix.memory = allocate<uint8_t>(matrix.blocks * matrix.block_bytes);
    matrix.data = matrix.memory.get();
    matrix.own_bias = copied(source.bias, source.outputs);
    matrix.bias = matrix.own_bias.get();
    threads.each(matrix.blocks, [&](int block, int) { pack_block(matrix, source, layout, flip, block); });
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
            const uint8_t *group = block + i / GROUP * group_bytes(format);
            const uint16_t *numbers = (const uint16_t *)(group + integer_bytes(format));
            int at = i % GROUP, half = at / (GROUP / 2), value;
            if (is_four_bits(format)) value = group[at % 16 / 4 * 4 * BLOCK + lane * 4 + at % 4] >> 4 * half & 15;
            else value = (int8_t)(group[at / 4 * 4 * BLOCK + lane * 4 + at % 4] ^ flip);
            if (format == INT4) value -= MIDDLE;
            float scale = float_from_half(numbers[format == INT8_SIXTEENS ? half * BLOCK + lane : lane]);
            to[i] = scale * (float)value + (has_minimum(format) ? float_from_half(numbers[BLOCK + lane]) : 0.0f);
        }
    }
}
