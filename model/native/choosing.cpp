// A token drawn from each row of logits after the cuts that are asked for most, as model/decoding has them in Python: the same
// tokens, without dozens of small arrays.

#include "network.h"
#include "scanned.h"

#include <chrono>
#include <cmath>

namespace {

// As model/decoding/truncation.py has it: probabilities are added up as whole numbers of these units, and a cut of a whole vocabulary
// looks among the tokens that are no less likely than these, one after another.
const double UNITS = 0x1p50, NO_LESS_LIKELY[] = {1e-4, 1e-5, 1e-6, 0};
const float LOWEST = -3.40282347e38f;
// As model/decoding/choosing.py has it: of many tokens only those whose noise or whose logit stands out are given noise.
const double LOUD = 5.5, MARGIN = 2.5;
enum { FEW = 256, ROOM = 1024 };

// As model/decoding/noise.py has it: SplitMix64, and Gumbel noise of its upper 53 bits.
const uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

uint64_t mixed_but_for_the_end(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    return (x ^ x >> 27) * 0x94D049BB133111EBu;
}

uint64_t mixed(uint64_t x) {
    x = mixed_but_for_the_end(x);
    return x ^ x >> 31;
}

uint64_t key_of(const int64_t *place) {
    uint64_t seed = mixed((uint64_t)place[0] * GOLDEN);
    return mixed(mixed(seed + (uint64_t)place[1] * GOLDEN) + (uint64_t)place[2] * GOLDEN);
}

double gumbel(uint64_t hash) {
    double uniform = std::min(((double)(int64_t)(hash >> 11) + 0.5) * 0x1p-53, 1 - 0x1p-53);
    return -std::log(-std::log(uniform));
}

enum Cut { TOP_K, TOP_P, MIN_P, GREEDY };

// Tokens of a row, ascending.
struct Tokens {
    std::vector<int64_t> ids;
    std::vector<float> logits;
};

// The tokens of one row that are left: all of them, until the first cut.
class Left {
  public:
    Left(const Scanned &scanned, int row, float best)
        : scanned_(scanned), row_(scanned.rows[row]), maxima_(maxima_of(scanned, row)), best_(best),
          divisor_(scanned.divisors[row]) {}

    void cut(int kind, double value) {
        if (kind == TOP_K) most_likely(value >= 1 ? (int)std::min<double>(value, scanned_.size) : 1);
        else if (kind == TOP_P) nucleus(value);
        else keep((float)(best_ + std::log(value)));
    }

    // argmax of logit and noise. A token with neither loud noise nor a high logit cannot have a sum above `reach`.
    int32_t drawn(uint64_t key, uint64_t threshold) {
        double reach = -INFINITY;
        if (whole_ || left_.ids.size() > FEW) {
            reach = log_total() - MARGIN;
            float floor = (float)(reach - LOUD);
            Noise noise = {key, threshold};
            // A hair's breadth, for logits are compared in single precision.
            int32_t found = loudest(whole_ ? collected(floor, &noise) : outstanding(floor, noise), key, reach + 1e-3);
            if (found >= 0) return found;
            if (whole_) keep(LOWEST);
        }
        return loudest(left_, key, -INFINITY);
    }

  private:
    const Scanned &scanned_;
    const float *row_, *maxima_;
    const float best_, divisor_;
    bool whole_ = true;
    Tokens left_;

    // The token with the largest sum, where it is more than `reach`.
    static int32_t loudest(const Tokens &tokens, uint64_t key, double reach) {
        int64_t found = -1;
        for (size_t at = 0; at < tokens.ids.size(); at++) {
            double sum = tokens.logits[at] + gumbel(mixed(key + (uint64_t)tokens.ids[at] * GOLDEN));
            if (sum > reach) reach = sum, found = tokens.ids[at];
        }
        return (int32_t)found;
    }

    Tokens outstanding(float floor, const Noise &noise) const {
        Tokens found;
        for (size_t at = 0; at < left_.ids.size(); at++)
            if (left_.logits[at] >= floor || mixed_but_for_the_end(noise.key + (uint64_t)left_.ids[at] * GOLDEN) >= noise.threshold)
                found.ids.push_back(left_.ids[at]), found.logits.push_back(left_.logits[at]);
        return found;
    }

    double log_total() const {
        double sum = 0, weighted;
        if (whole_) scanned_.kernels->scan_totals(row_, scanned_.size, divisor_, best_, &sum, &weighted);
        else
            for (float logit : left_.logits) sum += std::exp((double)logit - (double)best_);
        return (double)best_ + std::log(sum);
    }

    // Of the whole vocabulary what is at least `floor`, and what has loud noise where there is a `noise`.
    Tokens collected(float floor, const Noise *noise) const {
        Tokens found;
        for (int room = std::min<int>(ROOM, scanned_.size);;) {
            found.ids.resize(room), found.logits.resize(room);
            int count = scanned_.kernels->scan_collect(row_, scanned_.size, divisor_, maxima_, floor, noise, room, found.ids.data(),
                                                       found.logits.data());
            if (count <= room) {
                found.ids.resize(count), found.logits.resize(count);
                return found;
            }
            room = count;
        }
    }

    // Keeps what is at least `floor`; the most likely token always stays.
    void keep(float floor) {
        floor = std::max(std::min(floor, best_), LOWEST);
        if (whole_) {
            left_ = collected(floor, nullptr), whole_ = false;
            return;
        }
        size_t kept = 0;
        for (size_t at = 0; at < left_.ids.size(); at++)
            if (left_.logits[at] >= floor) left_.ids[kept] = left_.ids[at], left_.logits[kept++] = left_.logits[at];
        left_.ids.resize(kept), left_.logits.resize(kept);
    }

    void most_likely(int k) {
        // The k-th largest of the pieces' maxima is a lower bound, above which there is little more than what is looked for.
        if (whole_ && k <= pieces_of(scanned_)) {
            std::vector<float> largest(maxima_, maxima_ + pieces_of(scanned_));
            keep(largest_but(largest, k - 1) / divisor_);
        } else if (whole_) {
            keep(LOWEST);
        }
        if (k >= (int)left_.logits.size()) return;
        std::vector<float> logits = left_.logits;
        keep(largest_but(logits, k - 1));
    }

    void nucleus(double p) {
        double total = log_total();
        for (double probability : NO_LESS_LIKELY) {
            std::vector<float> ordered =
                whole_ ? collected(std::max(std::min((float)(total + std::log(probability)), best_), LOWEST), nullptr).logits : left_.logits;
            std::sort(ordered.begin(), ordered.end(), std::greater<float>());
            int64_t mass = 0;
            for (float logit : ordered) {
                mass += (int64_t)std::nearbyint(std::exp((double)logit - total) * UNITS);
                if ((double)mass >= p * UNITS) return keep(logit);
            }
            if (!whole_) return;
        }
        keep(LOWEST);
    }
};

int32_t drawn(const Scanned &divided, int row, float best, const Drawing &drawing) {
    const int32_t *kinds = drawing.kinds + row * CUTS;
    Left left(divided, row, best);
    for (int cut = 0; cut < CUTS && kinds[cut] >= 0; cut++) left.cut(kinds[cut], drawing.values[row * CUTS + cut]);
    return left.drawn(key_of(drawing.places + 3 * row), drawing.threshold);
}

bool is_end(const Ahead &ahead, const int32_t *tokens) {
    for (int at = 0; at < ahead.ends; at++)
        if (tokens[ahead.end[2 * at]] == ahead.end[2 * at + 1]) return true;
    return false;
}

}  // namespace

extern "C" {

int topkapi_step(void *network, void *slots, const Pass *pass, const int32_t *wanted, float *logits, const Scanned *scanned,
                 float *best, int32_t *first);

// A token for each row of a scan, -1 where there is none to choose or a number is damaged.
int topkapi_scan_draw(const Scanned *scanned, const float *best, const int32_t *first, const Drawing *drawing, int32_t *tokens) {
    Scanned divided = *scanned;
    divided.divisors = drawing->divisors;
    return each_row(divided, 5, [&](int row) {
        float most = best[row] / drawing->divisors[row];
        if (!std::isfinite(most)) tokens[row] = -1;
        else tokens[row] = drawing->kinds[row * CUTS] == GREEDY ? first[row] : drawn(divided, row, most, *drawing);
    });
}

// Steps of rows that read a token each, one after another: what is drawn in one is read in the next. To `tokens` [most][rows] goes
// what was drawn, to `seconds` [most] how long that took from the beginning, to `done` in how many steps every row had something to
// choose. The logits of the last are left in `logits`.
int topkapi_steps(void *network, void *slots, const Pass *pass, float *logits, const Scanned *scanned, float *best, int32_t *first,
                  const Drawing *drawing, const Ahead *ahead, int32_t *tokens, double *seconds, int32_t *done) {
    using std::chrono::steady_clock;
    try {
        const int rows = pass->rows;
        *done = 0;
        if (pass->spans != rows || scanned->count != rows || rows < 1) return 2;
        for (int at = 0; at < ahead->ends; at++)
            if (ahead->end[2 * at] < 0 || ahead->end[2 * at] >= rows) return 2;
        std::vector<Span> spans(pass->span, pass->span + rows);
        std::vector<int32_t> wanted(rows), read(rows);
        std::vector<int64_t> places(drawing->places, drawing->places + 3 * rows);
        for (int row = 0; row < rows; row++) {
            if (spans[row].count != 1) return 2;
            wanted[row] = spans[row].first;
        }
        Pass next = *pass;
        Drawing drawn = *drawing;
        next.span = spans.data(), drawn.places = places.data();
        const auto began = steady_clock::now();
        for (auto before = began; *done < ahead->most;) {
            int32_t *chosen = tokens + (size_t)*done * rows;
            int failure = topkapi_step(network, slots, &next, wanted.data(), logits, scanned, best, first);
            if (!failure) failure = topkapi_scan_draw(scanned, best, first, &drawn, chosen);
            if (failure) return failure;
            for (int row = 0; row < rows; row++)
                if (chosen[row] < 0) return 0;
            const auto now = steady_clock::now();
            const double next_done = std::chrono::duration<double>(now - began + (now - before)).count();
            seconds[(*done)++] = std::chrono::duration<double>(now - began).count();
            if (is_end(*ahead, chosen) || next_done > ahead->seconds || __atomic_load_n(ahead->interrupted, __ATOMIC_RELAXED)) return 0;
            for (int row = 0; row < rows; row++) read[wanted[row]] = chosen[row], spans[row].position++, places[3 * row + 2]++;
            next.tokens = read.data(), before = now;
        }
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (...) {
        return 3;
    }
}
}
