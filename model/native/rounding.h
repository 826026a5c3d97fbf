// Floats rounded to integers with a scale.
#pragma once

#include "core.h"

// Up to 256 weights of one output as bytes, or as four bits each that stand for `value * step + offset`, which are bytes again;
// every 32 have a step and an offset. The scale is in half precision.
struct WideGroup {
    int count;
    uint16_t scale;
    uint8_t values[WIDE], steps[WIDE / GROUP];
    int8_t offsets[WIDE / GROUP];
};

// `count` floats; the group is filled up to a multiple of 64 with what counts as zero.
WideGroup rounded(const float *from, int count, bool four_bits);
