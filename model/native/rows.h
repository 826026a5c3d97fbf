// What is computed row by row: norms, activations, positions, and rows of floats as bytes.
#pragma once

#include "core.h"
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

// The sums of a group's bytes, of its first sixteen, and of the rest.
INLINE void put_offsets(int32_t group, int32_t first, int32_t rest, int wide, const Quantised *to) {
    to->offsets[group] = -128 * (first + rest);
    if (wide) return;
    to->half_offsets[2 * group] = -128 * first, to->half_offsets[2 * group + 1] = -128 * rest;
    to->sums[group] = to->scales[group] * (float)(first + rest);
}

static void quantise(const float *from, int32_t inputs, int wide, const Quantised *to) {
    Floats damage = zeros();
    int32_t size = group_of(wide), end = rounded_up(inputs, TILE_INPUTS);
    for (int32_t group = 0; group < groups_of(wide, inputs); group++) {
        int32_t begin = group * size, last = begin + size < inputs ? begin + size : inputs;
        Floats most = zeros();
        for (int32_t at = begin; at < last; at += LANES) {
            Floats x = some_or_all(from + at, last - at);
            // What is no number, or infinite, is seen in the result: zero times it is no number.
            damage = fma(x, zeros(), damage);
            most = largest(most, absolute(x));
        }
        float highest = largest_lane(most);
        Floats inverse = all(highest > 1e-30f ? 127.0f / highest : 0.0f);
        to->scales[group] = highest / 127.0f;
        Integers first = no_integers(), rest = no_integers();
        int32_t at = begin;
        for (; at < last; at += LANES) {
            // Beside what is no number, others may be far too large: sums of bytes stay small all the same.
            Floats x = mul(some_or_all(from + at, last - at), inverse);
            Integers bytes = rounded(least(all(127.0f), largest(x, all(-127.0f))));
            store_bytes(to->bytes + at, bytes);
            if (at == begin) first = bytes;
            else rest = add_integers(rest, bytes);
        }
        for (; at < begin + size && at < end; at += LANES) store_bytes(to->bytes + at, no_integers());
        if (wide) first = add_integers(first, rest);
        put_offsets(group, total_integers(first), wide ? 0 : total_integers(rest), wide, to);
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

