// Q3_K and Q6_K: super-blocks of 256 values in 16 groups of 16, each with a scale alone.
//
// The algorithms are those of ggml (MIT licence, ggml-quants.c: make_qx_quants, make_q3_quants,
// quantize_row_q3_K_impl, quantize_row_q6_K_impl and their neighbours), done in lanes.
#pragma once
#include "k_quants.h"

// A group as scale * level, and what its levels came from.
struct SymmetricFit {
    F scale, step;  // level = nearest(step * x)
    F furthest;     // the largest magnitude
    M is_zero;      // all values are too small: no levels
    M is_odd;       // beyond the plain range
};

// The first of the N values that are furthest from zero; +0 if all are zeros.
template <int N> FN F find_furthest(const F *x, F &magnitude) {
    F most = 0.f, least = 0.f;
    UNROLL for (int i = 0; i < N; i++) {
        most = larger(x[i], most);
        least = smaller(x[i], least);
    }
    magnitude = larger(most, -least);
    F found = select(most > -least, most, least);
    if (any((most == -least) & (most > 0.f))) {  // a value and its opposite
        F so_far = 0.f;
        UNROLL for (int i = 0; i < N; i++) {
            F size = absolute(x[i]);
            found = select(size > so_far, x[i], found);
            so_far = larger(size, so_far);
        }
    }
    // NVIDIA's compiler makes a minimum of the comparison with 0, and the minimum of -0 and 0 is -0
    return select(magnitude > 0.f, found, F(0.f));
}

// The values between two bounds, in whatever order these are.
template <int N> FN void clip(const F *x, F one, F other, F *clipped) {
    F low = smaller(one, other), high = larger(one, other);
    UNROLL for (int i = 0; i < N; i++) clipped[i] = smaller(larger(x[i], low), high);
}

// What decides about a step: the sums of w * x * level and of w * level * level. `reached` are the
// values that the levels are of.
template <int N>
FN void sum_levels(const F *reached, const F *w, const F *wx, F step, F &sum_xl, F &sum_l2) {
    sum_xl = sum_l2 = 0.f;
    UNROLL for (int i = 0; i < N; i++) {
        F l = (step * reached[i] + MAGIC) - MAGIC;
        sum_xl = sum_xl + wx[i] * l;
        sum_l2 = sum_l2 + (w[i] * l) * l;
    }
}

// The tries from `first` to `last`, each with the step -(MAX + try / 10) / largest.
template <int N, int MAX>
FN void try_steps(const F *reached, const F *w, const F *wx, F largest, int first, int last,
                  SymmetricFit &fit, F &best) {
    for (int k = first; k <= last; k++) {
        if (k == 0) continue;
        F step = F(-(MAX + 0.1f * k)) / largest, sum_xl, sum_l2;
        sum_levels<N>(reached, w, wx, step, sum_xl, sum_l2);
        M is_better = (sum_l2 > 0.f) & (sum_xl * sum_xl > best * sum_l2);
        F scale = sum_xl / sum_l2;
        fit.scale = select(is_better, scale, fit.scale);
        fit.step = select(is_better, step, fit.step);
        best = select(is_better, scale * sum_xl, best);
    }
}

// Minimizes the weighted squares of x - scale * level over N values and levels -MAX to MAX - 1.
template <int N, int MAX> FN SymmetricFit fit_symmetric(const F *x, const F *w) {
    SymmetricFit fit;
    F largest = find_furthest<N>(x, fit.furthest), wx[N], reached[N], sum_xl, sum_l2;
    fit.is_zero = fit.furthest < TINY_GROUP;
    UNROLL for (int i = 0; i < N; i++) wx[i] = w[i] * x[i];
    // `largest` itself goes to -(MAX + k / 10), and its opposite to MAX + k / 10. Where that is beyond
    // the levels, values are clipped once for several tries: a clipped value is nearest to the last
    // level with each of their steps, as it would be if its level were clipped.
    clip<N>(x, largest, largest * F((1 - MAX) / (MAX - 0.05f)), reached);
    fit.step = F((float)-MAX) / largest;
    sum_levels<N>(reached, w, wx, fit.step, sum_xl, sum_l2);
    fit.scale = select(sum_l2 != 0.f, sum_xl / sum_l2, F(0.f));
    F best = fit.scale * sum_xl;
    try_steps<N, MAX>(x, w, wx, largest, -9, -6, fit, best);
    try_steps<N, MAX>(reached, w, wx, largest, -5, 4, fit, best);
    clip<N>(x, largest * F(MAX / (MAX + 0.7f)), largest * F((1 - MAX) / (MAX + 0.7f)), reached);
    try_steps<N, MAX>(reached, w, wx, largest, 5, 9, fit, best);
    fit.is_odd = !is_finite(fit.scale) & !fit.is_zero;
    fit.scale = select(fit.is_zero, F(0.f), fit.scale);
    return fit;
}

// The nearest of the levels -MAX to MAX - 1, where none can be below -MAX.
template <int MAX> FN F reached_level(F v) {
    return smaller(v + MAGIC, F(MAGIC + (MAX - 1))) - MAGIC;
}

// The same with the squares of the values as weights, and not by tries of the step: up to five rounds
// in which one level at a time moves. `levels` are those that it ends with, from 0 to 2 * MAX - 1.
template <int N, int MAX> FN SymmetricFit fit_moving(const F *x, I *levels) {
    SymmetricFit fit;
    F largest = find_furthest<N>(x, fit.furthest), sum_xl = 0.f, sum_l2 = 0.f, l[N];
    fit.is_zero = fit.furthest < TINY_GROUP;
    fit.step = F((float)-MAX) / largest;
    UNROLL for (int i = 0; i < N; i++) {
        F w = x[i] * x[i];
        l[i] = reached_level<MAX>(fit.step * x[i]);
        sum_xl = sum_xl + (w * x[i]) * l[i];
        sum_l2 = sum_l2 + (w * l[i]) * l[i];
    }
    for (int round = 0; round < 5; round++) {
        M has_moved = false;
        UNROLL for (int i = 0; i < N; i++) {
            F w = x[i] * x[i], wx = w * x[i];
            F xl = sum_xl - wx * l[i], l2 = sum_l2 - (w * l[i]) * l[i];
            F moved = to_float(clamp(nearest((x[i] * l2) / xl), -MAX, MAX - 1));
            F moved_xl = xl + wx * moved, moved_l2 = l2 + (w * moved) * moved;
            M moves = (xl > 0.f) & (moved != l[i]) & (moved_l2 > 0.f);
            moves = moves & ((moved_xl * moved_xl) * sum_l2 > (sum_xl * sum_xl) * moved_l2);
            l[i] = select(moves, moved, l[i]);
            sum_xl = select(moves, moved_xl, sum_xl);
            sum_l2 = select(moves, moved_l2, sum_l2);
            has_moved = has_moved | moves;
        }
        if (!any(has_moved & !fit.is_zero)) break;
    }
    UNROLL for (int i = 0; i < N; i++)
        levels[i] = select(fit.is_zero, I(0), bits(l[i] + MAGIC) - (0x4b400000 - MAX));
    fit.scale = select(sum_l2 > 0.f, sum_xl / sum_l2, F(0.f));
    fit.is_odd = !is_finite(fit.scale) & !fit.is_zero;
    fit.scale = select(fit.is_zero, F(0.f), fit.scale);
    return fit;
}

// The levels of a fit's best step, from 0 to 2 * MAX - 1.
template <int N, int MAX> FN void fitted_levels(const F *x, const SymmetricFit &fit, I *levels) {
    UNROLL for (int i = 0; i < N; i++)
        levels[i] = select(fit.is_zero, I(0), clamp(nearest(fit.step * x[i]), -MAX, MAX - 1) + MAX);
}

// Each of N values as a level of `scale`, from 0 to 2 * MAX - 1. Returns the lanes where it is 0 and
// which keep the levels of their fit instead.
template <int N, int MAX> FN M scaled_levels(const F *x, F furthest, F scale, I *levels) {
    const int LOWEST = 0x4b400000 - MAX;  // the bits of MAGIC - MAX
    if (!any(!(furthest < absolute(scale) * 4e6f))) {
        UNROLL for (int i = 0; i < N; i++) {
            F biased = larger(x[i] / scale + MAGIC, F(MAGIC - MAX));
            levels[i] = bits(smaller(biased, F(MAGIC + (MAX - 1)))) - LOWEST;
        }
        return false;
    }
    UNROLL for (int i = 0; i < N; i++)
        levels[i] = clamp(nearest(x[i] / scale), -MAX, MAX - 1) + MAX;
    return !(scale != 0.f);
}

struct Q3K {
    enum { COLUMNS = 256, BYTES = 110 };

    template <bool WEIGHTED> FN M quantize(const F *x, const float *importance, F, I *words) {
        SymmetricFit fits[16];
        F scales[16], weights[16];
        I fitted[32], scale_levels[16];
        M is_odd = false;
        F spread = WEIGHTED ? F(2.f) * square_sum<256>(x) / F(256.f) : F(0.f);
        for (int j = 0; j < 16; j++) {
            I levels[16];
            if (WEIGHTED) {
                F w[16], sum = 0.f;
                weigh<true, 16>(x + 16 * j, importance + 16 * j, spread, w);
                UNROLL for (int i = 0; i < 16; i++) sum = sum + w[i];
                weights[j] = sum;
                fits[j] = fit_symmetric<16, 4>(x + 16 * j, w);
            } else {
                fits[j] = fit_moving<16, 4>(x + 16 * j, levels);
                for (int k = 0; k < 2; k++)
                    fitted[2 * j + k] = join(levels + 8 * k) | (join(levels + 8 * k + 4) << 4);
            }
            scales[j] = fits[j].scale;
            is_odd = is_odd | fits[j].is_odd;
        }
        I d_bits = half_bits(scale_scales<WEIGHTED>(scales, weights, scale_levels, is_odd));
        is_odd = is_odd | !is_finite_half(d_bits);
        F d = half_value(d_bits);
        for (int k = 0; k < 27; k++) words[k] = 0;
        words[27] = d_bits;
        for (int j = 0; j < 16; j++) {
            I levels[16], kept[16], l = scale_levels[j];
            words[24 + j / 4 % 2] = words[24 + j / 4 % 2] | ((l & 15) << (8 * (j % 4) + 4 * (j / 8)));
            words[26] = words[26] | (shift_right(l, 4) << (8 * (j % 4) + 2 * (j / 4)));
            M keeps = scaled_levels<16, 4>(x + 16 * j, fits[j].furthest, d * to_float(l - 32), levels);
            if (any(keeps)) {
                if (WEIGHTED) fitted_levels<16, 4>(x + 16 * j, fits[j], kept);
                UNROLL for (int i = 0; i < 16; i++) {
                    I l = WEIGHTED ? kept[i]
                          : shift_right(fitted[2 * j + i / 8], 8 * (i % 4) + 4 * (i / 4 % 2)) & 15;
                    levels[i] = select(keeps, l, levels[i]);
                }
            }
            pack_levels(j, levels, words);
        }
        return is_odd;
    }

    // The scale of the scales, and their levels from 0 to 63.
    template <bool WEIGHTED>
    FN F scale_scales(const F *scales, const F *weights, I *levels, M &is_odd) {
        if (WEIGHTED) {
            SymmetricFit fit = fit_symmetric<16, 32>(scales, weights);
            fitted_levels<16, 32>(scales, fit, levels);
            is_odd = is_odd | fit.is_odd;
            return fit.scale;
        }
        F magnitude, largest = find_furthest<16>(scales, magnitude), inverse = F(-32.f) / largest;
        M is_zero = largest == 0.f;
        for (int j = 0; j < 16; j++)
            levels[j] = select(is_zero, I(0), clamp(nearest(inverse * scales[j]), -32, 31) + 32);
        return select(is_zero, F(0.f), F(1.f) / inverse);
    }

    // The levels of group j: the upper of their three bits, and after all those the lower two.
    FN void pack_levels(int j, const I *levels, I *words) {
        I *ones = words + 4 * (j % 2), *twos = words + 8 + 8 * (j / 8) + 4 * (j % 2);
        UNROLL for (int k = 0; k < 4; k++) {
            I four = join(levels + 4 * k);
            ones[k] = ones[k] | ((shift_right(four, 2) & 0x01010101) << j / 2);
            twos[k] = twos[k] | ((four & 0x03030303) << 2 * (j / 2 % 4));
        }
    }
};

struct Q6K {
    enum { COLUMNS = 256, BYTES = 210 };

    template <bool WEIGHTED> FN M quantize(const F *x, const float *importance, F, I *words) {
        F scales[16], furthest[16], largest = 0.f, magnitude = 0.f;
        M is_odd = false;
        for (int j = 0; j < 16; j++) {
            SymmetricFit fit = fit_group<WEIGHTED>(x, importance, j);
            scales[j] = fit.scale;
            furthest[j] = fit.furthest;
            is_odd = is_odd | fit.is_odd;
            F size = absolute(fit.scale);
            largest = select(size > magnitude, fit.scale, largest);
            magnitude = larger(size, magnitude);
        }
        M is_zero = magnitude < TINY_GROUP;
        F inverse = F(-128.f) / largest;
        I d_bits = half_bits(F(1.f) / inverse);
        is_odd = (is_odd | !is_finite_half(d_bits)) & !is_zero;
        F d = half_value(d_bits);
        for (int k = 0; k < 52; k++) words[k] = 0;
        for (int j = 0; j < 16; j++) {
            I scale = smaller(nearest(inverse * scales[j]), I(127)), levels[16];
            words[48 + j / 4] = words[48 + j / 4] | ((scale & 255) << 8 * (j % 4));
            scale = ((scale & 255) ^ 128) - 128;  // ggml has it in a signed byte
            M keeps = scaled_levels<16, 32>(x + 16 * j, furthest[j], d * to_float(scale), levels);
            if (any(keeps)) {
                I kept[16];  // this is rare, so the best step is not kept but found again
                SymmetricFit fit = fit_group<WEIGHTED>(x, importance, j);
                fitted_levels<16, 32>(x + 16 * j, fit, kept);
                UNROLL for (int i = 0; i < 16; i++) levels[i] = select(keeps, kept[i], levels[i]);
            }
            pack_levels(j, levels, words);
        }
        words[52] = d_bits;
        for (int k = 0; k < 53; k++) words[k] = select(is_zero, I(0), words[k]);
        return is_odd;
    }

    template <bool WEIGHTED> FN SymmetricFit fit_group(const F *x, const float *importance, int j) {
        F w[16];
        UNROLL for (int i = 0; i < 16; i++) {
            F value = x[16 * j + i];
            w[i] = WEIGHTED ? F(importance[16 * j + i]) : value * value;
        }
        return fit_symmetric<16, 32>(x + 16 * j, w);
    }

    // The levels of group j: their lower four bits, and after all those the upper two.
    FN void pack_levels(int j, const I *levels, I *words) {
        // 128 values are four runs of 32; a byte holds one of each of the runs
        const int run = j / 2 % 4;
        I *fours = words + 16 * (j / 8) + 8 * (run % 2) + 4 * (j % 2);
        I *twos = words + 32 + 8 * (j / 8) + 4 * (j % 2);
        UNROLL for (int k = 0; k < 4; k++) {
            I four = join(levels + 4 * k);
            fours[k] = fours[k] | ((four & 0x0f0f0f0f) << 4 * (run / 2));
            twos[k] = twos[k] | ((shift_right(four, 4) & 0x03030303) << 2 * run);
        }
    }
};
