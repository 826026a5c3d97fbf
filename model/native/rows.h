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

// As bytes, from -127 to 127, a scale for every 32.
INLINE void quantise_bytes(const float *from, int32_t inputs, const Quantised *to) {
    const float limit = 127.0f;
    Floats damage = zeros();
    for (int32_t begin = 0; begin < rounded_up(inputs, GROUP); begin += GROUP) {
        int32_t count = inputs - begin < GROUP ? inputs - begin : GROUP;
        float most = largest_of(from + begin, count, &damage), inverse = most > 1e-30f ? limit / most : 0.0f;
        Integers sum = no_integers();
        for (int32_t at = 0; at < GROUP; at += LANES) {
            Integers x = at < count ? limited(from + begin + at, count - at, inverse, limit) : no_integers();
            store_bytes(to->bytes + piece_at(begin) + to->row % TILE_ROWS * PIECE + begin % PIECE + at, x);
            sum = add_integers(sum, x);
        }
        to->sums[begin / GROUP] = most / limit;
        to->totals[begin / GROUP * 2 + 1] = total_integers(sum);
        to->totals[begin / GROUP * 2] = -LIFTED * to->totals[begin / GROUP * 2 + 1];
    }
    to->sums[0] += total(damage);
}

static void quantise(const float *from, int32_t inputs, int form, const Quantised *to) {
    if (form == BYTE_ROWS) {
        quantise_bytes(from, inputs, to);
        return;
    }
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
            if (form != BLOCK_ROWS || at >= rounded_up(inputs, GROUP)) continue;
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

// Quotients of polynomials in x squared, times x where they are odd (as in Eigen and XLA): tanh and erf to within some units in the
// last place. Coefficients from the highest on.
INLINE Floats polynomial(Floats squared, const float *coefficients, int count) {
    Floats sum = all(coefficients[0]);
    for (int i = 1; i < count; i++) sum = fma(sum, squared, all(coefficients[i]));
    return sum;
}
INLINE Floats odd_quotient(Floats x, float limit, const float *upper, int count, const float *lower, int lower_count) {
    // The second operand is what remains of one that is no number.
    Floats inside = least(all(limit), largest(all(-limit), x)), squared = mul(inside, inside);
    return divide(mul(inside, polynomial(squared, upper, count)), polynomial(squared, lower, lower_count));
}
INLINE Floats hyperbolic_tangent(Floats x) {
    const float upper[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                           1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f};
    const float lower[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};
    return odd_quotient(x, 9.0f, upper, 7, lower, 4);
}
INLINE Floats error_function(Floats x) {
    const float upper[] = {-2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                           -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
    const float lower[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                           -1.42647390514189e-02f};
    return odd_quotient(x, 4.0f, upper, 7, lower, 5);
}

// GELU by tanh is x times the sigmoid of twice the argument of tanh.
INLINE Floats activated(Floats x, const int activation) {
    if (activation == SILU) return mul(x, sigmoid(x));
    if (activation == RELU_SQUARED) {
        // The second operand is what remains of one that is no number.
        Floats above = largest(zeros(), x);
        return mul(above, above);
    }
    if (activation == GELU) {
        Floats half = mul(x, all(0.5f));
        return fma(half, error_function(mul(x, all(0.70710678118654752f))), half);
    }
    Floats cubic = fma(mul(mul(x, x), x), all(0.044715f), x);
    return mul(x, sigmoid(mul(cubic, all(1.5957691216057308f))));
}

INLINE void activate_as(const float *from, const float *up, int32_t size, float *to, const int activation) {
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = activated(some_or_all(from + at, size - at), activation);
        if (up) x = mul(x, some_or_all(up + at, size - at));
        store_some(to + at, x, size - at);
    }
}

static void activate(const float *from, const float *up, int32_t activation, int32_t size, float *to) {
    switch (activation) {
    case SILU: activate_as(from, up, size, to, SILU); break;
    case GELU: activate_as(from, up, size, to, GELU); break;
    case RELU_SQUARED: activate_as(from, up, size, to, RELU_SQUARED); break;
    default: activate_as(from, up, size, to, GELU_TANH);
    }
}

INLINE Floats capped(Floats x, Floats cap) {
    // What is no number, or infinite, must not become one.
    Floats damage = mul(sub(x, x), all(0.0f));
    return add(mul(hyperbolic_tangent(divide(x, cap)), cap), damage);
}

static void bound(float *scores, int32_t size, float divisor, float cap) {
    for (int32_t at = 0; at < size; at += LANES) {
        Floats x = divide(some_or_all(scores + at, size - at), all(divisor));
        if (cap > 0) x = capped(x, all(cap));
        store_some(scores + at, x, size - at);
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

