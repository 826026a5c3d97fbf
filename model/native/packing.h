// Matrices in the form that the kernels want, made from weights as they are stored.
#pragma once

#include "core.h"
#include "memory.h"
#include "threads.h"

#include <vector>

// What weights are stored as, by GGUF's numbers for it.
enum Kind {
    STORED_FLOAT32 = 0,
    STORED_FLOAT16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    STORED_BFLOAT16 = 30
};

extern "C" {
// Weights as they are stored, `[outputs][inputs]`, with a bias or none, and the format that they are to be held in. Blocks of GGUF
// have one format that holds what is in them: `format` is not looked at.
struct Source {
    const void *weights;
    const float *bias;
    int32_t kind, format, outputs, inputs;
};
}

// A matrix whose weights lie in `Weights`, which has to outlive it.
struct OwnMatrix : Matrix {
    Memory<float> own_bias;
};

// Raises std::invalid_argument for a kind that is not known.
OwnMatrix packed(const Source &source, int flip, Weights &weights, Threads &threads);

// One row of a matrix as floats, `[inputs]`, of which the last may stand for nothing.
void read_row(const Matrix &matrix, int flip, int row, float *to, int inputs);
