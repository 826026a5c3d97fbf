// The network: its shape, its weights, and passes over the slot cache.
#pragma once

#include "core.h"
#include "memory.h"
#include "packing.h"
#include "threads.h"

#include <mutex>
#include <utility>
#include <vector>

extern "C" {

// What model/native/structures.py fills in; the order and the types are repeated there.
struct Shape {
    int32_t vocabulary, hidden, inner, layers, heads, key_heads, head_size, layer_norm, gated, rotary, head_norm, positions;
    float epsilon;
};

// One layer's matrices, the gate only where there is one, and its vectors in float32, null where there are none.
struct LayerWeights {
    Source query, key, value, output, gate, up, down;
    const float *norm, *norm_bias, *post_norm, *post_norm_bias, *query_norm, *key_norm;
};

// What is around the layers. Without `embedding.weights` the head's rows are the embedding; `positions` are learned ones,
// `[positions][hidden]`, or null.
struct OuterWeights {
    Source embedding, head;
    const float *norm, *norm_bias, *positions;
};

// One pass: `spans` of new rows, their tokens, and where the final states go, [rows][hidden].
struct Pass {
    int32_t rows, spans;
    const Span *span;
    const int32_t *tokens;
    float *states;
    const float *cosines, *sines;  // of each position, [..][head_size / 2]
    int32_t angles;                // positions that have them
    int32_t kept;                  // layers below which the state is wanted
    const int32_t *kept_layers;
    float *kept_states;  // [kept][rows][hidden]
};
}

// Matrices that read the same rows and write side by side.
struct Stack {
    std::vector<OwnMatrix> parts;

    bool integers() const {
        for (const OwnMatrix &part : parts)
            if (is_integer(part.format)) return true;
        return false;
    }
    bool floats() const {
        for (const OwnMatrix &part : parts)
            if (!is_integer(part.format)) return true;
        return false;
    }
    // Whether some of it has groups of GGUF's blocks, for which rows are added up too.
    bool in_blocks() const {
        for (const OwnMatrix &part : parts)
            if (is_integer(part.format) && !is_wide(part.format)) return true;
        return false;
    }
};

struct Layer {
    Stack query_key_value, output, up, down;
    Memory<float> norm, norm_bias, post_norm, post_norm_bias, query_norm, key_norm;
};

// What one pass works in. Several threads may run passes over caches of their own at a time, each in a room of its own.
struct Room {
    size_t rows = 0, score_count = 0;
    Memory<float> states, normed, mixed, queries, inner, activated, scales, sums;
    Memory<int8_t> bytes;
    Memory<int32_t> offsets, totals;
    // Of each thread: the scores of some queries, and one row.
    std::vector<Memory<float>> scores, one_row;
};

struct Slots {
    size_t slot_stride, block_stride;
    int count, blocks, heads, size, format;
    uint8_t *memory;

    // Where a layer's blocks of slot 0 begin.
    uint8_t *layer(int number) const { return memory + number * heads * head_bytes(format, size); }
};

struct Network {
    Shape shape;
    const Kernels *kernels;
    Threads *threads;
    std::vector<Layer> layers;
    Memory<float> norm, norm_bias, positions;
    Stack head, embedding;

    void run(Slots &slots, const Pass &pass);
    void logits(const float *states, int rows, float *to);

    Stack stack(std::initializer_list<const Source *> sources);
    int query_size() const { return shape.heads * shape.head_size; }
    int key_size() const { return shape.key_heads * shape.head_size; }

  private:
    std::unique_ptr<Room> rent(int rows);
    void give_back(std::unique_ptr<Room> room);
    void run_in(Room &room, Slots &slots, const Pass &pass);
    void attend(Room &room, Slots &slots, int layer, const Pass &pass);
    void quantise(Room &room, const Stack &stack, const float *from, int inputs, int row);
    void multiply(Room &room, const Stack &stack, const float *from, int from_stride, int inputs, int rows, float *to, int stride,
                  bool add);
    void normalise(const float *from, const Memory<float> &weight, const Memory<float> &bias, float *to);
    void check(const Slots &slots, const Pass &pass);
    template <class F> void each_row(int rows, F &&body);

    int widest_ = 0;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Room>> rooms_;
};
