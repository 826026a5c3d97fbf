// The network's pass over the slot cache. Follows model/transformer.py and model/cache.py line by line: what they compute with
// PyTorch is the reference that tests hold this to.

#include "network.h"

#include <numeric>
#include <stdexcept>

// Rows of a long pass that a thread takes through a layer alone: few enough for what it works in to stay in the cache next to it, and
// for threads to end at about the same time. A pass that has not as many for each thread is short.
static const int LEAST_ALONE = 64, MOST_ALONE = 128;
// Rows of one adapter that a thread takes at a time.
static const int ADAPTED_ROWS = 32;

struct Run {
    Network &network;
    Room &room;
    Slots &slots;
    const Pass &pass;
    const Shape &shape = network.shape;
    const Kernels &kernels = *network.kernels;
    int hidden = shape.hidden, inner = shape.inner, query = network.query_size(), key = network.key_size();
    int state_stride = (int)apart(hidden), query_stride = (int)apart(query), wide_stride = (int)apart(query + 2 * key);
    int inner_stride = (int)apart((shape.gated ? 2 : 1) * inner), activated_stride = (int)apart(inner);
    // Of each row its span, and the how manieth row of that it is.
    std::vector<std::pair<const Span *, int>> place;
    // Rows that have an adapter; without any, nothing is computed for it.
    std::vector<Group> groups;

    float *state(int row) { return room.states.get() + (size_t)row * state_stride; }
    float *update(const Part &part, int row) { return part.bench->update.get() + (size_t)row * state_stride; }
    int position(int row) const { return place[row].first->position + place[row].second; }

    void normalise(const float *from, const Norm &norm, float *to) {
        if (!norm.weight) memcpy(to, from, hidden * sizeof(float));
        else if (shape.layer_norm) kernels.layer_norm(from, norm.weight.get(), norm.bias.get(), shape.epsilon, hidden, to);
        else kernels.rms_norm(from, norm.weight.get(), shape.epsilon, hidden, to);
    }

    // Spans one after another that have the same adapter are a group, cut into pieces.
    void find_groups() {
        for (int index = 0; index < pass.spans && pass.adapters; index++) {
            const Span &span = pass.span[index];
            const Adapter *adapter = pass.adapters[index];
            for (int begin = span.first, end = span.first + span.count; adapter && begin < end;) {
                bool goes_on = !groups.empty() && groups.back().adapter == adapter && groups.back().end == begin &&
                               groups.back().end - groups.back().begin < ADAPTED_ROWS;
                if (!goes_on) groups.push_back({adapter, begin, begin});
                Group &group = groups.back();
                begin = group.end = std::min(end, group.begin + ADAPTED_ROWS);
            }
        }
    }

    void multiply(const Part &part, int number, int first, const Stack &stack, const Rows &rows, float *to, int stride, bool add) {
        network.multiply(part, stack, rows, to, stride, add);
        if (!groups.empty()) network.add_adapters(part, groups, number, first, stack, rows, to, stride);
    }

    // Where a row is put that `stack` is multiplied with: nobody looks at floats again that are quantised, but adapters.
    float *put(const Stack &stack, Memory<float> &all, int row, int stride, int thread) {
        return stack.floats() || !groups.empty() ? all.get() + (size_t)row * stride : room.one_row[thread].get();
    }

    Rows normed_rows(const Part &part) {
        return rows_of(part.bench->given_bytes, part.bench->normed.get(), state_stride, hidden, part.rows());
    }

    void embed(const Part &part) {
        const OwnMatrix &table = (network.embedding.parts.empty() ? network.head : network.embedding).parts[0];
        network.each_row(part, [&](int at, int) {
            int row = part.begin + at;
            float *to = state(row);
            read_row(table, kernels.flip, pass.tokens[row], to, hidden);
            for (int i = 0; i < hidden && shape.embedding_scale != 1; i++) to[i] *= shape.embedding_scale;
            if (network.embedding_norm.weight) normalise(to, network.embedding_norm, to);
            if (!network.positions) return;
            const float *learned = network.positions.get() + (size_t)position(row) * hidden;
            for (int i = 0; i < hidden; i++) to[i] += learned[i];
        });
    }

    void keep_states(const Part &part, int number) {
        for (int kept = 0; kept < pass.kept; kept++)
            for (int row = part.begin; row < part.end && pass.kept_layers[kept] == number; row++)
                memcpy(pass.kept_states + ((size_t)kept * pass.rows + row) * hidden, state(row), hidden * sizeof(float));
    }

    // Queries, keys and values of a layer; the latter two go into the cache.
    void look(const Part &part, int number) {
        Layer &layer = network.layers[number];
        keep_states(part, number);
        network.each_row(part, [&](int at, int thread) {
            float *normed = put(layer.query_key_value, part.bench->normed, at, state_stride, thread);
            normalise(state(part.begin + at), layer.before_attention, normed);
            network.quantise(part.bench->given_bytes, layer.query_key_value, normed, hidden, at);
        });
        float *queries = room.queries.get() + (size_t)part.begin * wide_stride;
        multiply(part, number, ADAPTED_QUERY, layer.query_key_value, normed_rows(part), queries, wide_stride, false);
        int half = shape.rotated / 2;
        network.each_row(part, [&](int at, int) {
            float *all = queries + (size_t)at * wide_stride;
            int row = part.begin + at;
            size_t angles = ((size_t)std::max(layer.angles, 0) * pass.angles + position(row)) * half;
            if (shape.head_norm == 2) {
                kernels.rms_norm(all, layer.query_norm.weight.get(), shape.epsilon, query, all);
                kernels.rms_norm(all + query, layer.key_norm.weight.get(), shape.epsilon, key, all + query);
            }
            for (int head = 0; head < shape.heads + shape.key_heads; head++) {
                float *one = all + head * shape.head_size;
                const Norm &norm = head < shape.heads ? layer.query_norm : layer.key_norm;
                if (shape.head_norm == 1) kernels.rms_norm(one, norm.weight.get(), shape.epsilon, shape.head_size, one);
                if (layer.angles >= 0) kernels.rotate(one, pass.cosines + angles, pass.sines + angles, half);
            }
            write(number, row, all + query, all + query + key);
        });
    }

    void write(int layer, int row, const float *keys, const float *values) {
        int at = position(row), size = slots.size;
        uint8_t *block = slots.layer(layer) + place[row].first->slot * slots.slot_stride + at / KEYS * slots.block_stride;
        for (int head = 0; head < slots.heads; head++)
            kernels.keep(keys + head * size, values + head * size, size, slots.format, at % KEYS,
                         block + head * head_bytes(slots.format, size));
    }

    void attend(const Part &part, int number) {
        struct Piece {
            const Span *span;
            int head, begin, end;
        };
        int heads_per_key = shape.heads / shape.key_heads;
        Cache cache = {slots.layer(number), slots.slot_stride, slots.block_stride, shape.head_size, slots.blocks, slots.format};
        Sight sight = {shape.attention_scale, shape.attention_cap, network.layers[number].window};
        auto attend_piece = [&](const Piece &piece, int thread) {
            kernels.attend(&cache, piece.span, piece.head, piece.begin, piece.end, room.queries.get(), wide_stride, heads_per_key, &sight,
                           room.scores[thread].get(), room.mixed.get(), query_stride);
        };
        std::vector<Piece> pieces;
        // Whole groups of queries, for as few rows as there can be.
        int step = QUERIES / std::gcd((int)QUERIES, heads_per_key);
        for (int index = 0; index < pass.spans; index++) {
            const Span &span = pass.span[index];
            int first = std::max(part.begin - span.first, 0), last = std::min(part.end - span.first, span.count);
            for (int head = 0; head < shape.key_heads && part.alone; head++)
                for (int begin = first; begin < last; begin += step)
                    attend_piece({&span, head, begin, std::min(last, begin + step)}, part.thread);
            for (int begin = first; begin < last && !part.alone; begin += step)
                for (int head = 0; head < shape.key_heads; head++)
                    pieces.push_back({&span, head, begin, std::min(last, begin + step)});
        }
        // The longest come last in a prompt: taken first, they keep nobody waiting at the end.
        if (!part.alone)
            network.threads->each((int)pieces.size(), [&](int at, int thread) { attend_piece(pieces[pieces.size() - 1 - at], thread); });
    }

    // What `stack` makes of rows is added to the states: at once, or after a norm or a multiplication; or where it is to be `later`, put
    // beside them as it is to be added.
    void add(const Part &part, int number, int first, const Stack &stack, const Rows &rows, const Norm &norm, bool later) {
        if (!later && !norm.weight && shape.residual_scale == 1) {
            multiply(part, number, first, stack, rows, state(part.begin), state_stride, true);
            return;
        }
        multiply(part, number, first, stack, rows, update(part, 0), state_stride, false);
        network.each_row(part, [&](int at, int) {
            float *one = update(part, at);
            if (norm.weight) normalise(one, norm, one);
            for (int i = 0; i < hidden && shape.residual_scale != 1; i++) one[i] *= shape.residual_scale;
            if (!later) add_update(part, at);
        });
    }

    void add_update(const Part &part, int at) {
        float *to = state(part.begin + at);
        const float *one = update(part, at);
        for (int i = 0; i < hidden; i++) to[i] += one[i];
    }

    void activate_all(const Part &part, int number) {
        const Layer &layer = network.layers[number];
        int first = shape.gated ? ADAPTED_GATE : ADAPTED_UP;
        multiply(part, number, first, layer.up, normed_rows(part), part.bench->inner.get(), inner_stride, false);
        network.each_row(part, [&](int at, int thread) {
            const float *from = part.bench->inner.get() + (size_t)at * inner_stride;
            float *to = put(layer.down, part.bench->activated, at, activated_stride, thread);
            kernels.activate(from, shape.gated ? from + inner : nullptr, shape.activation, inner, to);
            network.quantise(part.bench->activated_bytes, layer.down, to, inner, at);
        });
    }

    // The same, one group of numbers that share a scale after another: what is not quantised yet stays in the cache next to the core.
    void activate_by_groups(const Part &part, const Layer &layer) {
        int stride = (int)apart(2 * WIDE);
        float *to = room.one_row[part.thread].get();
        Rows rows = normed_rows(part);
        for (int begin = 0; begin < inner; begin += WIDE) {
            int count = std::min<int>(WIDE, inner - begin);
            for (size_t one = 0; one < layer.up.parts.size(); one++)
                network.multiply_some(layer.up.parts[one], begin / BLOCK, count, rows, part.bench->inner.get() + one * WIDE, stride);
            for (int at = 0; at < part.rows(); at++) {
                const float *from = part.bench->inner.get() + (size_t)at * stride;
                kernels.activate(from, shape.gated ? from + WIDE : nullptr, shape.activation, count, to);
                network.quantise(part.bench->activated_bytes, layer.down, to, inner, at, begin, count);
            }
        }
    }

    // What follows attention in a layer.
    void think(const Part &part, int number) {
        Layer &layer = network.layers[number];
        const float *mixed = room.mixed.get() + (size_t)part.begin * query_stride;
        if (layer.output.integers())
            network.each_row(part, [&](int at, int) {
                network.quantise(part.bench->given_bytes, layer.output, mixed + (size_t)at * query_stride, query, at);
            });
        add(part, number, ADAPTED_OUTPUT, layer.output, rows_of(part.bench->given_bytes, mixed, query_stride, query, part.rows()), layer.after_attention,
            shape.parallel);
        network.each_row(part, [&](int at, int thread) {
            float *normed = put(layer.up, part.bench->normed, at, state_stride, thread);
            normalise(state(part.begin + at), layer.before_inner, normed);
            network.quantise(part.bench->given_bytes, layer.up, normed, hidden, at);
            if (shape.parallel) add_update(part, at);
        });
        if (part.alone && !layer.down.floats() && groups.empty()) activate_by_groups(part, layer);
        else activate_all(part, number);
        const Bench &bench = *part.bench;
        add(part, number, ADAPTED_DOWN, layer.down, rows_of(bench.activated_bytes, bench.activated.get(), activated_stride, inner, part.rows()),
            layer.after_inner, false);
    }

    void end(const Part &part) {
        network.each_row(part, [&](int at, int) {
            int row = part.begin + at;
            normalise(state(row), network.norm, pass.states + (size_t)row * hidden);
        });
    }

    // All threads share each step of a layer.
    void together() {
        Part part = {0, pass.rows, &room.whole, false, 0};
        embed(part);
        for (int number = 0; number < shape.layers; number++) {
            look(part, number);
            attend(part, number);
            think(part, number);
        }
        end(part);
    }

    // Each thread takes some rows through a layer, up to where others need what they left in the cache.
    void apart_from_each_other() {
        int alone = std::min(std::max(pass.rows / (2 * network.threads->count()), LEAST_ALONE) / 32 * 32, MOST_ALONE);
        int parts = (pass.rows + alone - 1) / alone;
        auto each = [&](auto &&body) {
            network.threads->each(parts, [&](int at, int thread) {
                // The last rows of a prompt have most to look at: taken first, they keep nobody waiting at the end.
                int begin = (parts - 1 - at) * alone;
                body(Part{begin, std::min(begin + alone, pass.rows), &room.benches[thread], true, thread});
            });
        };
        each([&](const Part &part) {
            embed(part);
            if (shape.layers) look(part, 0);
        });
        for (int number = 0; number < shape.layers; number++)
            each([&](const Part &part) {
                attend(part, number);
                think(part, number);
                if (number + 1 < shape.layers) look(part, number + 1);
                else end(part);
            });
    }
};

void Network::check(const Slots &slots, const Pass &pass) {
    int rows = 0;
    bool rotary = false;
    for (const Layer &layer : layers) {
        rotary = rotary || layer.angles >= 0;
        if (layer.angles >= pass.kinds) throw std::invalid_argument("angles");
    }
    for (int index = 0; index < pass.spans; index++) {
        const Span &span = pass.span[index];
        bool inside = span.slot >= 0 && span.slot < slots.count && span.count > 0 && span.position >= 0 &&
                      (int64_t)span.position + span.count <= (int64_t)slots.blocks * KEYS;
        bool has_angles = !rotary || span.position + span.count <= pass.angles;
        bool has_positions = !positions || span.position + span.count <= shape.positions;
        if (!inside || !has_angles || !has_positions || span.first != rows) throw std::invalid_argument("span");
        if (pass.adapters && pass.adapters[index] && pass.adapters[index]->layers.size() != layers.size())
            throw std::invalid_argument("adapter");
        rows += span.count;
    }
    if (rows != pass.rows) throw std::invalid_argument("rows");
    for (int row = 0; row < rows; row++)
        if (pass.tokens[row] < 0 || pass.tokens[row] >= shape.vocabulary) throw std::invalid_argument("token");
}

void Network::run(Slots &slots, const Pass &pass) {
    check(slots, pass);
    std::unique_ptr<Room> room = rent(pass.rows);
    size_t needed = ((size_t)slots.blocks * KEYS + slots.size) * QUERIES;
    if (room->score_count < needed || (int)room->scores.size() < threads->count()) {
        room->scores.clear();
        for (int thread = 0; thread < threads->count(); thread++) room->scores.push_back(allocate<float>(needed));
        room->score_count = needed;
    }
    bool is_long = pass.rows >= LEAST_ALONE * threads->count();
    if (is_long) {
        room->benches.resize(threads->count());
        for (Bench &bench : room->benches) grow(bench, MOST_ALONE);
    } else {
        grow(room->whole, pass.rows);
    }
    Run of = {*this, *room, slots, pass};
    of.find_groups();
    size_t widest = 0;
    for (const Group &group : of.groups) widest = std::max<size_t>(widest, apart(group.adapter->widest));
    auto make_low = [&](Bench &bench) {
        if (bench.low_size >= widest * bench.rows) return;
        bench.low = allocate<float>(widest * bench.rows);
        bench.low_size = widest * bench.rows;
    };
    for (Bench &bench : room->benches) make_low(bench);
    make_low(room->whole);
    of.place.resize(pass.rows);
    for (int index = 0; index < pass.spans; index++)
        for (int row = 0; row < pass.span[index].count; row++) of.place[pass.span[index].first + row] = {pass.span + index, row};
    if (is_long) of.apart_from_each_other();
    else of.together();
    give_back(std::move(room));
}
