// Numbers of sixteen bits and what they are as floats, bit for bit what instructions make of them.
#pragma once

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint16_t half_from_float(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    // Below the smallest normal number: rounded by an addition that leaves no smaller bits.
    if (magnitude < 0x38800000) return (uint16_t)(sign | (bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000));
    uint32_t odd = magnitude >> 13 & 1;
    return (uint16_t)(sign | ((magnitude + 0xfff + odd - 0x38000000) >> 13));
}

INLINE float float_from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    return float_from_bits(sign | bits_of((float)fraction * 0x1p-24f));
}

INLINE uint16_t bfloat_from_float(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float float_from_bfloat(uint16_t stored) { return float_from_bits((uint32_t)stored << 16); }
