#include "rounding.h"

#include "halves.h"

#include <algorithm>
#include <cmath>

namespace {

// Bytes hold from -127 to 127: -128 would be one too large for the plainest instructions.
const float LARGEST = 127;

float clamped(float value, float least, float most) { return std::max(least, std::min(most, value)); }

// The nearest integer, of two as near ones the even one, of a number below 2^22: no more than that is left of it beside so large a one.
// (Unlike the library's, a loop of it becomes vector instructions.)
float nearest(float value) {
    const float large = 12582912;
    return (value + large) - large;
}

// Four bits, a step and an offset for weights in units of the scale: those with the smallest squared error.
void round_nibbles(const float *from, uint8_t *values, uint8_t &step, int8_t &offset) {
    float low = *std::min_element(from, from + GROUP), high = *std::max_element(from, from + GROUP);
    float least_error = INFINITY, range = (high - low) / 15, kept[GROUP] = {};
    // The range is left a little where few weights lie.
    for (int one = std::max(1, (int)(range * 0.7f)); one <= std::min(17, (int)std::ceil(range * 1.05f) + 1); one++) {
        for (int shift = -1; shift <= 1; shift++) {
            float begin = clamped(nearest((low + high) / 2 - 7.5f * one) + shift, -LARGEST, LARGEST), size = (float)one;
            float most = std::min(15, (int)((LARGEST - begin) / size)), inverse = 1 / size, error = 0;
            float tried[GROUP], squares[GROUP];
            for (int i = 0; i < GROUP; i++) {
                tried[i] = clamped(nearest((from[i] - begin) * inverse), 0, most);
                float off = from[i] - (tried[i] * size + begin);
                squares[i] = off * off;
            }
            for (float square : squares) error += square;
            if (error >= least_error) continue;
            least_error = error;
            std::copy(tried, tried + GROUP, kept);
            step = (uint8_t)one, offset = (int8_t)begin;
        }
    }
    for (int i = 0; i < GROUP; i++) values[i] = (uint8_t)kept[i];
}

}  // namespace

WideGroup rounded(const float *from, int count, bool four_bits) {
    WideGroup group = {};
    group.count = rounded_up(count, PIECE);
    float most = 0;
    bool finite = true;
    for (int i = 0; i < count; i++) most = std::max(most, std::fabs(from[i])), finite = finite && std::isfinite(from[i]);
    // A scale that is no number makes damage show in whatever is multiplied.
    group.scale = finite ? half_from_float(most / LARGEST) : 0x7e00;
    float scale = float_from_half(group.scale), inverse = finite && scale > 0 ? 1 / scale : 0, units[WIDE] = {};
    for (int i = 0; i < count && finite; i++) units[i] = clamped(from[i] * inverse, -LARGEST, LARGEST);
    for (int part = 0; part < WIDE / GROUP && four_bits; part++)
        round_nibbles(units + part * GROUP, group.values + part * GROUP, group.steps[part], group.offsets[part]);
    for (int i = 0; i < WIDE && !four_bits; i++) group.values[i] = (uint8_t)(int8_t)nearest(units[i]);
    return group;
}
