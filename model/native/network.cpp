// The network's pass over the slot cache. Follows model/transformer.py and model/cache.py line by line: what they compute with
// PyTorch is the reference that tests hold this to.

#include "network.h"

#include <cmath>
#include <stdexcept>

// Floats from a row of a room to the next: never a multiple of what caches are organised in, where rows would displace one another.
static size_t apart(int size) { return rounded_up(size, 16) + 16; }

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
    size_t needed = (size_t)(rows + 15) / 16 * 16;
    if (needed <= room->rows) return room;
    *room = Room();
    room->states = allocate<float>(needed * apart(shape.hidden));
    room->normed = allocate<float>(needed * apart(shape.hidden));
    room->mixed = allocate<float>(needed * apart(query_size()));
    room->queries = allocate<float>(needed * apart(query_size() + 2 * key_size()));
    room->inner = allocate<float>(needed * apart((shape.gated ? 2 : 1) * shape.inner));
    room->activated = allocate<float>(needed * apart(shape.inner));
    for (int thread = 0; thread < threads->count(); thread++)
        room->one_row.push_back(allocate<float>(std::max(shape.hidden, shape.inner)));
    room->bytes = allocate<int8_t>(needed * widest_ * 2);
    room->scales = allocate<float>(needed * wide_groups(widest_));
    room->offsets = allocate<int32_t>(needed * wide_groups(widest_) * 2);
    room->sums = allocate<float>(needed * groups_of(0, widest_));
    room->totals = allocate<int32_t>(needed * groups_of(0, widest_) * 2);
    room->rows = needed;
    return room;
}

void Network::give_back(std::unique_ptr<Room> room) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (rooms_.empty()) rooms_.push_back(std::move(room));
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

// Call `body(row, thread)` for every row, a few at a time on each thread.
template <class F> void Network::each_row(int rows, F &&body) {
    int pieces = std::min(rows, threads->count() * 4);
    threads->each(pieces, [&](int piece, int thread) {
        for (int row = (int64_t)rows * piece / pieces; row < (int64_t)rows * (piece + 1) / pieces; row++) body(row, thread);
    });
}

void Network::quantise(Room &room, const Stack &stack, const float *from, int inputs, int row) {
    if (!stack.integers()) return;
    size_t wide = (size_t)row * wide_groups(inputs), group = (size_t)row * groups_of(0, inputs);
    Quantised to = {room.bytes.get() + panel_begin(row, row_stride(inputs)), row, room.scales.get() + wide, room.sums.get() + group,
                    room.offsets.get() + 2 * wide, room.totals.get() + 2 * group};
    kernels->quantise(from, inputs, stack.in_blocks(), &to);
}

void Network::multiply(Room &room, const Stack &stack, const float *from, int from_stride, int inputs, int rows, float *to,
                       int stride, bool add) {
    int all = 0;
    for (const OwnMatrix &part : stack.parts) all += part.blocks;
    Rows of = {from, from_stride, room.bytes.get(), row_stride(inputs), room.scales.get(), wide_groups(inputs), room.offsets.get(),
               room.sums.get(), room.totals.get(), groups_of(0, inputs), rows};
    // Several pieces for each thread, so that one that was held up does not keep the others waiting.
    int pieces = std::min(all, threads->count() * 4);
    threads->each(pieces, [&](int piece, int) {
        int begin = (int64_t)all * piece / pieces, end = (int64_t)all * (piece + 1) / pieces;
        float *into = to;
        for (const OwnMatrix &part : stack.parts) {
            int first = std::max(begin, 0), last = std::min(end, part.blocks);
            if (first < last) kernels->multiply(&part, &of, into, stride, add, first, last);
            begin -= part.blocks, end -= part.blocks, into += part.outputs;
        }
    });
}

void Network::normalise(const float *from, const Memory<float> &weight, const Memory<float> &bias, float *to) {
    if (shape.layer_norm) kernels->layer_norm(from, weight.get(), bias.get(), shape.epsilon, shape.hidden, to);
    else kernels->rms_norm(from, weight.get(), shape.epsilon, shape.hidden, to);
}

static void write(const Kernels &kernels, const Slots &slots, int layer, const Span &span, int row, const float *key,
                  const float *value) {
    int position = span.position + row, size = slots.size;
    uint8_t *block = slots.layer(layer) + span.slot * slots.slot_stride + position / KEYS * slots.block_stride;
    for (int head = 0; head < slots.heads; head++)
        kernels.keep(key + head * size, value + head * size, size, slots.format, position % KEYS,
                     block + head * head_bytes(slots.format, size));
}

void Network::attend(Room &room, Slots &slots, int layer, const Pass &pass) {
    struct Part {
        const Span *span;
        int head, begin, end;
    };
    int stride = (int)apart(query_size() + 2 * key_size()), heads_per_key = shape.heads / shape.key_heads;
    Cache cache = {slots.layer(layer), slots.slot_stride, slots.block_stride, shape.head_size, slots.blocks, slots.format};
    std::vector<Part> parts;
    int step = std::max(1, QUERIES / heads_per_key);
    for (int index = 0; index < pass.spans; index++)
        for (int begin = 0; begin < pass.span[index].count; begin += step)
            for (int head = 0; head < shape.key_heads; head++)
                parts.push_back({pass.span + index, head, begin, std::min(pass.span[index].count, begin + step)});
    float scale = 1.0f / std::sqrt((float)shape.head_size);
    // The longest come last in a prompt: taken first, they keep nobody waiting at the end.
    threads->each((int)parts.size(), [&](int number, int thread) {
        const Part &part = parts[parts.size() - 1 - number];
        kernels->attend(&cache, part.span, part.head, part.begin, part.end, room.queries.get(), stride, heads_per_key,
                        scale, room.scores[thread].get(), room.mixed.get(), (int)apart(query_size()));
    });
}

void Network::check(const Slots &slots, const Pass &pass) {
    int rows = 0;
    for (int index = 0; index < pass.spans; index++) {
        const Span &span = pass.span[index];
        bool inside = span.slot >= 0 && span.slot < slots.count && span.count > 0 && span.position >= 0 &&
                      (int64_t)span.position + span.count <= (int64_t)slots.blocks * KEYS;
        bool has_angles = !shape.rotary || span.position + span.count <= pass.angles;
        bool has_positions = !positions || span.position + span.count <= shape.positions;
        if (!inside || !has_angles || !has_positions || span.first != rows) throw std::invalid_argument("span");
        rows += span.count;
    }
    if (rows != pass.rows) throw std::invalid_argument("rows");
    for (int row = 0; row < rows; row++)
        if (pass.tokens[row] < 0 || pass.tokens[row] >= shape.vocabulary) throw std::invalid_argument("token");
}

void Network::run(Slots &slots, const Pass &pass) {
    check(slots, pass);
    std::unique_ptr<Room> room = rent(pass.rows);
    size_t needed = (size_t)slots.blocks * KEYS * QUERIES;
    if (room->score_count < needed || (int)room->scores.size() < threads->count()) {
        room->scores.clear();
        for (int thread = 0; thread < threads->count(); thread++) room->scores.push_back(allocate<float>(needed));
        room->score_count = needed;
    }
    run_in(*room, slots, pass);
    give_back(std::move(room));
}

void Network::run_in(Room &room, Slots &slots, const Pass &pass) {
    int hidden = shape.hidden, rows = pass.rows, inner = shape.inner;
    int query = query_size(), key = key_size(), half = shape.head_size / 2;
    int state_stride = (int)apart(hidden), query_stride = (int)apart(query), wide_stride = (int)apart(query + 2 * key);
    int inner_stride = (int)apart((shape.gated ? 2 : 1) * inner), activated_stride = (int)apart(inner);
    std::vector<std::pair<const Span *, int>> place(rows);
    for (int index = 0; index < pass.spans; index++)
        for (int row = 0; row < pass.span[index].count; row++)
            place[pass.span[index].first + row] = {pass.span + index, row};
    auto state = [&](int row) { return room.states.get() + (size_t)row * state_stride; };
    // Where a row is put that `stack` is multiplied with: nobody looks at floats again that are quantised.
    auto put = [&](const Stack &stack, Memory<float> &all, int row, int stride, int thread) {
        return stack.floats() ? all.get() + (size_t)row * stride : room.one_row[thread].get();
    };
    each_row(rows, [&](int row, int) {
        const OwnMatrix &table = (embedding.parts.empty() ? head : embedding).parts[0];
        read_row(table, kernels->flip, pass.tokens[row], state(row), hidden);
        if (!positions) return;
        const float *position = positions.get() + (size_t)(place[row].first->position + place[row].second) * hidden;
        for (int i = 0; i < hidden; i++) state(row)[i] += position[i];
    });
    for (int number = 0; number < shape.layers; number++) {
        Layer &layer = layers[number];
        for (int kept = 0; kept < pass.kept; kept++)
            for (int row = 0; row < rows && pass.kept_layers[kept] == number; row++)
                memcpy(pass.kept_states + ((size_t)kept * rows + row) * hidden, state(row), hidden * sizeof(float));
        each_row(rows, [&](int row, int thread) {
            float *normed = put(layer.query_key_value, room.normed, row, state_stride, thread);
            normalise(state(row), layer.norm, layer.norm_bias, normed);
            quantise(room, layer.query_key_value, normed, hidden, row);
        });
        multiply(room, layer.query_key_value, room.normed.get(), state_stride, hidden, rows, room.queries.get(), wide_stride, false);
        each_row(rows, [&](int row, int) {
            float *all = room.queries.get() + (size_t)row * wide_stride;
            int position = place[row].first->position + place[row].second;
            for (int head = 0; head < shape.heads + shape.key_heads; head++) {
                float *one = all + head * shape.head_size;
                const float *weight = head < shape.heads ? layer.query_norm.get() : layer.key_norm.get();
                if (shape.head_norm) kernels->rms_norm(one, weight, shape.epsilon, shape.head_size, one);
                if (shape.rotary)
                    kernels->rotate(one, pass.cosines + (size_t)position * half, pass.sines + (size_t)position * half, half);
            }
            write(*kernels, slots, number, *place[row].first, place[row].second, all + query, all + query + key);
        });
        attend(room, slots, number, pass);
        if (layer.output.integers())
            each_row(rows, [&](int row, int) {
                quantise(room, layer.output, room.mixed.get() + (size_t)row * query_stride, query, row);
            });
        multiply(room, layer.output, room.mixed.get(), query_stride, query, rows, room.states.get(), state_stride, true);
        each_row(rows, [&](int row, int thread) {
            float *normed = put(layer.up, room.normed, row, state_stride, thread);
            normalise(state(row), layer.post_norm, layer.post_norm_bias, normed);
            quantise(room, layer.up, normed, hidden, row);
        });
        multiply(room, layer.up, room.normed.get(), state_stride, hidden, rows, room.inner.get(), inner_stride, false);
        each_row(rows, [&](int row, int thread) {
            const float *from = room.inner.get() + (size_t)row * inner_stride;
            float *to = put(layer.down, room.activated, row, activated_stride, thread);
            if (shape.gated) kernels->silu_gate(from, from + inner, inner, to);
            else kernels->gelu(from, inner, to);
            quantise(room, layer.down, to, inner, row);
        });
        multiply(room, layer.down, room.activated.get(), activated_stride, inner, rows, room.states.get(), state_stride, true);
    }
    each_row(rows, [&](int row, int) { normalise(state(row), norm, norm_bias, pass.states + (size_t)row * hidden); });
}

void Network::logits(const float *states, int rows, float *to) {
    std::unique_ptr<Room> room = rent(rows);
    each_row(rows, [&](int row, int) { quantise(*room, head, states + (size_t)row * shape.hidden, shape.hidden, row); });
    multiply(*room, head, states, shape.hidden, shape.hidden, rows, to, shape.vocabulary, false);
    give_back(std::move(room));
}
