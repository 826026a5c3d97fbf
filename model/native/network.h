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

// What model/native/library.py fills in; the order and the types are repeated there. `head_norm`: queries and keys are normalised,
// 1 for each head, 2 all heads together. `rotated` numbers of a head have rotary positions. `parallel`: attention and feed-forward
// layer read the same state.
struct Shape {
    int32_t vocabulary, hidden, inner, layers, heads, key_heads, head_size, layer_norm, gated, rotated, head_norm, positions, activation,
        parallel;
    float epsilon, embedding_scale, attention_scale, attention_cap, residual_scale, logit_divisor, logit_cap;
};

// Null where there is none.
struct NormWeights {
    const float *weight, *bias;
};

// One layer's matrices, the gate only where there is one, and its norms; how many keys its queries see (0: all), and which of a
// pass's rotary positions it has (-1: none).
struct LayerWeights {
    Source query, key, value, output, gate, up, down;
    NormWeights before_attention, after_attention, before_inner, after_inner, query_norm, key_norm;
    int32_t window, angles;
};

// What is around the layers. Without `embedding.weights` the head's rows are the embedding; `positions` are learned ones,
// `[positions][hidden]`, or null. `embedding_norm` is of embeddings before the first layer.
struct OuterWeights {
    Source embedding, head;
    NormWeights norm;
    const float *positions;
    NormWeights embedding_norm;
};

// One pass: `spans` of new rows, their tokens, and where the final states go, [rows][hidden].
struct Pass {
    int32_t rows, spans;
    const Span *span;
    const int32_t *tokens;
    float *states;
    const float *cosines, *sines;  // [kinds][angles][rotated / 2]
    int32_t kinds, angles;         // of rotary positions, and how many positions have them
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

struct Norm {
    Memory<float> weight, bias;
};

struct Layer {
    Stack query_key_value, output, up, down;
    Norm before_attention, after_attention, before_inner, after_inner, query_norm, key_norm;
    int window, angles;
};

// Rows that were quantised, as `Rows` says.
struct QuantisedRows {
    Memory<int8_t> bytes;
    Memory<float> scales, sums;
    Memory<int32_t> offsets, totals;
};

// As kernels want them, with what they are as floats.
Rows rows_of(const QuantisedRows &from, const float *floats, int stride, int inputs, int count);

// What some rows of a pass are computed in, numbered from the first of them. Each part of a layer reads `given`, but the last
// matrix what was `activated`.
struct Bench {
    size_t rows = 0;
    Memory<float> normed, update, inner, activated;
    QuantisedRows given_bytes, activated_bytes;
};

// What one pass works in. Several threads may run passes over caches of their own at a time, each in a room of its own.
struct Room {
    size_t rows = 0, score_count = 0;
    Memory<float> states, queries, mixed;
    // One for all rows, or one for each thread.
    Bench whole;
    std::vector<Bench> benches;
    // Of each thread: the scores of some queries, and one row.
    std::vector<Memory<float>> scores, one_row;
};

// Rows of a pass from `begin` to before `end`, which one `thread` computes alone, or all threads together.
struct Part {
    int begin, end;
    Bench *bench;
    bool alone;
    int thread;

    int rows() const { return end - begin; }
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
    Norm norm, embedding_norm;
    Memory<float> positions;
    Stack head, embedding;

    void run(Slots &slots, const Pass &pass);
    void logits(const float *states, int rows, float *to);

    Stack stack(std::initializer_list<const Source *> sources);
    int query_size() const { return shape.heads * shape.head_size; }
    int key_size() const { return shape.key_heads * shape.head_size; }

  private:
    friend struct Run;
    std::unique_ptr<Room> rent(int rows);
    void give_back(std::unique_ptr<Room> room);
    void grow(Bench &bench, int rows);
    void check(const Slots &slots, const Pass &pass);
    // `count` numbers of a row of so many `inputs`, from number `begin` on, where a group begins.
    void quantise(QuantisedRows &to, const Stack &stack, const float *from, int inputs, int row, int begin, int count);
    void quantise(QuantisedRows &to, const Stack &stack, const float *from, int inputs, int row) {
        quantise(to, stack, from, inputs, row, 0, inputs);
    }
    void multiply(const Part &part, const Stack &stack, const Rows &rows, float *to, int stride, bool add);
    // Blocks of one matrix from `begin` on, by one thread.
    void multiply_some(const OwnMatrix &matrix, int begin, int outputs, const Rows &rows, float *to, int stride);
    template <class F> void each_row(const Part &part, F &&body) {
        if (part.alone) {
            for (int row = 0; row < part.rows(); row++) body(row, part.thread);
            return;
        }
        // A few at a time on each thread.
        int pieces = std::min(part.rows(), threads->count() * 4);
        threads->each(pieces, [&](int piece, int thread) {
            int64_t rows = part.rows();
            for (int row = rows * piece / pieces; row < rows * (piece + 1) / pieces; row++) body(row, thread);
        });
    }

    int widest_ = 0;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Room>> rooms_;
};

// Floats from a row of a room to the next: never a multiple of what caches are organised in, where rows would displace one another.
inline size_t apart(int size) { return rounded_up(size, 16) + 16; }
