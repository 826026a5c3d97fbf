// Keys and values of one head in the cache: how they are put there and loaded, sixteen numbers at a time, in each format.
#pragma once

#include "core.h"
#include "rows.h"
#include "vectors.h"

// Sixteen numbers from number `at` on as floats, before a scale; `format` is known when this is compiled.
INLINE Floats load_cached(const uint8_t *from, size_t at, const int format) {
    if (format == CACHE_FLOAT16) return load_half((const uint16_t *)from + at);
    if (format == CACHE_INT8) return load_byte_floats((const int8_t *)from + at);
    return load((const float *)from + at);
}
INLINE float one_cached(const uint8_t *from, size_t at, const int format) {
    if (format == CACHE_FLOAT16) return float_from_half(((const uint16_t *)from)[at]);
    if (format == CACHE_INT8) return (float)((const int8_t *)from)[at];
    return ((const float *)from)[at];
}

// The scales of a block of bytes: 16 of keys, then 16 of values.
INLINE const float *cached_scales(const uint8_t *head, int32_t size) { return (const float *)(head + 2 * size * KEYS); }

// `size` floats from `from` as numbers of the cache, `step` of them from one to the next; returns their scale.
INLINE float put_cached(const float *from, int32_t size, const int format, uint8_t *to, int32_t step) {
    float scale = 1.0f;
    Floats inverse = all(1.0f), limit = all(format == CACHE_INT8 ? 127.0f : 65504.0f);
    if (format == CACHE_INT8) {
        Floats most = zeros(), damage = zeros();
        for (int32_t at = 0; at < size; at += LANES) {
            Floats x = some_or_all(from + at, size - at);
            most = largest(most, absolute(x)), damage = fma(x, zeros(), damage);
        }
        float highest = largest_lane(most);
        inverse = all(highest > 1e-30f ? 127.0f / highest : 0.0f);
        // What is no number, or infinite, is seen in whatever is multiplied by the scale.
        scale = highest / 127.0f + total(damage);
    }
    for (int32_t at = 0; at < size; at += LANES) {
        int32_t here = size - at < LANES ? size - at : LANES;
        Floats x = some_or_all(from + at, here);
        // What is too large for half precision stays the largest number of it; what is no number stays none.
        if (format != CACHE_FLOAT32) x = least(limit, largest(sub(zeros(), limit), mul(x, inverse)));
        if (format == CACHE_FLOAT16) {
            uint16_t halves[LANES];
            store_half(halves, x);
            for (int i = 0; i < here; i++) ((uint16_t *)to)[(size_t)(at + i) * step] = halves[i];
        } else if (format == CACHE_INT8) {
            int8_t bytes[LANES];
            store_bytes(bytes, rounded(x));
            for (int i = 0; i < here; i++) ((int8_t *)to)[(size_t)(at + i) * step] = bytes[i];
        } else {
            for (int i = 0; i < here; i++) ((float *)to)[(size_t)(at + i) * step] = from[at + i];
        }
    }
    return scale;
}

INLINE void keep_as(const float *key, const float *value, int32_t size, int32_t position, uint8_t *head, const int format) {
    size_t bytes = cached_bytes(format);
    uint8_t *values = head + size * KEYS * bytes;
    float key_scale = put_cached(key, size, format, head + position * bytes, KEYS);
    float value_scale = put_cached(value, size, format, values + (size_t)position * size * bytes, 1);
    if (format != CACHE_INT8) return;
    float *scales = (float *)cached_scales(head, size);
    scales[position] = key_scale, scales[KEYS + position] = value_scale;
}

static void keep(const float *key, const float *value, int32_t size, int32_t format, int32_t position, uint8_t *head) {
    switch (format) {
    case CACHE_FLOAT16: keep_as(key, value, size, position, head, CACHE_FLOAT16); break;
    case CACHE_INT8: keep_as(key, value, size, position, head, CACHE_INT8); break;
    default: keep_as(key, value, size, position, head, CACHE_FLOAT32);
    }
}
