// Attacks the native core's entry points under the sanitizers: networks of random shapes, with weights of random bytes in every kind
// and format, read random spans, right and wrong ones, on every instruction set, which have to agree on every bit.
//
//   g++ -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
//       benchmarks/native_fuzz.cpp model/native/*.cpp -o native_fuzz   (one line)
//   ./native_fuzz 1800      seconds; prints how many networks it made, and stops at the first finding

#include "../model/native/network.h"
#include "../model/native/scanned.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>

extern "C" {
int topkapi_levels();
const char *topkapi_level_name(int);
void *topkapi_threads_new(int);
int topkapi_network_new(const Shape *, int, void *, void **);
void topkapi_network_free(void *);
int topkapi_network_layer(void *, int, const LayerWeights *);
int topkapi_network_outer(void *, const OuterWeights *);
int64_t topkapi_block_bytes(const Shape *, int);
int topkapi_slots_new(const Shape *, int, int, int, uint8_t *, void **);
void topkapi_slots_free(void *);
int topkapi_run(void *, void *, const Pass *);
int topkapi_logits(void *, const float *, int, float *);
const void *topkapi_kernels(int);
int topkapi_scan(const Scanned *, float *, int32_t *);
int topkapi_scan_totals(const Scanned *, const float *, double *, double *);
int topkapi_scan_collect(const Scanned *, const float *, const uint64_t *, uint64_t, int, int32_t *, int64_t *, float *);
int topkapi_scan_largest(const Scanned *, const int32_t *, float *);
int topkapi_scan_above(const Scanned *, const float *, int32_t *);
int topkapi_scan_draw(const Scanned *, const float *, const int32_t *, const Drawing *, int32_t *);
int topkapi_steps(void *, void *, const Pass *, float *, const Scanned *, float *, int32_t *, const Drawing *, const Ahead *, int32_t *,
                  double *, int32_t *);
}

namespace {

std::mt19937 generator;

int between(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

// Exactly as large as it has to be, so that a byte too far is found.
template <class T> std::vector<T> exact(size_t count) {
    std::vector<T> made(count);
    made.shrink_to_fit();
    return made;
}

struct Weights {
    // A network has GGUF's blocks, or floats that are rounded: rows are quantised for one of them.
    bool blocks = between(0, 1), byte_rows = !blocks && between(0, 1);
    std::vector<std::vector<float>> floats;
    std::vector<std::vector<uint8_t>> bytes;

    const float *vector(int count, bool present = true) {
        if (!present) return nullptr;
        floats.push_back(exact<float>(count));
        for (float &value : floats.back()) value = std::normal_distribution<float>(0, 0.5f)(generator);
        return floats.back().data();
    }

    Source matrix(int outputs, int inputs, bool bias) {
        const int kinds[][3] = {{0, 1, 4}, {1, 1, 2}, {30, 1, 2}, {2, 32, 18}, {3, 32, 20}, {6, 32, 22}, {7, 32, 24}, {8, 32, 34},
                                {12, 256, 144}, {13, 256, 176}, {14, 256, 210}};
        const int *kind;
        do kind = kinds[blocks ? between(0, 10) : between(0, 2)];
        while (inputs % kind[1]);
        const int formats[] = {FLOAT32, BFLOAT16, byte_rows ? INT8_BYTES : INT8_WIDE, byte_rows ? INT4_BYTES : INT4_WIDE};
        Source made = {nullptr, vector(outputs, bias), kind[0], formats[between(0, blocks ? 1 : 3)], outputs, inputs};
        if (kind[0] == 0) {
            made.weights = vector(outputs * inputs);
            return made;
        }
        bytes.push_back(exact<uint8_t>((size_t)outputs * inputs / kind[1] * kind[2]));
        for (uint8_t &value : bytes.back()) value = (uint8_t)between(0, 255);
        made.weights = bytes.back().data();
        return made;
    }
};

int failures = 0;

bool same(float one, float other) { return one == other || (std::isnan(one) && std::isnan(other)); }

// How rows are drawn from, at random.
struct Chances {
    std::vector<float> divisors;
    std::vector<int32_t> kinds;
    std::vector<double> values;
    std::vector<int64_t> places;
    Drawing drawing;

    Chances(int rows, int size)
        : divisors(exact<float>(rows)), kinds(exact<int32_t>(rows * CUTS)), values(exact<double>(rows * CUTS)),
          places(exact<int64_t>(rows * 3)) {
        for (float &divisor : divisors) divisor = std::exp((float)between(-5, 5));
        for (int64_t &place : places) place = (int64_t)generator() << between(0, 21);
        for (size_t cut = 0; cut < kinds.size(); cut++) {
            kinds[cut] = between(-1, cut % CUTS ? 2 : 3);
            values[cut] = kinds[cut] ? between(1, 99) / 100.0 : between(0, size + 1);
        }
        drawing = {divisors.data(), kinds.data(), values.data(), places.data(), (uint64_t)generator() << 32};
    }
};

// Looks through logits in every way; what was found goes to `results`.
void look_through(const std::vector<float> &logits, int rows, int size, int level, void *threads, std::vector<float> &results) {
    std::vector<const float *> each;
    for (int row = 0; row < rows; row++) each.push_back(logits.data() + (size_t)row * size);
    std::vector<float> divisors = exact<float>(rows), floors = exact<float>(rows), best = exact<float>(rows),
                       found = exact<float>(rows), maxima = exact<float>((size_t)rows * ((size + PIECE - 1) / PIECE));
    std::vector<int32_t> first = exact<int32_t>(rows), counts = exact<int32_t>(rows), k = exact<int32_t>(rows);
    std::vector<double> sums = exact<double>(rows), weighted = exact<double>(rows);
    std::vector<uint64_t> keys = exact<uint64_t>(rows);
    for (int row = 0; row < rows; row++) {
        divisors[row] = std::exp((float)between(-5, 5));
        floors[row] = each[row][between(0, size - 1)] / divisors[row];
        k[row] = between(1, size);
        keys[row] = (uint64_t)generator() << 32 | generator();
    }
    Scanned of = {(const Kernels *)topkapi_kernels(level), (Threads *)threads, rows, size, each.data(), divisors.data(), maxima.data()};
    int capacity = between(1, size + 3), failed = topkapi_scan(&of, best.data(), first.data());
    std::vector<int64_t> ids = exact<int64_t>((size_t)rows * capacity);
    std::vector<float> values = exact<float>((size_t)rows * capacity);
    failed |= topkapi_scan_totals(&of, best.data(), sums.data(), weighted.data());
    failed |= topkapi_scan_collect(&of, floors.data(), between(0, 1) ? keys.data() : nullptr, (uint64_t)generator() << 32, capacity,
                                   counts.data(), ids.data(), values.data());
    results.insert(results.end(), counts.begin(), counts.end());
    results.insert(results.end(), values.begin(), values.end());
    failed |= topkapi_scan_largest(&of, k.data(), found.data());
    failed |= topkapi_scan_above(&of, floors.data(), counts.data());
    std::vector<int32_t> tokens = exact<int32_t>(rows);
    Chances chances(rows, size);
    failed |= topkapi_scan_draw(&of, best.data(), first.data(), &chances.drawing, tokens.data());
    for (int row = 0; row < rows; row++) {
        float divided = best[row] / chances.divisors[row];
        bool whole = divided > -HUGE_VALF && divided < HUGE_VALF;
        if (whole != (tokens[row] >= 0 && tokens[row] < size)) printf("drew token %d of %d\n", tokens[row], size), failures++;
        results.push_back((float)tokens[row]);
    }
    if (failed) printf("refused to look through logits\n"), failures++;
    for (auto *more : {&maxima, &found}) results.insert(results.end(), more->begin(), more->end());
    results.insert(results.end(), counts.begin(), counts.end());
    for (int row = 0; row < rows; row++) {
        // What one row's damaged numbers add up to is the same as any other damage.
        bool whole = best[row] > -HUGE_VALF && best[row] < HUGE_VALF;
        results.push_back(whole ? (float)sums[row] : 0);
        results.push_back(whole ? (float)weighted[row] : 0);
        results.push_back((float)first[row]);
    }
}

// Some steps of every slot, or fewer: what was drawn goes to `results`.
void go_ahead(void *network, void *slots, Pass of, int size, int level, void *threads, int positions, std::vector<float> &results) {
    const int rows = of.rows, most = between(1, 5);
    std::vector<Span> spans;
    std::vector<int32_t> read = exact<int32_t>(rows), tokens = exact<int32_t>(most * rows), first = exact<int32_t>(rows);
    bool fits = true;
    for (int row = 0; row < rows; row++) {
        spans.push_back({row, row, 1, between(0, positions - 1)});
        fits = fits && spans.back().position + most <= positions, read[row] = between(0, size - 1);
    }
    std::vector<float> states = exact<float>((size_t)rows * ((Network *)network)->shape.hidden), ones(rows, 1.0f), best = exact<float>(rows),
                       logits = exact<float>((size_t)rows * size), maxima = exact<float>((size_t)rows * ((size + STRIP - 1) / STRIP));
    std::vector<const float *> each;
    for (int row = 0; row < rows; row++) each.push_back(logits.data() + (size_t)row * size);
    of.spans = rows, of.span = spans.data(), of.tokens = read.data(), of.states = states.data(), of.kept = 0;
    Scanned scanned = {(const Kernels *)topkapi_kernels(level), (Threads *)threads, rows, size, each.data(), ones.data(), maxima.data()};
    Chances chances(rows, size);
    std::vector<int32_t> ends = exact<int32_t>(2 * between(0, 2));
    for (size_t at = 0; at < ends.size(); at++) ends[at] = at % 2 ? between(0, size - 1) : between(0, rows - 1);
    std::vector<double> seconds = exact<double>(most);
    int32_t interrupted = between(0, 3) == 0, done = -1;
    Ahead ahead = {most, (int)ends.size() / 2, 60, &interrupted, ends.data()};
    int failed = topkapi_steps(network, slots, &of, logits.data(), &scanned, best.data(), first.data(), &chances.drawing, &ahead,
                               tokens.data(), seconds.data(), &done);
    if ((failed && fits) || done < 0 || done > most) printf("%d steps of %d, %d\n", done, most, failed), failures++;
    results.insert(results.end(), tokens.begin(), tokens.begin() + done * rows);
}

void attack(void *threads) {
    const int sizes[] = {16, 32, 40, 64, 256, 600};
    Shape shape = {};
    shape.key_heads = between(1, 2), shape.heads = shape.key_heads * between(1, 3), shape.head_size = 2 * between(1, 20);
    shape.vocabulary = between(1, 70), shape.hidden = sizes[between(0, 5)], shape.inner = sizes[between(0, 5)];
    shape.layers = between(1, 2), shape.layer_norm = between(0, 1), shape.gated = between(0, 1);
    bool rotary = between(0, 1);
    shape.rotated = rotary ? 2 * between(1, shape.head_size / 2) : 0, shape.head_norm = between(0, 2), shape.epsilon = 1e-5f;
    shape.activation = between(SILU, RELU_SQUARED), shape.parallel = between(0, 3) == 0;
    auto or_none = [](float value, float none) { return between(0, 2) ? none : value; };
    shape.embedding_scale = or_none(3, 1), shape.attention_scale = or_none(2, 0.3f), shape.attention_cap = or_none(2, 0);
    shape.residual_scale = or_none(0.3f, 1), shape.logit_divisor = or_none(4, 1), shape.logit_cap = or_none(3, 0);
    // Sometimes so many rows that each thread takes some through a layer alone.
    int blocks = between(0, 3) ? between(1, 3) : between(8, 9), count = between(1, 3), format = between(CACHE_FLOAT32, CACHE_INT8);
    int positions = blocks * KEYS;
    shape.positions = rotary ? 0 : positions;
    Weights weights;
    weights.floats.reserve(200), weights.bytes.reserve(200);
    int query = shape.heads * shape.head_size, key = shape.key_heads * shape.head_size, hidden = shape.hidden;
    bool bias = between(0, 1);
    std::vector<LayerWeights> layers;
    auto norm = [&](int size, bool present) {
        return NormWeights{weights.vector(size, present), weights.vector(size, present)};
    };
    const int kinds = 2;
    for (int layer = 0; layer < shape.layers; layer++) {
        LayerWeights of = {weights.matrix(query, hidden, bias), weights.matrix(key, hidden, bias), weights.matrix(key, hidden, bias),
                           weights.matrix(hidden, query, bias), {}, weights.matrix(shape.inner, hidden, bias),
                           weights.matrix(hidden, shape.inner, bias), norm(hidden, between(0, 3)), norm(hidden, !between(0, 3)),
                           norm(hidden, between(0, 3)), norm(hidden, !between(0, 3)),
                           norm(shape.head_norm == 2 ? query : shape.head_size, true),
                           norm(shape.head_norm == 2 ? key : shape.head_size, true),
                           between(0, 1) ? 0 : between(1, positions), rotary ? between(-1, kinds - 1) : -1};
        if (shape.gated) of.gate = weights.matrix(shape.inner, hidden, bias);
        layers.push_back(of);
    }
    OuterWeights outer = {{}, weights.matrix(shape.vocabulary, hidden, false), norm(hidden, true),
                          weights.vector(positions * hidden, !rotary), norm(hidden, !between(0, 3))};
    if (between(0, 1)) outer.embedding = weights.matrix(shape.vocabulary, hidden, false);
    const float *cosines = weights.vector(kinds * positions * shape.rotated / 2),
                *sines = weights.vector(kinds * positions * shape.rotated / 2);

    unsigned seed = generator();
    std::vector<float> reference;
    for (int level = 0; level < topkapi_levels(); level++) {
        generator.seed(seed);
        void *network = nullptr, *slots = nullptr;
        int failed = topkapi_network_new(&shape, level, threads, &network);
        for (int layer = 0; layer < shape.layers; layer++) failed |= topkapi_network_layer(network, layer, &layers[layer]);
        failed |= topkapi_network_outer(network, &outer);
        std::vector<uint8_t> memory = exact<uint8_t>((size_t)count * blocks * topkapi_block_bytes(&shape, format));
        std::vector<float> results;
        failed |= topkapi_slots_new(&shape, format, count, blocks, memory.data(), &slots);
        if (failed) printf("refused\n"), failures++;
        for (int pass = 0; pass < 4; pass++) {
            std::vector<Span> spans;
            int rows = 0;
            bool wrong = between(0, 3) == 0;
            for (int slot = 0; slot < count; slot++) {
                int position = between(0, positions - 1), length = between(1, positions - position);
                if (wrong) position += between(-2 * positions, 2 * positions), length += between(-1, 2);
                spans.push_back({wrong ? slot + between(-1, 1) : slot, rows, length, position});
                rows += std::max(0, length);
            }
            std::vector<int32_t> tokens = exact<int32_t>(rows);
            for (int32_t &token : tokens) token = between(0, shape.vocabulary - 1) + (wrong ? between(-1, 1) : 0);
            std::vector<float> states = exact<float>((size_t)rows * hidden), kept = exact<float>((size_t)rows * hidden);
            int32_t kept_layer = between(0, shape.layers - 1);
            Pass of = {rows, (int)spans.size(), spans.data(), tokens.data(), states.data(), cosines, sines, kinds, positions, 1,
                       &kept_layer, kept.data()};
            if (topkapi_run(network, slots, &of)) {
                if (!wrong) printf("refused a pass\n"), failures++;
                continue;
            }
            std::vector<float> scores = exact<float>((size_t)rows * shape.vocabulary);
            topkapi_logits(network, states.data(), rows, scores.data());
            results.insert(results.end(), kept.begin(), kept.end());
            results.insert(results.end(), scores.begin(), scores.end());
            if (rows) {
                // As if the network had overflowed, or something had been ruled out.
                for (int damaged = between(-2, 3); damaged > 0; damaged--)
                    scores[between(0, (int)scores.size() - 1)] = between(0, 1) ? -HUGE_VALF : between(0, 1) ? NAN : HUGE_VALF;
                look_through(scores, rows, shape.vocabulary, level, threads, results);
            }
        }
        Pass each = {};
        each.rows = count, each.cosines = cosines, each.sines = sines, each.kinds = kinds, each.angles = positions;
        go_ahead(network, slots, each, shape.vocabulary, level, threads, positions, results);
        topkapi_slots_free(slots);
        topkapi_network_free(network);
        if (level == 0) reference = results;
        bool equal = reference.size() == results.size();
        for (size_t at = 0; equal && at < results.size(); at++) equal = same(reference[at], results[at]);
        if (!equal) printf("%s differs from %s\n", topkapi_level_name(level), topkapi_level_name(0)), failures++;
    }
    generator.seed(seed + 1);
}

}  // namespace

int main(int count, char **arguments) {
    double seconds = count > 1 ? atof(arguments[1]) : 60;
    generator.seed(count > 2 ? atoi(arguments[2]) : 0);
    void *threads = topkapi_threads_new(3);
    auto began = std::chrono::steady_clock::now();
    int made = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() < seconds && !failures)
        attack(threads), made++;
    printf("%d networks, %d findings\n", made, failures);
    return failures != 0;
}
