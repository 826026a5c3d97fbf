// The network: its shape, its weights, and passes over the slot cache.
#pragma once

#include "core.h"
#include "memory.h"
#include "packing.h"
#include "threads.h"

#include <array>
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
    // Of each span, what is added to the matrices for it, or null; null where no span has one.
    const struct Adapter *const *adapters;
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
    // What its rows are rounded to. Those for GGUF's blocks serve wide matrices, too; with rows of bytes nothing else goes.
    RowForm rows() const {
        RowForm form = WIDE_ROWS;
        for (const OwnMatrix &part : parts)
            if (is_integer(part.format)) form = std::max(form, row_form(part.format));
        return form;
    }
};

// What an adapter adds to one matrix: `up` [outputs][rank] times `down` [rank][inputs], both of floats. Without blocks: nothing.
struct LowRank {
    OwnMatrix down = {}, up = {};
};

// The matrices of a layer, in the order of `LayerWeights`.
enum Adapted { ADAPTED_QUERY, ADAPTED_KEY, ADAPTED_VALUE, ADAPTED_OUTPUT, ADAPTED_GATE, ADAPTED_UP, ADAPTED_DOWN, ADAPTED };

// LoRA beside the matrices of a network, for the rows of those spans that name it.
struct Adapter {
    Weights weights{2 << 20};
    std::vector<std::array<LowRank, ADAPTED>> layers;
    int widest = 0;  // most numbers that a row has between the two matrices of all parts of a stack
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
    // Between the two matrices of adapters.
    size_t low_size = 0;
    Memory<float> low;
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

// Rows of a pass that one adapter is for, few enough for a thread at a time.
struct Group {
    const Adapter *adapter;
    int begin, end;
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
    Weights weights;
    std::vector<Layer> layers;
    Norm norm, embedding_norm;
    Memory<float> positions;
    Stack head, embedding;

    void run(Slots &slots, const Pass &pass);
    void logits(const float *states, int rows, float *to);

    Stack stack(std::initializer_list<const Source *> sources);
    // The matrix of a layer that an adapter's number stands for; null where the family has none.
    const OwnMatrix *adapted(int layer, int number) const;
    // Raises std::invalid_argument for what does not fit the matrix.
    void adapt(Adapter &adapter, int layer, int number, const Source &down, const Source &up);
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
    // To what `multiply` made of `rows` in `to`, what the adapters of `groups` add: those of the `stack`'s parts, numbered from `first`
    // on. A row's sums are of its own adapter alone, in one order, whatever is beside it.
    void add_adapters(const Part &part, const std::vector<Group> &groups, int layer, int first, const Stack &stack, const Rows &rows,
                      float *to, int stride);
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
