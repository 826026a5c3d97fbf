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
    bench.inner = allocate<float>(needed * apart(std::max<int>((shape.gated ? 2 : 1) * shape.inner, 2 * WIDE)));
    bench.activated = allocate<float>(needed * apart(shape.inner));
    for (QuantisedRows *rows : {&bench.given_bytes, &bench.activated_bytes}) {
        rows->bytes = allocate<int8_t>(needed * widest_ * 2);
        rows->scales = allocate<float>(needed * wide_groups(widest_));
        rows->offsets = allocate<int32_t>(needed * wide_groups(widest_) * 2);
        rows->sums = allocate<float>(needed * groups_of(0, widest_));
        rows->totals = allocate<int32_t>(needed * groups_of(0, widest_) * 2);
    }
    bench.rows = needed;
}

Stack Network::stack(std::initializer_list<const Source *> sources) {
    Stack made;
    for (const Source *source : sources) {
        if (!source->weights) continue;
        made.parts.push_back(packed(*source, kernels->flip, weights, *threads));
        widest_ = std::max(widest_, rounded_up(made.parts.back().inputs, PIECE));
    }
    for (const OwnMatrix &part : made.parts)
        if (is_integer(part.format) && has_byte_rows(part.format) != (made.rows() == BYTE_ROWS))
            throw std::invalid_argument("matrices that read the same rows in two forms");
    return made;
}

void Network::quantise(QuantisedRows &to, const Stack &stack, const float *from, int inputs, int row, int begin, int count) {
    if (!stack.integers()) return;
    size_t wide = (size_t)row * wide_groups(inputs) + begin / WIDE, group = (size_t)row * groups_of(0, inputs) + begin / GROUP;
    Quantised of = {to.bytes.get() + panel_begin(row, row_stride(inputs)) + piece_at(begin), row, to.scales.get() + wide,
                    to.sums.get() + group, to.offsets.get() + 2 * wide, to.totals.get() + 2 * group};
    kernels->quantise(from, count, stack.rows(), &of);
}

Rows rows_of(const QuantisedRows &from, const float *floats, int stride, int inputs, int count) {
    return {floats, stride, from.bytes.get(), row_stride(inputs), from.scales.get(), wide_groups(inputs), from.offsets.get(),
            from.sums.get(), from.totals.get(), groups_of(0, inputs), count};
}

void Network::multiply_some(const OwnMatrix &matrix, int begin, int outputs, const Rows &rows, float *to, int stride) {
    Matrix some = matrix;
    some.data += begin * matrix.block_bytes, some.outputs = outputs, some.blocks = (outputs + BLOCK - 1) / BLOCK;
    if (some.bias) some.bias += begin * BLOCK;
    kernels->multiply(&some, &rows, to, stride, false, 0, some.blocks);
}

void Network::multiply(const Part &part, const Stack &stack, const Rows &rows, float *to, int stride, bool add) {
    // Blocks that kernels take side by side stay together.
    const int TOGETHER = 4;
    int all = 0;
    for (const OwnMatrix &one : stack.parts) all += one.blocks;
    int units = (all + TOGETHER - 1) / TOGETHER, count = threads->count();
    // Each thread begins with a long piece, where the processor foresees what is read next; short ones are left for whoever comes
    // first, so that one that was held up does not keep the others waiting.
    auto cut = [&](int piece) {
        int unit = piece <= count ? units * 3 * piece / (4 * count) : units * (piece + 5 * count) / (8 * count);
        return unit * TOGETHER;
    };
    int pieces = part.alone ? 1 : 3 * count;
    auto multiply_piece = [&](int piece, int) {
        int begin = part.alone ? 0 : cut(piece), end = part.alone ? all : std::min(cut(piece + 1), all);
        float *into = to;
        for (const OwnMatrix &one : stack.parts) {
            int first = std::max(begin, 0), last = std::min(end, one.blocks);
            if (first < last) kernels->multiply(&one, &rows, into, stride, add, first, last);
            begin -= one.blocks, end -= one.blocks, into += one.outputs;
        }
    };
    if (part.alone) multiply_piece(0, part.thread);
    else threads->each(pieces, multiply_piece);
}

const OwnMatrix *Network::adapted(int layer, int number) const {
    const Layer &of = layers.at(layer);
    auto part = [](const Stack &stack, int at) { return at < (int)stack.parts.size() ? &stack.parts[at] : nullptr; };
    if (number <= ADAPTED_VALUE) return part(of.query_key_value, number);
    if (number == ADAPTED_OUTPUT) return part(of.output, 0);
    if (number == ADAPTED_GATE) return shape.gated ? part(of.up, 0) : nullptr;
    return number == ADAPTED_UP ? part(of.up, shape.gated ? 1 : 0) : part(of.down, 0);
}

void Network::adapt(Adapter &adapter, int layer, int number, const Source &down, const Source &up) {
    const OwnMatrix *of = number >= 0 && number < ADAPTED ? adapted(layer, number) : nullptr;
    // Of integers the inputs are filled up; how many there are is known by the shape.
    int inputs = number == ADAPTED_OUTPUT ? query_size() : number == ADAPTED_DOWN ? shape.inner : shape.hidden;
    if (!of || down.inputs != inputs || up.outputs != of->outputs || down.outputs != up.inputs || down.outputs < 1)
        throw std::invalid_argument("adapter");
    adapter.layers.resize(layers.size());
    std::array<LowRank, ADAPTED> &all = adapter.layers[layer];
    all[number] = {packed(down, kernels->flip, adapter.weights, *threads), packed(up, kernels->flip, adapter.weights, *threads)};
    auto width = [&](int first, int last) {
        int sum = 0;
        for (int at = first; at <= last; at++) sum += all[at].down.blocks * BLOCK;
        return sum;
    };
    for (int most : {width(ADAPTED_QUERY, ADAPTED_VALUE), width(ADAPTED_OUTPUT, ADAPTED_OUTPUT), width(ADAPTED_GATE, ADAPTED_UP),
                     width(ADAPTED_DOWN, ADAPTED_DOWN)})
        adapter.widest = std::max(adapter.widest, most);
}

void Network::add_adapters(const Part &part, const std::vector<Group> &groups, int layer, int first, const Stack &stack,
                           const Rows &rows, float *to, int stride) {
    // Blocks of outputs that a thread takes at a time.
    const int TOGETHER = 16;
    struct Piece {
        const LowRank *of;
        int begin, count, low, column, block;
    };
    std::vector<Piece> downs, ups;
    int widest = 0;
    for (const Group &group : groups) {
        int begin = std::max(group.begin, part.begin), end = std::min(group.end, part.end), low = 0, column = 0;
        for (int at = 0; at < (int)stack.parts.size() && begin < end; column += stack.parts[at++].outputs) {
            const LowRank &of = group.adapter->layers[layer][first + at];
            if (!of.down.blocks) continue;
            Piece piece = {&of, begin - part.begin, end - begin, low, column, 0};
            downs.push_back(piece);
            for (; piece.block < of.up.blocks; piece.block += TOGETHER) ups.push_back(piece);
            low += of.down.blocks * BLOCK;
        }
        widest = std::max(widest, low);
    }
    if (downs.empty()) return;
    float *all = part.bench->low.get();
    int low_stride = (int)apart(widest);
    auto some = [](const float *floats, int stride, int count) {
        Rows of = {};
        of.floats = floats, of.stride = stride, of.count = count;
        return of;
    };
    auto down = [&](int at, int) {
        const Piece &piece = downs[at];
        Rows given = some(rows.floats + (size_t)piece.begin * rows.stride, rows.stride, piece.count);
        float *into = all + (size_t)piece.begin * low_stride + piece.low;
        kernels->multiply(&piece.of->down, &given, into, low_stride, false, 0, piece.of->down.blocks);
    };
    auto up = [&](int at, int) {
        const Piece &piece = ups[at];
        Rows given = some(all + (size_t)piece.begin * low_stride + piece.low, low_stride, piece.count);
        float *into = to + (size_t)piece.begin * stride + piece.column;
        kernels->multiply(&piece.of->up, &given, into, stride, true, piece.block, std::min(piece.block + TOGETHER, piece.of->up.blocks));
    };
    if (part.alone) {
        for (int at = 0; at < (int)downs.size(); at++) down(at, part.thread);
        for (int at = 0; at < (int)ups.size(); at++) up(at, part.thread);
        return;
    }
    threads->each((int)downs.size(), down);
    threads->each((int)ups.size(), up);
}

void Network::logits(const float *states, int rows, float *to) {
    std::unique_ptr<Room> room = rent(0);
    grow(room->whole, rows);
    Part part = {0, rows, &room->whole, false, 0};
    QuantisedRows &bytes = room->whole.given_bytes;
    each_row(part, [&](int row, int) { quantise(bytes, head, states + (size_t)row * shape.hidden, shape.hidden, row); });
    multiply(part, head, rows_of(bytes, states, shape.hidden, shape.hidden, rows), to, shape.vocabulary, false);
    if (shape.logit_divisor != 1 || shape.logit_cap > 0)
        each_row(part, [&](int row, int) {
            kernels->bound(to + (size_t)row * shape.vocabulary, shape.vocabulary, shape.logit_divisor, shape.logit_cap);
        });
    give_back(std::move(room));
}
