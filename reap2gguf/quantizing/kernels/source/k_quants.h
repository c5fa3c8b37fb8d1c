// Q2_K, Q4_K and Q5_K: super-blocks of 256 values in sub-blocks, each with a scale and a minimum.
//
// The algorithms are those of ggml (MIT licence, ggml-quants.c: make_qkx3_quants, make_qkx2_quants,
// make_qp_quants, quantize_row_q4_K_impl and its neighbours), done in lanes.
#pragma once
#include "numbers.h"

#define TINY_GROUP 1e-15f  // a group of smaller values is zero

// A sub-block as scale * level + low, and what the levels of its best try came from.
struct AffineFit {
    F scale, low;
    F step, base;  // level = nearest(step * (x - base))
    M is_flat;     // all values are alike: no levels
    M is_odd;      // beyond the plain range
};

// Minimizes the weighted squares (ABSOLUTE: magnitudes) of x - (scale * level + low) over N values and
// levels 0 to MAX.
// Each try begins with a step of its own, (first + delta * try + MAX) / range. What a try finds
// for `low` is where the next begins.
template <int N, int MAX, bool ABSOLUTE = false>
FN AffineFit fit_affine(const F *x, const F *w, float first, float delta, int last_try) {
    F low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    UNROLL for (int i = 1; i < N; i++) {
        low = smaller(x[i], low);
        high = larger(x[i], high);
        sum_w = sum_w + w[i];
        sum_x = sum_x + w[i] * x[i];
    }
    F lowest = low;
    low = select(low > 0.f, F(0.f), low);
    AffineFit fit;
    fit.is_flat = high <= low;
    fit.step = F((float)MAX) / (high - low);
    fit.scale = F(1.f) / fit.step;
    fit.base = low;
    // the two extremes bound what all values are rounded from
    fit.is_odd = !(is_roundable(fit.step * (high - low)) & is_roundable(fit.step * (lowest - low)));
    F least = 0.f;
    UNROLL for (int i = 0; i < N; i++) {
        F difference = fit.scale * level<MAX>(fit.step * (x[i] - low)) + low - x[i];
        least = least + w[i] * (ABSOLUTE ? absolute(difference) : difference * difference);
    }
    for (int k = 0; k <= last_try; k++) {
        F step = F((first + delta * k) + MAX) / (high - low);
        fit.is_odd = fit.is_odd | !(is_roundable(step * (high - low)) & is_roundable(step * (lowest - low)));
        F levels[N], sum_l = 0.f, sum_l2 = 0.f, sum_xl = 0.f;
        UNROLL for (int i = 0; i < N; i++) {
            F l = level<MAX>(step * (x[i] - low)), wl = w[i] * l;
            levels[i] = l;
            sum_l = sum_l + wl;
            sum_l2 = sum_l2 + wl * l;
            sum_xl = sum_xl + wl * x[i];
        }
        F determinant = sum_w * sum_l2 - sum_l * sum_l;
        F fitted_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        F scale = select(fitted_low > 0.f, sum_xl / sum_l2,
                         (sum_w * sum_xl - sum_x * sum_l) / determinant);
        fitted_low = select(fitted_low > 0.f, F(0.f), fitted_low);
        F error = 0.f;
        UNROLL for (int i = 0; i < N; i++) {
            F difference = scale * levels[i] + fitted_low - x[i];
            error = error + w[i] * (ABSOLUTE ? absolute(difference) : difference * difference);
        }
        M is_better = (determinant > 0.f) & (error < least);
        least = select(is_better, error, least);
        fit.scale = select(is_better, scale, fit.scale);
        fit.step = select(is_better, step, fit.step);
        fit.base = select(is_better, low, fit.base);
        low = select(is_better, fitted_low, low);
    }
    fit.scale = select(fit.is_flat, F(0.f), fit.scale);
    fit.low = low;
    fit.is_odd = fit.is_odd & !fit.is_flat;
    return fit;
}

// Integers from 0 to MAX for N scales that are not negative, x = scale * level, by weighted squares:
// some tries, then up to five rounds in which one level at a time moves. `is_odd` gains the lanes
// beyond the plain range.
template <int N, int MAX> FN F fit_scales(const F *x, const F *w, F *levels, M &is_odd) {
    F largest = 0.f, product = 0.f;
    M is_negative = false;
    for (int i = 0; i < N; i++) {
        largest = larger(largest, x[i]);
        is_negative = is_negative | !(x[i] >= 0.f);
        product = product + x[i] * 0.f;  // NaN if any is not finite
    }
    M is_zero = largest < TINY_GROUP;
    M beyond = is_negative | !(product == 0.f);
    F step = F((float)MAX) / largest, scale = F(1.f) / step, least = 0.f;
    for (int i = 0; i < N; i++) {
        F l = (step * x[i] + MAGIC) - MAGIC, difference = x[i] - scale * l;
        least = least + (w[i] * difference) * difference;
    }
    for (int k = -4; k <= 4; k++) {
        if (k == 0) continue;
        F tried = F(0.1f * k + MAX) / largest, tried_scale = F(1.f) / tried, error = 0.f;
        for (int i = 0; i < N; i++) {
            F l = smaller(tried * x[i] + MAGIC, F(MAGIC + MAX)) - MAGIC;
            F difference = x[i] - tried_scale * l;
            error = error + (w[i] * difference) * difference;
        }
        M is_better = error < least;
        least = select(is_better, error, least);
        step = select(is_better, tried, step);
    }
    F sum_xl = 0.f, sum_l2 = 0.f;
    for (int i = 0; i < N; i++) {
        F l = smaller(step * x[i] + MAGIC, F(MAGIC + MAX)) - MAGIC;
        levels[i] = l;
        sum_xl = sum_xl + (w[i] * x[i]) * l;
        sum_l2 = sum_l2 + (w[i] * l) * l;
    }
    for (int round = 0; round < 5; round++) {
        M has_moved = false;
        for (int i = 0; i < N; i++) {
            F l = levels[i], wx = w[i] * x[i];
            F xl = sum_xl - wx * l, l2 = sum_l2 - (w[i] * l) * l;
            M moves = (xl > 0.f) & (l2 > 0.f);
            F wanted = (x[i] * l2) / xl;
            beyond = beyond | (moves & !is_roundable(wanted));
            F moved = smaller(wanted + MAGIC, F(MAGIC + MAX)) - MAGIC;
            F moved_xl = xl + wx * moved, moved_l2 = l2 + (w[i] * moved) * moved;
            moves = moves & (moved != l);
            moves = moves & ((moved_xl * moved_xl) * sum_l2 > (sum_xl * sum_xl) * moved_l2);
            levels[i] = select(moves, moved, l);
            sum_xl = select(moves, moved_xl, sum_xl);
            sum_l2 = select(moves, moved_l2, sum_l2);
            has_moved = has_moved | moves;
        }
        if (!any(has_moved)) break;
    }
    for (int i = 0; i < N; i++) levels[i] = select(is_zero, F(0.f), levels[i]);
    // a group of zeros needs none of this, unless it is one because of NaN
    is_odd = is_odd | (beyond & !(is_zero & !is_negative & (product == 0.f)));
    return select(is_zero | !(sum_l2 > 0.f), F(0.f), sum_xl / sum_l2);
}

// As shares of the largest of N scales, without weights: what ggml does where it has no importance.
template <int N, int MAX> FN F share_largest(const F *x, I *levels, M &is_odd) {
    F largest = 0.f;
    for (int i = 0; i < N; i++) largest = larger(x[i], largest);
    F inverse = select(largest > 0.f, F((float)MAX) / largest, F(0.f));
    for (int i = 0; i < N; i++) {
        F wanted = inverse * x[i];
        is_odd = is_odd | !(wanted >= 0.f) | !(wanted < 256.f);  // a byte holds them in ggml
        levels[i] = smaller(nearest(wanted), I(MAX));
    }
    return largest / F((float)MAX);
}

// The scale of N scales, and their levels.
template <bool WEIGHTED, int N, int MAX>
FN F scale_scales(const F *x, const F *w, I *levels, M &is_odd) {
    if (!WEIGHTED) return share_largest<N, MAX>(x, levels, is_odd);
    F found[N], scale = fit_scales<N, MAX>(x, w, found, is_odd);
    for (int j = 0; j < N; j++) levels[j] = bits(found[j] + MAGIC) & 255;
    return scale;
}

// Each of N values as a level from 0 to MAX of scale * level - minus; as its fit has it if scale is 0.
template <int N, int MAX>
FN void final_levels(const F *x, const AffineFit &fit, F scale, F minus, I *levels) {
    M is_scaled = scale != 0.f;
    UNROLL for (int i = 0; i < N; i++) {
        I rounded = clamp(nearest((x[i] + minus) / scale), 0, MAX);
        I fitted = clamp(nearest(fit.step * (x[i] - fit.base)), 0, MAX);
        levels[i] = select(is_scaled, rounded, select(fit.is_flat, I(0), fitted));
    }
}

// The weights of N values: with importance, those that lie far out count more.
template <bool WEIGHTED, int N>
FN void weigh(const F *x, const float *importance, F spread, F *w) {
    UNROLL for (int i = 0; i < N; i++)
        w[i] = WEIGHTED ? F(importance[i]) * sqrt_of(spread + x[i] * x[i]) : spread + absolute(x[i]);
}

// Four levels in the bytes of a word.
FN I join(const I *levels) {
    return levels[0] | (levels[1] << 8) | (levels[2] << 16) | (levels[3] << 24);
}

template <int N> FN F square_sum(const F *x) {
    F sum = 0.f;
    ROLL for (int i = 0; i < N; i++) sum = sum + x[i] * x[i];
    return sum;
}

// Twelve bytes for eight scales and eight minima of six bits each.
FN void pack_six_bits(const I *scales, const I *minima, I *words) {
    words[0] = words[1] = words[2] = 0;
    for (int j = 0; j < 4; j++) {
        I s = scales[j + 4], m = minima[j + 4];
        words[0] = words[0] | ((scales[j] | (shift_right(s, 4) << 6)) << 8 * j);
        words[1] = words[1] | ((minima[j] | (shift_right(m, 4) << 6)) << 8 * j);
        words[2] = words[2] | (((s & 15) | ((m & 15) << 4)) << 8 * j);
    }
}

// Eight sub-blocks of 32. MAX is 15 for Q4_K and 31 for Q5_K.
template <int MAX> struct AffineK {
    enum { COLUMNS = 256, BYTES = MAX == 15 ? 144 : 176 };

    template <bool WEIGHTED> FN M quantize(const F *x, const float *importance, F, I *words) {
        AffineFit fits[8];
        F scales[8], minima[8], weights[8];
        M is_odd = false;
        F spread = F(2.f) * square_sum<256>(x) / F(256.f);
        for (int j = 0; j < 8; j++) {
            F w[32], sum = 0.f;
            if (!WEIGHTED) spread = sqrt_of(square_sum<32>(x + 32 * j) / F(32.f));
            weigh<WEIGHTED, 32>(x + 32 * j, importance + 32 * j, spread, w);
            UNROLL for (int i = 0; i < 32; i++) sum = sum + w[i];
            weights[j] = sum;
            if (WEIGHTED) fits[j] = fit_affine<32, MAX>(x + 32 * j, w, -0.9f, 0.05f, 36);
            else if (MAX == 15) fits[j] = fit_affine<32, MAX>(x + 32 * j, w, -1.f, 0.1f, 20);
            else fits[j] = fit_affine<32, MAX>(x + 32 * j, w, -0.5f, 0.1f, 15);
            scales[j] = fits[j].scale;
            minima[j] = -fits[j].low;
            is_odd = is_odd | fits[j].is_odd;
        }
        I scale_levels[8], minimum_levels[8];
        F d = scale_scales<WEIGHTED, 8, 63>(scales, weights, scale_levels, is_odd);
        F dmin = scale_scales<WEIGHTED, 8, 63>(minima, weights, minimum_levels, is_odd);
        I d_bits = half_bits(d), dmin_bits = half_bits(dmin);
        is_odd = is_odd | !(is_finite_half(d_bits) & is_finite_half(dmin_bits));
        words[0] = d_bits | (dmin_bits << 16);
        pack_six_bits(scale_levels, minimum_levels, words + 1);
        pack_levels(x, fits, half_value(d_bits), half_value(dmin_bits), scale_levels, minimum_levels,
                    words + 4);
        return is_odd;
    }

    // The lower four bits of all levels, and before them the fifth ones.
    FN void pack_levels(const F *x, const AffineFit *fits, F d, F dmin, const I *scales,
                               const I *minima, I *words) {
        I *fifth = words, *fours = MAX == 15 ? words : words + 8;
        if (MAX != 15) for (int k = 0; k < 8; k++) fifth[k] = 0;
        for (int j = 0; j < 8; j++) {
            I levels[32];
            F scale = d * to_float(scales[j]), minus = dmin * to_float(minima[j]);
            final_levels<32, MAX>(x + 32 * j, fits[j], scale, minus, levels);
            I *half_bytes = fours + 8 * (j / 2);
            UNROLL for (int k = 0; k < 8; k++) {
                I four = join(levels + 4 * k), low = four & 0x0f0f0f0f;
                half_bytes[k] = j % 2 ? half_bytes[k] | (low << 4) : low;
                if (MAX != 15) fifth[k] = fifth[k] | ((shift_right(four, 4) & 0x01010101) << j);
            }
        }
    }
};

// Sixteen sub-blocks of 16, levels 0 to 3, and four bits for each scale and each minimum.
struct Q2K {
    enum { COLUMNS = 256, BYTES = 84 };

    template <bool WEIGHTED> FN M quantize(const F *x, const float *importance, F, I *words) {
        AffineFit fits[16];
        F scales[16], minima[16], weights[16];
        M is_odd = false;
        F spread = WEIGHTED ? square_sum<256>(x) / F(256.f) : F(0.f);
        for (int j = 0; j < 16; j++) {
            F w[16], sum = 0.f;
            weigh<WEIGHTED, 16>(x + 16 * j, importance + 16 * j, spread, w);
            UNROLL for (int i = 0; i < 16; i++) sum = sum + w[i];
            weights[j] = sum;
            if (WEIGHTED) fits[j] = fit_affine<16, 3>(x + 16 * j, w, -0.9f, 0.05f, 36);
            else fits[j] = fit_affine<16, 3, true>(x + 16 * j, w, -0.5f, 0.1f, 15);
            scales[j] = fits[j].scale;
            minima[j] = -fits[j].low;
            is_odd = is_odd | fits[j].is_odd;
        }
        I scale_levels[16], minimum_levels[16];
        F d = scale_scales<WEIGHTED, 16, 15>(scales, weights, scale_levels, is_odd);
        F dmin = scale_scales<WEIGHTED, 16, 15>(minima, weights, minimum_levels, is_odd);
        I d_bits = half_bits(d), dmin_bits = half_bits(dmin);
        is_odd = is_odd | !(is_finite_half(d_bits) & is_finite_half(dmin_bits));
        d = half_value(d_bits);
        dmin = half_value(dmin_bits);
        for (int k = 0; k < 20; k++) words[k] = 0;
        words[20] = d_bits | (dmin_bits << 16);
        for (int j = 0; j < 16; j++) {
            I levels[16], both = scale_levels[j] | (minimum_levels[j] << 4);
            words[j / 4] = words[j / 4] | (both << 8 * (j % 4));
            F scale = d * to_float(scale_levels[j]), minus = dmin * to_float(minimum_levels[j]);
            final_levels<16, 3>(x + 16 * j, fits[j], scale, minus, levels);
            // 128 values are four runs of 32; a byte holds one of each of the runs
            I *twos = words + 4 + 8 * (j / 8) + 4 * (j % 2);
            UNROLL for (int k = 0; k < 4; k++)
                twos[k] = twos[k] | (join(levels + 4 * k) << 2 * (j / 2 % 4));
        }
        return is_odd;
    }
};
