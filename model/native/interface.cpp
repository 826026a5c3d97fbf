// The C interface that model/native/__init__.py calls, and which instruction sets this processor has.

#include "network.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__)
bool may_use_tiles() {
#if defined(__linux__)
    // The kernel grants the tiles' registers to a process that asks.
    const int REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
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

// 0, or what went wrong: no memory, what cannot be computed, anything else.
template <class F> int guarded(F &&body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (const std::logic_error &) {
        return 2;
    } catch (...) {
        return 3;
    }
}

Norm norm_of(const NormWeights &from, size_t size) { return {copied(from.weight, size), copied(from.bias, size)}; }

// 0 for a format that is not known.
int64_t block_bytes(const Shape &shape, int format) {
    if (format < CACHE_FLOAT32 || format > CACHE_INT8) return 0;
    return (int64_t)shape.layers * shape.key_heads * (int64_t)head_bytes(format, shape.head_size);
}

}  // namespace

#ifndef TOPKAPI_SOURCES
#define TOPKAPI_SOURCES ""
#endif

extern "C" {

// The digest of the sources that this was built from.
const char *topkapi_sources() { return TOPKAPI_SOURCES; }

int topkapi_levels() { return (int)available().size(); }

const char *topkapi_level_name(int level) { return available()[level]->name; }

// The kernels of a level, for what is looked through beside a network's passes.
const void *topkapi_kernels(int level) { return available()[level]; }

void *topkapi_threads_new(int count) {
    try {
        return new Threads(count);
    } catch (...) {
        return nullptr;
    }
}

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

int topkapi_network_layer(void *handle, int number, const LayerWeights *from) {
    return guarded([&] {
        Network &network = *(Network *)handle;
        Layer &layer = network.layers.at(number);
        size_t hidden = network.shape.hidden, size = network.shape.head_size;
        layer.query_key_value = network.stack({&from->query, &from->key, &from->value});
        layer.output = network.stack({&from->output});
        layer.up = network.stack({&from->gate, &from->up});
        layer.down = network.stack({&from->down});
        layer.before_attention = norm_of(from->before_attention, hidden), layer.after_attention = norm_of(from->after_attention, hidden);
        layer.before_inner = norm_of(from->before_inner, hidden), layer.after_inner = norm_of(from->after_inner, hidden);
        bool whole = network.shape.head_norm == 2;
        layer.query_norm = norm_of(from->query_norm, whole ? network.query_size() : size);
        layer.key_norm = norm_of(from->key_norm, whole ? network.key_size() : size);
        layer.window = std::max(from->window, 0), layer.angles = from->angles;
    });
}

int topkapi_network_outer(void *handle, const OuterWeights *from) {
    return guarded([&] {
        Network &network = *(Network *)handle;
        const Shape &shape = network.shape;
        network.norm = norm_of(from->norm, shape.hidden), network.embedding_norm = norm_of(from->embedding_norm, shape.hidden);
        network.positions = copied(from->positions, (size_t)shape.positions * shape.hidden);
        network.embedding = network.stack({&from->embedding});
        network.head = network.stack({&from->head});
    });
}

// An adapter of a network without anything in it yet; it must not outlive the network.
int topkapi_adapter_new(void *network, void **made) {
    return guarded([&] {
        auto adapter = std::make_unique<Adapter>();
        adapter->layers.resize(((Network *)network)->layers.size());
        *made = adapter.release();
    });
}

// What it adds to one matrix of a layer; `number` is one of `Adapted`.
int topkapi_adapter_matrix(void *network, void *adapter, int layer, int number, const Source *down, const Source *up) {
    return guarded([&] { ((Network *)network)->adapt(*(Adapter *)adapter, layer, number, *down, *up); });
}

void topkapi_adapter_free(void *adapter) { delete (Adapter *)adapter; }

// Bytes that one block of 16 positions takes.
int64_t topkapi_block_bytes(const Shape *shape, int format) { return block_bytes(*shape, format); }

// `memory` [slots][blocks][bytes of a block] is the caller's.
int topkapi_slots_new(const Shape *shape, int format, int count, int blocks, uint8_t *memory, void **made) {
    return guarded([&] {
        size_t block = block_bytes(*shape, format);
        if (!block) throw std::invalid_argument("format");
        *made = new Slots{block * blocks, block, count, blocks, shape->key_heads, shape->head_size, format, memory};
    });
}

void topkapi_slots_free(void *slots) { delete (Slots *)slots; }

int topkapi_run(void *network, void *slots, const Pass *pass) {
    return guarded([&] { ((Network *)network)->run(*(Slots *)slots, *pass); });
}

// Scores of every token for `rows` states [rows][hidden]: to [rows][vocabulary].
int topkapi_logits(void *network, const float *states, int rows, float *to) {
    return guarded([&] { ((Network *)network)->logits(states, rows, to); });
}
}
