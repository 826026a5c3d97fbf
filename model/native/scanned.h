// Rows of logits that are looked through, as model/native/scanning.py fills it in.
#pragma once

#include "core.h"
#include "threads.h"

#include <algorithm>
#include <functional>
#include <new>
#include <vector>

extern "C" {

// `rows` of logits, [size] each; what they are divided by, [count], and the maxima of their pieces,
// [count][size / STRIP, rounded up].
struct Scanned {
    const Kernels *kernels;
    Threads *threads;
    int32_t count, size;
    const float *const *rows;
    const float *divisors;
    float *maxima;
};

// The most cuts of a row before a token is drawn from it.
enum { CUTS = 3 };

// How a token is drawn from each row: what its logits are divided by, [rows]; the cuts, [rows][CUTS], negative behind the last one, and
// what each is given; the noise's seed, sequence and position, [rows][3], and from which hash on it is loud.
struct Drawing {
    const float *divisors;
    const int32_t *kinds;
    const double *values;
    const int64_t *places;
    uint64_t threshold;
};

// How far to go on: for at most so many steps, of which none begins that would be done after so many seconds, nor any after `interrupted`
// is set, or after a row has drawn a token that ends it: `end` are rows and tokens, [ends][2].
struct Ahead {
    int32_t most, ends;
    double seconds;
    const int32_t *interrupted, *end;
};
}

inline int pieces_of(const Scanned &scanned) { return (scanned.size + STRIP - 1) / STRIP; }
inline float *maxima_of(const Scanned &scanned, int row) { return scanned.maxima + (size_t)row * pieces_of(scanned); }

// The largest number but for so many larger ones.
inline float largest_but(std::vector<float> &numbers, int count) {
    std::nth_element(numbers.begin(), numbers.begin() + count, numbers.end(), std::greater<float>());
    return numbers[count];
}

// `body(row)` for each row, whose logits take `cost` times as long as reading them does. Little work is not shared: on a busy
// machine a thread takes longer to come.
template <class F> int each_row(const Scanned &scanned, int cost, F &&body) {
    const int64_t SHARED = 1 << 20;
    try {
        if (scanned.count < 0 || scanned.size < 1) return 2;
        if ((int64_t)scanned.count * scanned.size * cost < SHARED) {
            for (int row = 0; row < scanned.count; row++) body(row);
            return 0;
        }
        bool failed = false;
        // An exception must not leave a thread.
        scanned.threads->each(scanned.count, [&](int row, int) {
            try {
                body(row);
            } catch (...) {
                failed = true;
            }
        });
        return failed ? 1 : 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (...) {
        return 3;
    }
}
