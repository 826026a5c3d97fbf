// Rows of logits that are looked through, as model/native/scanning.py fills it in.
#pragma once

#include "core.h"
#include "threads.h"

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
}
