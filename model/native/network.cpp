// The network's pass over the slot cache, and the C interface that model/native/__init__.py calls. Follows model/transformer.py
// and model/cache.py line by line: what they compute with PyTorch is the reference that tests hold this to.

#include "core.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
    float value = exponent ? std::ldexp((float)(1024 + fraction), exponent - 25) : std::ldexp((float)fraction, -24);
    return half & 0x8000 ? -value : value;
}

uint16_t bfloat_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Free {
    void operator()(void *memory) const { free(memory); }
};

template <class T> using Memory = std::unique_ptr<T[], Free>;

template <class T> Memory<T> allocate(size_t count) {
    size_t bytes = (std::max<size_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
    T *memory = (T *)aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    memset((void *)memory, 0, bytes);
    return Memory<T>(memory);
}

struct OwnMatrix : Matrix {
    Memory<uint8_t> memory;
    Memory<float> own_bias;
};

int padded_inputs(int format, int inputs) { return format == INT8 ? (inputs + GROUP - 1) / GROUP * GROUP : inputs; }

size_t block_bytes(int format, int inputs) {
    if (format == FLOAT32) return (size_t)inputs * BLOCK * 4;
    if (format == BFLOAT16) return (size_t)inputs * BLOCK * 2;
    return (size_t)inputs / GROUP * (GROUP * BLOCK + BLOCK * 2);
}

// One block of 16 outputs from rows of float32, `[outputs][inputs]`.
void pack_block(OwnMatrix &matrix, const float *weights, int inputs, int block) {
    uint8_t *to = matrix.memory.get() + block * matrix.block_bytes;
    int rows = std::min<int>(BLOCK, matrix.outputs - block * BLOCK);
    for (int row = 0; row < rows; row++) {
        const float *from = weights + (size_t)(block * BLOCK + row) * inputs;
        if (matrix.format == FLOAT32) {
            for (int input = 0; input < inputs; input++) ((float *)to)[(size_t)input * BLOCK + row] = from[input];
        } else if (matrix.format == BFLOAT16) {
            for (int input = 0; input < inputs; input++)
                ((uint16_t *)to)[(size_t)input * BLOCK + row] = bfloat_from_float(from[input]);
        } else {
            for (int group = 0; group < matrix.inputs / GROUP; group++) {
                uint8_t *here = to + (size_t)group * (GROUP * BLOCK + BLOCK * 2);
                int count = std::min<int>(GROUP, inputs - group * GROUP);
                float most = 0;
                for (int i = 0; i < count; i++) most = std::max(most, std::fabs(from[group * GROUP + i]));
                // What is held is the rounded scale, so that is what the integers are counted in.
                uint16_t half = half_from_float(most / 127);
                float scale = float_from_half(half);
                for (int i = 0; i < count; i++) {
                    float steps = scale > 0 ? std::nearbyint(from[group * GROUP + i] / scale) : 0;
                    here[i / 4 * 4 * BLOCK + row * 4 + i % 4] = (uint8_t)(int8_t)std::max(-127.f, std::min(127.f, steps));
                }
                ((uint16_t *)(here + GROUP * BLOCK))[row] = half;
            }
        }
    }
}

struct Layer {
    OwnMatrix query_key_value, output, up, down;
    Memory<float> norm, norm_bias, post_norm, post_norm_bias, query_norm, key_norm;
};

}  // namespace

extern "C" {

// What model/native/__init__.py fills in; the order and the types are repeated there.
struct Shape {
    int32_t vocabulary, hidden, inner, layers, heads, key_heads, head_size, layer_norm, gated, rotary, head_norm;
    float epsilon;
};

// One layer's weights as float32, `[outputs][inputs]` each, those of a gate above those it gates; null where there are none.
struct LayerWeights {
    const float *query_key_value, *query_key_value_bias, *output, *output_bias, *up, *up_bias, *down, *down_bias, *norm,
        *norm_bias, *post_norm, *post_norm_bias, *query_norm, *key_norm;
};

// One pass: `spans` of new rows, whose embeddings stand in `states` [rows][hidden], which become the final states.
struct Pass {
    int32_t rows, spans;
    const Span *span;
    float *states;
    const float *cosines, *sines;  // [rows][head_size / 2]
    int32_t kept;                  // layers below which the state is wanted
    const int32_t *kept_layers;
    float *kept_states;  // [kept][rows][hidden]
};
}

namespace {

struct Network {
    Shape shape;
    const Kernels *kernels;
    Threads *threads;
    std::vector<Layer> layers;
    Memory<float> norm, norm_bias;
    OwnMatrix head;

    // Room for one pass.
    size_t room = 0;
    Memory<float> normed, mixed, queries, inner, activated, scales;
    Memory<int8_t> bytes;
    int widest = 0;
    std::vector<Memory<float>> scores;
    size_t score_room = 0;

    void grow(int rows);
    Rows prepare(const float *from, int stride, int count, const Matrix &matrix);
    void multiply(const Matrix &matrix, const Rows &rows, float *to, int stride, bool add);
};

struct Slots {
    size_t slot_stride, block_stride;
    int blocks, heads, size;
    float *memory;

    // Where a layer's blocks of slot 0 begin.
    float *layer(int number) const { return memory + (size_t)number * heads * 2 * size * KEYS; }
};

Memory<float> copied(const float *from, size_t count) {
    if (!from) return nullptr;
    Memory<float> to = allocate<float>(count);
    memcpy(to.get(), from, count * sizeof(float));
    return to;
}

void pack(Network &network, OwnMatrix &matrix, const float *weights, const float *bias, int outputs, int inputs, int format) {
    matrix.format = format, matrix.outputs = outputs, matrix.inputs = padded_inputs(format, inputs);
    matrix.blocks = (outputs + BLOCK - 1) / BLOCK;
    matrix.block_bytes = block_bytes(format, matrix.inputs);
    matrix.memory = allocate<uint8_t>(matrix.blocks * matrix.block_bytes);
    matrix.data = matrix.memory.get();
    matrix.own_bias = copied(bias, outputs);
    matrix.bias = matrix.own_bias.get();
    network.threads->each(matrix.blocks, [&](int block, int) { pack_block(matrix, weights, inputs, block); });
    network.widest = std::max(network.widest, (int)matrix.inputs);
}

void Network::grow(int rows) {
    size_t needed = (size_t)(rows + 15) / 16 * 16;
    if (needed <= room) return;
    room = needed;
    int query = shape.heads * shape.head_size, key = shape.key_heads * shape.head_size;
    int wide = (shape.gated ? 2 : 1) * shape.inner;
    normed = allocate<float>(room * shape.hidden);
    mixed = allocate<float>(room * query);
    queries = allocate<float>(room * (query + 2 * key));
    inner = allocate<float>(room * wide);
    activated = allocate<float>(room * shape.inner);
    bytes = allocate<int8_t>(room * widest);
    scales = allocate<float>(room * (widest / GROUP + 1));
}

Rows Network::prepare(const float *from, int stride, int count, const Matrix &matrix) {
    return {from, stride, bytes.get(), matrix.inputs, scales.get(), matrix.inputs / GROUP, count};
}

void Network::multiply(const Matrix &matrix, const Rows &rows, float *to, int stride, bool add) {
    // Several pieces for each thread, so that one that was held up does not keep the others waiting.
    int pieces = std::min<int>(matrix.blocks, threads->count() * 4);
    threads->each(pieces, [&](int piece, int) {
        int begin = (int64_t)matrix.blocks * piece / pieces, end = (int64_t)matrix.blocks * (piece + 1) / pieces;
        kernels->multiply(&matrix, &rows, to, stride, add, begin, end);
    });
}

void normalise(const Network &network, const float *from, const float *weight, const float *bias, float *to) {
    const Shape &shape = network.shape;
    if (shape.layer_norm) network.kernels->layer_norm(from, weight, bias, shape.epsilon, shape.hidden, to);
    else network.kernels->rms_norm(from, weight, shape.epsilon, shape.hidden, to);
}

// Call `body(row)` for every row, a few at a time on each thread.
template <class F> void each_row(Network &network, int rows, F &&body) {
    int pieces = std::min(rows, network.threads->count() * 4);
    network.threads->each(pieces, [&](int piece, int) {
        for (int row = (int64_t)rows * piece / pieces; row < (int64_t)rows * (piece + 1) / pieces; row++) body(row);
    });
}

void quantise(Network &network, const Matrix &matrix, const float *from, int inputs, int row) {
    if (matrix.format == INT8)
        network.kernels->quantise(from, inputs, network.bytes.get() + (size_t)row * matrix.inputs,
                                  network.scales.get() + (size_t)row * (matrix.inputs / GROUP));
}

void write(const Slots &slots, int layer, const Span &span, int row, const float *key, const float *value) {
    int position = span.position + row, size = slots.size;
    float *block = slots.layer(layer) + span.slot * slots.slot_stride + position / KEYS * slots.block_stride;
    for (int head = 0; head < slots.heads; head++) {
        float *keys = block + (size_t)head * 2 * size * KEYS + position % KEYS, *values = block + ((size_t)head * 2 + 1) * size * KEYS;
        for (int d = 0; d < size; d++) keys[d * KEYS] = key[head * size + d];
        memcpy(values + position % KEYS * size, value + head * size, size * sizeof(float));
    }
}

struct Part {
    const Span *span;
    int head, begin, end;
};

void attend(Network &network, Slots &slots, int layer, const Pass &pass) {
    const Shape &shape = network.shape;
    int query = shape.heads * shape.head_size, key = shape.key_heads * shape.head_size, stride = query + 2 * key;
    int heads_per_key = shape.heads / shape.key_heads;
    Cache cache = {slots.layer(layer), slots.slot_stride, slots.block_stride, shape.head_size, slots.blocks};
    std::vector<Part> parts;
    int step = std::max(1, QUERIES / heads_per_key);
    for (int index = 0; index < pass.spans; index++)
        for (int begin = 0; begin < pass.span[index].count; begin += step)
            for (int head = 0; head < shape.key_heads; head++)
                parts.push_back({pass.span + index, head, begin, std::min(pass.span[index].count, begin + step)});
    size_t needed = (size_t)slots.blocks * KEYS * QUERIES;
    if (network.score_room < needed || (int)network.scores.size() < network.threads->count()) {
        network.scores.clear();
        for (int thread = 0; thread < network.threads->count(); thread++) network.scores.push_back(allocate<float>(needed));
        network.score_room = needed;
    }
    float scale = 1.0f / std::sqrt((float)shape.head_size);
    network.threads->each((int)parts.size(), [&](int number, int thread) {
        const Part &part = parts[number];
        network.kernels->attend(&cache, part.span, part.head, part.begin, part.end, network.queries.get(), stride,
                                heads_per_key, scale, network.scores[thread].get(), network.mixed.get(), query);
    });
}

void run(Network &network, Slots &slots, const Pass &pass) {
    const Shape &shape = network.shape;
    const Kernels &kernels = *network.kernels;
    network.grow(pass.rows);
    int hidden = shape.hidden, rows = pass.rows;
    int query = shape.heads * shape.head_size, key = shape.key_heads * shape.head_size, wide = query + 2 * key;
    std::vector<std::pair<const Span *, int>> place(rows);
    for (int index = 0; index < pass.spans; index++)
        for (int row = 0; row < pass.span[index].count; row++)
            place[pass.span[index].first + row] = {pass.span + index, row};
    for (int number = 0; number < shape.layers; number++) {
        Layer &layer = network.layers[number];
        for (int kept = 0; kept < pass.kept; kept++)
            if (pass.kept_layers[kept] == number)
                memcpy(pass.kept_states + (size_t)kept * rows * hidden, pass.states, (size_t)rows * hidden * sizeof(float));
        each_row(network, rows, [&](int row) {
            float *normed = network.normed.get() + (size_t)row * hidden;
            normalise(network, pass.states + (size_t)row * hidden, layer.norm.get(), layer.norm_bias.get(), normed);
            quantise(network, layer.query_key_value, normed, hidden, row);
        });
        network.multiply(layer.query_key_value,
                         network.prepare(network.normed.get(), hidden, rows, layer.query_key_value),
                         network.queries.get(), wide, false);
        each_row(network, rows, [&](int row) {
            float *all = network.queries.get() + (size_t)row * wide;
            for (int head = 0; head < shape.heads + shape.key_heads; head++) {
                float *one = all + head * shape.head_size;
                const float *weight = head < shape.heads ? layer.query_norm.get() : layer.key_norm.get();
                if (shape.head_norm) kernels.rms_norm(one, weight, shape.epsilon, shape.head_size, one);
                if (shape.rotary)
                    kernels.rotate(one, pass.cosines + (size_t)row * (shape.head_size / 2),
                                   pass.sines + (size_t)row * (shape.head_size / 2), shape.head_size / 2);
            }
            write(slots, number, *place[row].first, place[row].second, all + query, all + query + key);
        });
        attend(network, slots, number, pass);
        if (layer.output.format == INT8)
            each_row(network, rows, [&](int row) {
                quantise(network, layer.output, network.mixed.get() + (size_t)row * query, query, row);
            });
        network.multiply(layer.output, network.prepare(network.mixed.get(), query, rows, layer.output), pass.states,
                         hidden, true);
        each_row(network, rows, [&](int row) {
            float *normed = network.normed.get() + (size_t)row * hidden;
            normalise(network, pass.states + (size_t)row * hidden, layer.post_norm.get(), layer.post_norm_bias.get(), normed);
            quantise(network, layer.up, normed, hidden, row);
        });
        int inner_stride = (shape.gated ? 2 : 1) * shape.inner;
        network.multiply(layer.up, network.prepare(network.normed.get(), hidden, rows, layer.up), network.inner.get(),
                         inner_stride, false);
        each_row(network, rows, [&](int row) {
            const float *from = network.inner.get() + (size_t)row * inner_stride;
            float *to = network.activated.get() + (size_t)row * shape.inner;
            if (shape.gated) kernels.silu_gate(from, from + shape.inner, shape.inner, to);
            else kernels.gelu(from, shape.inner, to);
            quantise(network, layer.down, to, shape.inner, row);
        });
        network.multiply(layer.down, network.prepare(network.activated.get(), shape.inner, rows, layer.down),
                         pass.states, hidden, true);
    }
    each_row(network, rows, [&](int row) {
        float *state = pass.states + (size_t)row * hidden;
        normalise(network, state, network.norm.get(), network.norm_bias.get(), state);
    });
}

#if defined(__x86_64__)
bool may_use_tiles() {
    // The kernel grants the tiles' registers to a process that asks.
    const int REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_amx() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1) && may_use_tiles();
}
#endif

std::vector<const Kernels *> available() {
    std::vector<const Kernels *> found = {&topkapi_scalar};
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vnni");
    if (avx2) found.push_back(&topkapi_avx2);
    if (avx2 && has_avx_vnni()) found.push_back(&topkapi_avx_vnni);
    if (avx512) found.push_back(&topkapi_avx512_vnni);
    if (avx512 && has_amx()) found.push_back(&topkapi_amx);
#endif
    return found;
}

template <class F> int guarded(F &&body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (...) {
        return 2;
    }
}

}  // namespace

extern "C" {

int topkapi_levels() { return (int)available().size(); }

const char *topkapi_level_name(int level) { return available()[level]->name; }

void *topkapi_threads_new(int count) {
    try {
        return new Threads(count);
    } catch (...) {
        return nullptr;
    }
}

void topkapi_threads_free(void *threads) { delete (Threads *)threads; }

int topkapi_network_new(const Shape *shape, int level, void *threads, void **made) {
    return guarded([&] {
        auto network = std::make_unique<Network>();
        network->shape = *shape;
        network->kernels = available().at(level);
        network->threads = (Threads *)threads;
        network->layers.resize(shape->layers);
        *made = network.release();
    });
}

void topkapi_network_free(void *network) { delete (Network *)network; }

int topkapi_network_layer(void *handle, int number, const LayerWeights *from, int format) {
    return guarded([&] {
        Network &network = *(Network *)handle;
        const Shape &shape = network.shape;
        Layer &layer = network.layers.at(number);
        int query = shape.heads * shape.head_size, key = shape.key_heads * shape.head_size, hidden = shape.hidden;
        pack(network, layer.query_key_value, from->query_key_value, from->query_key_value_bias, query + 2 * key, hidden,
             format);
        pack(network, layer.output, from->output, from->output_bias, hidden, query, format);
        pack(network, layer.up, from->up, from->up_bias, (shape.gated ? 2 : 1) * shape.inner, hidden, format);
        pack(network, layer.down, from->down, from->down_bias, hidden, shape.inner, format);
        layer.norm = copied(from->norm, hidden), layer.norm_bias = copied(from->norm_bias, hidden);
        layer.post_norm = copied(from->post_norm, hidden), layer.post_norm_bias = copied(from->post_norm_bias, hidden);
        layer.query_norm = copied(from->query_norm, shape.head_size);
        layer.key_norm = copied(from->key_norm, shape.head_size);
    });
}

int topkapi_network_head(void *handle, const float *norm, const float *norm_bias, const float *weights, int format) {
    return guarded([&] {
        Network &network = *(Network *)handle;
        const Shape &shape = network.shape;
        network.norm = copied(norm, shape.hidden), network.norm_bias = copied(norm_bias, shape.hidden);
        pack(network, network.head, weights, nullptr, shape.vocabulary, shape.hidden, format);
    });
}

// Floats that one block of 16 positions takes.
int64_t topkapi_block_floats(const Shape *shape) {
    return (int64_t)shape->layers * shape->key_heads * 2 * shape->head_size * KEYS;
}

// `memory` [slots][blocks][floats of a block] is the caller's.
int topkapi_slots_new(const Shape *shape, int blocks, float *memory, void **made) {
    return guarded([&] {
        size_t block = topkapi_block_floats(shape);
        *made = new Slots{block * blocks, block, blocks, shape->key_heads, shape->head_size, memory};
    });
}

void topkapi_slots_free(void *slots) { delete (Slots *)slots; }

int topkapi_run(void *network, void *slots, const Pass *pass) {
    return guarded([&] { run(*(Network *)network, *(Slots *)slots, *pass); });
}

// Scores of every token for `rows` states [rows][hidden]: to [rows][vocabulary].
int topkapi_logits(void *handle, const float *states, int rows, float *to) {
    return guarded([&] {
        Network &network = *(Network *)handle;
        const Shape &shape = network.shape;
        network.grow(rows);
        if (network.head.format == INT8)
            each_row(network, rows,
                     [&](int row) { quantise(network, network.head, states + (size_t)row * shape.hidden, shape.hidden, row); });
        network.multiply(network.head, network.prepare(states, shape.hidden, rows, network.head), to,
                         shape.vocabulary, false);
    });
}
}
