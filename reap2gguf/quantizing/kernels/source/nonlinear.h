// IQ4_NL and IQ4_XS: levels of four bits that stand for sixteen values of uneven distance.
//
// The algorithm is that of ggml (MIT licence, ggml-quants.c: quantize_row_iq4_nl_impl), done in lanes.
// Two things make it quick, and neither changes a number:
// - The level next to a value is found by a guess that is at most one too low, and one comparison.
// - ggml rounds all values anew for each of 15 scales, which go from 120 / max to 134 / max. Each
//   next limit between two levels is at least 1.2 times as far from zero as the one before, so over
//   all 15 a value passes at most one limit: it has one of two levels, and both are known before.
#pragma once
#include "k_quants.h"

// The sixteen values, from -127 to 113, plus 128.
#define VALUES_LOW 0x766a5d4f3f2d1801ull
#define VALUES_HIGH 0xf1d9c5b5a6998d81ull

FN F value_of(I level) { return to_float(pick16(VALUES_LOW, VALUES_HIGH, level)) - F(128.f); }

// The number of the value next to x, the upper one of two as near. NaN gives 15, as in ggml.
FN I nearest_level(F x) {
    // in steps of 16 from -4.5, where level 8 begins, no step holds two limits
    F steps = (x + F(4.5f)) * F(1.f / 16);
    F up = steps + from_bits((bits(steps) & (int)0x80000000) | bits(F(0.5f)));
    I lower = bits(larger(smaller(up, F(7.f)), F(-7.f)) + (MAGIC + 7)) & 15;
    F limit = (value_of(lower) + value_of(lower + 1)) * F(0.5f);
    return lower + select(x < limit, I(0), I(1));
}

// A value for all tries: below `limit`, times its scale, it is on the level `near[0]`, else `near[1]`.
struct Choice {
    F limit;
    F xl[2], l2[2];  // weight * level * x, and weight * level * level, of the two
};

FN Choice choose(F x, F w, F largest_step) {
    F farthest = largest_step * x;
    I lower = nearest_level(farthest) - select(farthest >= 0.f, I(1), I(0));
    F low = value_of(lower), high = value_of(lower + 1);
    Choice c;
    c.limit = (low + high) * F(0.5f);
    c.xl[0] = (w * low) * x;
    c.xl[1] = (w * high) * x;
    c.l2[0] = (w * low) * low;
    c.l2[1] = (w * high) * high;
    return c;
}

// The scale of 32 values with the least weighted squares of x - scale * value.
FN F fit_values(const F *x, const F *w) {
    F size = 0.f, farthest = 0.f;
    for (int i = 0; i < 32; i++) {
        M is_farther = absolute(x[i]) > size;
        farthest = select(is_farther, x[i], farthest);
        size = select(is_farther, absolute(x[i]), size);
    }
    F step = F(1.f) / (-farthest / F(-127.f)), sum_xl = 0.f, sum_l2 = 0.f;
    Choice choices[32];
    for (int i = 0; i < 32; i++) {
        F value = value_of(nearest_level(step * x[i])), weighted = w[i] * value;
        sum_xl = sum_xl + weighted * x[i];
        sum_l2 = sum_l2 + weighted * value;
        choices[i] = choose(x[i], w[i], F(-134.f) / farthest);
    }
    F scale = select(sum_l2 > 0.f, sum_xl / sum_l2, F(0.f)), best = scale * sum_xl;
    for (int k = -7; k <= 7; k++) {
        F tried = F((float)(k - 127)) / farthest, xl = 0.f, l2 = 0.f;
        UNROLL for (int i = 0; i < 32; i++) {
            M is_below = tried * x[i] < choices[i].limit;
            xl = xl + select(is_below, choices[i].xl[0], choices[i].xl[1]);
            l2 = l2 + select(is_below, choices[i].l2[0], choices[i].l2[1]);
        }
        M is_better = (l2 > 0.f) & (xl * xl > best * l2);
        scale = select(is_better, xl / l2, scale);
        best = select(is_better, scale * xl, best);
    }
    return select(size < TINY_GROUP, F(0.f), scale);
}

// With importance, values that lie far out count more; without, the large ones do.
template <bool WEIGHTED> FN F fit_block(const F *x, const float *importance, F spread) {
    F w[32];
    for (int i = 0; i < 32; i++)
        w[i] = WEIGHTED ? F(importance[i]) * sqrt_of(spread + x[i] * x[i]) : x[i] * x[i];
    return fit_values(x, w);
}

// 32 levels as 16 bytes: the first half in the low four bits.
FN void pack_nearest(const F *x, F step, I *words) {
    for (int k = 0; k < 4; k++) {
        words[k] = 0;
        UNROLL for (int i = 0; i < 4; i++) {
            I low = nearest_level(step * x[4 * k + i]), high = nearest_level(step * x[4 * k + i + 16]);
            words[k] = words[k] | ((low | (high << 4)) << 8 * i);
        }
    }
}

struct IQ4NL {
    enum { COLUMNS = 32, BYTES = 18 };

    template <bool WEIGHTED> FN M quantize(const F *x, const float *importance, F, I *words) {
        F sum = square_sum<32>(x), scale = fit_block<WEIGHTED>(x, importance, sum * F(2.f / 32));
        I levels[4], d = half_bits(scale);
        pack_nearest(x, inverse_or_zero(scale), levels);
        pack_after_half<4>(d, levels, words);
        return !(is_finite(sum) & is_finite_half(d));
    }
};

struct IQ4XS {
    enum { COLUMNS = 256, BYTES = 136 };

    template <bool WEIGHTED> FN M quantize(const F *x, const float *importance, F, I *words) {
        F sum = square_sum<256>(x), scales[8], largest = 0.f, size = 0.f;
        for (int j = 0; j < 8; j++) {
            scales[j] = fit_block<WEIGHTED>(x + 32 * j, importance + 32 * j, sum * F(2.f / 256));
            M is_larger = absolute(scales[j]) > size;
            largest = select(is_larger, scales[j], largest);
            size = select(is_larger, absolute(scales[j]), size);
        }
        F scale = -largest / F(32.f), step = inverse_or_zero(scale);
        I d = half_bits(scale), high_bits = 0, low_bits = 0;
        for (int j = 0; j < 8; j++) {
            I level = clamp(nearest(step * scales[j]), -32, 31);
            pack_nearest(x + 32 * j, inverse_or_zero(scale * to_float(level)), words + 2 + 4 * j);
            level = level + 32;
            low_bits = low_bits | ((level & 15) << 4 * j);
            high_bits = high_bits | (shift_right(level, 4) << 2 * j);
        }
        words[0] = d | (high_bits << 16);
        words[1] = low_bits;
        return !(is_finite(sum) & is_finite_half(d));
    }
};
