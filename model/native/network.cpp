// What a network works in, and its products: rows times the matrices that read them. The pass itself is in passes.cpp.

#include "network.h"

#include <stdexcept>

std::unique_ptr<Room> Network::rent(int rows) {
    std::unique_ptr<Room> room;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!rooms_.empty()) {
            room = std::move(rooms_.back());
            rooms_.pop_back();
        }
    }
    if (!room) room = std::make_unique<Room>();
    if ((size_t)rows <= room->rows) return room;
    room->states = allocate<float>(rows * apart(shape.hidden));
    room->mixed = allocate<float>(rows * apart(query_size()));
    room->queries = allocate<float>(rows * apart(query_size() + 2 * key_size()));
    while ((int)room->one_row.size() < threads->count())
        room->one_row.push_back(allocate<float>(std::max(shape.hidden, shape.inner)));
    room->rows = rows;
    return room;
}

void Network::give_back(std::unique_ptr<Room> room) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (rooms_.empty()) rooms_.push_back(std::move(room));
}

void Network::grow(Bench &bench, int rows) {
    size_t needed = rounded_up(rows, TILE_ROWS);
    if (needed <= bench.rows) return;
    bench = Bench();
    bench.normed = allocate<float>(needed * apart(shape.hidden));
    bench.update = allocate<float>(needed * apart(shape.hidden));
    bench.inner = allocate<float>(needed * apart((shape.gated ? 2 : 1) * shape.inner));
    bench.activated = allocate<float>(needed * apart(shape.inner));
    bench.bytes = allocate<int8_t>(needed * widest_ * 2);
    bench.scales = allocate<float>(needed * wide_groups(widest_));
    bench.offsets = allocate<int32_t>(needed * wide_groups(widest_) * 2);
    bench.sums = allocate<float>(needed * groups_of(0, widest_));
    bench.totals = allocate<int32_t>(needed * groups_of(0, widest_) * 2);
    bench.rows = needed;
}

Stack Network::stack(std::initializer_list<const Source *> sources) {
    Stack made;
    for (const Source *source : sources) {
        if (!source->weights) continue;
        made.parts.push_back(packed(*source, kernels->flip, *threads));
        widest_ = std::max(widest_, rounded_up(made.parts.back().inputs, PIECE));
    }
    return made;
}

void Network::quantise(Bench &bench, const Stack &stack, const float *from, int inputs, int row) {
    if (!stack.integers()) return;
    size_t wide = (size_t)row * wide_groups(inputs), group = (size_t)row * groups_of(0, inputs);
    Quantised to = {bench.bytes.get() + panel_begin(row, row_stride(inputs)), row, bench.scales.get() + wide, bench.sums.get() + group,
                    bench.offsets.get() + 2 * wide, bench.totals.get() + 2 * group};
    kernels->quantise(from, inputs, stack.in_blocks(), &to);
}

void Network::multiply(const Part &part, const Stack &stack, const float *from, int from_stride, int inputs, float *to, int stride,
                       bool add) {
    // Blocks that kernels take side by side stay together.
    const int TOGETHER = 4;
    int all = 0;
    for (const OwnMatrix &one : stack.parts) all += one.blocks;
    int units = (all + TOGETHER - 1) / TOGETHER;
    Bench &bench = *part.bench;
    Rows of = {from, from_stride, bench.bytes.get(), row_stride(inputs), bench.scales.get(), wide_groups(inputs), bench.offsets.get(),
               bench.sums.get(), bench.totals.get(), groups_of(0, inputs), part.rows()};
    // Several pieces for each thread, so that one that was held up does not keep the others waiting.
    int pieces = part.alone ? 1 : std::min(units, threads->count() * 4);
    auto multiply_piece = [&](int piece, int) {
        int begin = units * piece / pieces * TOGETHER, end = std::min(units * (piece + 1) / pieces * TOGETHER, all);
        float *into = to;
        for (const OwnMatrix &one : stack.parts) {
            int first = std::max(begin, 0), last = std::min(end, one.blocks);
            if (first < last) kernels->multiply(&one, &of, into, stride, add, first, last);
            begin -= one.blocks, end -= one.blocks, into += one.outputs;
        }
    };
    if (part.alone) multiply_piece(0, part.thread);
    else threads->each(pieces, multiply_piece);
}

void Network::logits(const float *states, int rows, float *to) {
    std::unique_ptr<Room> room = rent(0);
    grow(room->whole, rows);
    Part part = {0, rows, &room->whole, false, 0};
    each_row(part, [&](int row, int) { quantise(room->whole, head, states + (size_t)row * shape.hidden, shape.hidden, row); });
    multiply(part, head, states, shape.hidden, shape.hidden, to, shape.vocabulary, false);
    if (shape.logit_divisor != 1 || shape.logit_cap > 0)
        each_row(part, [&](int row, int) {
            kernels->bound(to + (size_t)row * shape.vocabulary, shape.vocabulary, shape.logit_divisor, shape.logit_cap);
        });
    give_back(std::move(room));
}
