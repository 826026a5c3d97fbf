// The kernels, written once over the sixteen lanes of vectors.h; each kernels_*.cpp compiles them for one instruction set.
// The sums of a row are added in one order whatever other rows are computed, on however many threads, by whichever instructions.
#pragma once

#include "attention.h"
#include "products.h"
#include "rows.h"
#include "scanning.h"

#define KERNELS(variable, title)                                                                                       \
    extern "C" const Kernels variable = {title, FLIP, multiply, quantise, rms_norm, layer_norm,                          \
                                         activate, bound,    rotate,   keep, attend,   scan, scan_totals, scan_collect, scan_above}
