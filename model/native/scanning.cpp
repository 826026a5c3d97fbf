// The C interface to look through rows of logits, which model/native/scanning.py calls: each function goes over rows on threads.

#include "network.h"
#include "scanned.h"

#include <string.h>
#include <vector>

extern "C" {

int topkapi_run(void *network, void *slots, const Pass *pass);
int topkapi_logits(void *network, const float *states, int rows, float *to);

// The maxima of pieces; the largest logit, no number where there is one that is none, and the first token that has it.
int topkapi_scan(const Scanned *scanned, float *best, int32_t *first) {
    return each_row(*scanned, 1, [&](int row) {
        scanned->kernels->scan(scanned->rows[row], scanned->size, maxima_of(*scanned, row), best + row, first + row);
    });
}

// A whole step: a pass, the logits [rows][size] of the `wanted` rows of the pass, and, with `best`, their scan. Python waits for its
// interpreter once instead of three times.
int topkapi_step(void *network, void *slots, const Pass *pass, const int32_t *wanted, float *logits, const Scanned *scanned,
                 float *best, int32_t *first) {
    int failure = topkapi_run(network, slots, pass);
    if (failure || !scanned->count) return failure;
    try {
        size_t hidden = ((Network *)network)->shape.hidden;
        std::vector<float> states(hidden * scanned->count);
        for (int row = 0; row < scanned->count; row++) {
            if (wanted[row] < 0 || wanted[row] >= pass->rows) return 2;
            memcpy(states.data() + row * hidden, pass->states + wanted[row] * hidden, hidden * sizeof(float));
        }
        failure = topkapi_logits(network, states.data(), scanned->count, logits);
    } catch (...) {
        return 1;
    }
    return failure || !best ? failure : topkapi_scan(scanned, best, first);
}

int topkapi_scan_totals(const Scanned *scanned, const float *best, double *sums, double *weighted) {
    return each_row(*scanned, 5, [&](int row) {
        scanned->kernels->scan_totals(scanned->rows[row], scanned->size, scanned->divisors[row], best[row], sums + row,
                                      weighted + row);
    });
}

// Of each row the tokens at least its floor, and, with `keys`, those with noise above the threshold: ids [count][capacity] and
// values, behind the last one `size` and -inf. More than there is room for are only counted.
int topkapi_scan_collect(const Scanned *scanned, const float *floors, const uint64_t *keys, uint64_t threshold,
                         int capacity, int32_t *counts, int64_t *ids, float *values) {
    return each_row(*scanned, keys ? 5 : 0, [&](int row) {
        Noise noise = {keys ? keys[row] : 0, threshold};
        int64_t *to = ids + (size_t)row * capacity;
        float *values_to = values + (size_t)row * capacity;
        counts[row] = scanned->kernels->scan_collect(
            scanned->rows[row], scanned->size, scanned->divisors[row], maxima_of(*scanned, row), floors[row],
            keys ? &noise : nullptr, capacity, to, values_to);
        for (int at = counts[row]; at < capacity; at++) to[at] = scanned->size, values_to[at] = -__builtin_inff();
    });
}

// The k-th largest logit of each row, undivided; k from 1 to `size`.
int topkapi_scan_largest(const Scanned *scanned, const int32_t *k, float *found) {
    for (int row = 0; row < scanned->count; row++)
        if (k[row] < 1 || k[row] > scanned->size) return 2;
    return each_row(*scanned, 1, [&](int row) {
        // The k-th largest of the pieces' maxima is a lower bound, above which there is little more than what is looked for.
        float floor = -__builtin_inff();
        if (k[row] <= pieces_of(*scanned)) {
            std::vector<float> largest(maxima_of(*scanned, row), maxima_of(*scanned, row) + pieces_of(*scanned));
            floor = largest_but(largest, k[row] - 1);
        }
        std::vector<float> values(k[row] <= pieces_of(*scanned) ? 4096 : scanned->size);
        std::vector<int64_t> ids(values.size());
        while (true) {
            int count = scanned->kernels->scan_collect(scanned->rows[row], scanned->size, 1.0f, maxima_of(*scanned, row), floor,
                                                       nullptr, (int)values.size(), ids.data(), values.data());
            bool all = count <= (int)values.size();
            values.resize(count), ids.resize(count);
            if (all) break;
        }
        found[row] = k[row] <= (int)values.size() ? largest_but(values, k[row] - 1) : __builtin_nanf("");
    });
}

// How many undivided logits of each row are more than a value.
int topkapi_scan_above(const Scanned *scanned, const float *values, int32_t *counts) {
    return each_row(*scanned, 0, [&](int row) {
        counts[row] =
            scanned->kernels->scan_above(scanned->rows[row], scanned->size, maxima_of(*scanned, row), values[row]);
    });
}
}
