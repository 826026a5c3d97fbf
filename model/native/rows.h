// What is computed row by row: norms, activations, positions, and rows of floats as bytes.
#pragma once

#include "core.h"
#include "integers.h"
#include "vectors.h"

INLINE Floats some(const float *from, int32_t count) {
    float lanes[LANES] = {0};
    for (int i = 0; i < count; i++) lanes[i] = from[i];
    return load(lanes);
}
INLINE Floats some_or_all(const float *from, int32_t left) { return left >= LANES ? load(from) : some(from, left); }
INLINE void store_some(float *to, Floats x, int32_t left) {
    if (left >= LANES) {
        store(to, x);
        return;
    }
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < left; i++) to[i] = lanes[i];
}

// The largest magnitude of `count` floats; what is no number, or infinite, is seen in `damage`: zero times it is no number.
INLINE float largest_of(const float *from, int32_t count, Floats *damage) {
    Floats most = zeros();
    for (int32_t at = 0; at < count; at += LANES) {
        Floats x = some_or_all(from + at, count - at);
        *damage = fma(x, zeros(), *damage);
        most = largest(most, absolute(x));
    }
    return largest_lane(most);
}

// Sixteen floats times `inverse` as integers up to `limit`: beside what is no number, others may be far too large.
INLINE Integers limited(const float *from, int32_t left, float inverse, float limit) {
    Floats x = mul(some_or_all(from, left), all(inverse));
    return rounded(least(all(limit), largest(x, all(-limit))));
}

static void quantise(const float *from, int32_t inputs, int in_blocks, const Quantised *to) {
    // 256 times 127, so that the higher byte is 127 at most.
    const float limit = 32512.0f;
    Floats damage = zeros();
    int32_t end = rounded_up(inputs, PIECE);
    for (int32_t begin = 0; begin < inputs; begin += WIDE) {
        int32_t last = begin + WIDE < inputs ? begin + WIDE : inputs, filled = begin + WIDE < end ? begin + WIDE : end;
        float most = largest_of(from + begin, last - begin, &damage), inverse = most > 1e-30f ? limit / most : 0.0f;
        float scale = most / limit;
        Integers sums[2] = {no_integers(), no_integers()};
        for (int32_t at = begin; at < filled; at += LANES) {
            Integers x = at < last ? limited(from + at, last - at, inverse, limit) : no_integers();
            store_wide(to->bytes + piece_at(at), to->row % TILE_ROWS, at % PIECE, x, sums);
            if (!in_blocks || at >= rounded_up(inputs, GROUP)) continue;
            int32_t *totals = to->totals + at / LANES;
            *totals = total_integers(x);
            if (at % GROUP) to->sums[at / GROUP] = scale * (float)(totals[-1] + totals[0]);
        }
        to->scales[begin / WIDE] = scale;
        for (int part = 0; part < 2; part++) to->offsets[begin / WIDE * 2 + part] = -128 * total_integers(sums[part]);
    }
    to->scales[0] += total(damage);
}

static void rms_norm(const float *from, const float *weight, float eps, int32_t size, float *to) {
    Floats sum = zeros();
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = some_or_all(from + at, size - at);
        sum = fma(x, x, sum);
    }
    Floats scale = all(1.0f / __builtin_sqrtf(total(sum) / (float)size + eps));
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = mul(some_or_all(from + at, size - at), scale);
        store_some(to + at, mul(x, some_or_all(weight + at, size - at)), size - at);
    }
}

static void layer_norm(const float *from, const float *weight, const float *bias, float eps, int32_t size, float *to) {
    Floats sum = zeros();
    for (int32_t at = 0; at < size; at += LANES) sum = add(sum, some_or_all(from + at, size - at));
    float mean = total(sum) / (float)size;
    sum = zeros();
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = sub(some_or_all(from + at, size - at), all(mean));
        if (size - at < LANES) {
            float lanes[LANES];
            store(lanes, x);
            x = some(lanes, size - at);
        }
        sum = fma(x, x, sum);
    }
    Floats scale = all(1.0f / __builtin_sqrtf(total(sum) / (float)size + eps));
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = mul(sub(some_or_all(from + at, size - at), all(mean)), scale);
        x = fma(x, some_or_all(weight + at, size - at), some_or_all(bias + at, size - at));
        store_some(to + at, x, size - at);
    }
}

INLINE Floats sigmoid(Floats x) { return divide(all(1.0f), add(all(1.0f), exponential(sub(zeros(), x)))); }

static void silu_gate(const float *gate, const float *up, int32_t size, float *to) {
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = some_or_all(gate + at, size - at);
        store_some(to + at, mul(mul(x, sigmoid(x)), some_or_all(up + at, size - at)), size - at);
    }
}

// gelu by tanh is x times the sigmoid of twice the argument of tanh.
static void gelu(const float *from, int32_t size, float *to) {
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = some_or_all(from + at, size - at);
        Floats cubic = fma(mul(mul(x, x), x), all(0.044715f), x);
        store_some(to + at, mul(x, sigmoid(mul(cubic, all(1.5957691216057308f)))), size - at);
    }
}

static void rotate(float *head, const float *cosines, const float *sines, int32_t half) {
    for (int32_t at = 0; at < half; at += LANES) {
        int32_t left = half - at;
        Floats first = some_or_all(head + at, left), second = some_or_all(head + half + at, left);
        Floats cosine = some_or_all(cosines + at, left), sine = some_or_all(sines + at, left);
        store_some(head + at, sub(mul(first, cosine), mul(second, sine)), left);
        store_some(head + half + at, add(mul(second, cosine), mul(first, sine)), left);
    }
}

