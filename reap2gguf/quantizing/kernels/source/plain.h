// Q8_0, Q4_0, Q5_0, Q4_1 and Q5_1: blocks of 32 values with one scale, or a scale and a minimum.
//
// The algorithms are those of ggml (MIT licence, ggml-quants.c: quantize_row_q8_0_ref,
// quantize_row_q4_0_ref, quantize_row_q4_0_impl and their neighbours), done in lanes.
#pragma once
#include "symmetric_k.h"

// Yes where a value is none: 0 times it is not 0.
FN M has_beyond(const F *x) {
    F sum = 0.f;
    for (int i = 0; i < 32; i++) sum = sum + x[i] * F(0.f);
    return !(sum == 0.f);
}

// 32 levels of up to five bits as 16 bytes, the first half in the low four bits of each; `fifth` gets
// the fifth bits.
FN void pack_halves(const I *levels, I *words, I &fifth) {
    fifth = 0;
    for (int i = 0; i < 32; i++) fifth = fifth | (shift_right(levels[i], 4) << i);
    for (int k = 0; k < 4; k++) {
        words[k] = 0;
        UNROLL for (int i = 0; i < 4; i++) {
            I low = levels[4 * k + i] & 15, high = levels[4 * k + i + 16] & 15;
            words[k] = words[k] | ((low | (high << 4)) << 8 * i);
        }
    }
}

// Signed bytes, the nearest to x / scale, halves away from zero. ggml does not weigh them.
struct Q8 {
    enum { COLUMNS = 32, BYTES = 34 };

    template <bool WEIGHTED> FN M quantize(const F *x, const float *, F, I *words) {
        F largest = 0.f;
        for (int i = 0; i < 32; i++) largest = larger(largest, absolute(x[i]));
        F scale = largest / F(127.f), step = inverse_or_zero(scale);
        I levels[8], d = half_bits(scale);
        for (int k = 0; k < 8; k++) {
            levels[k] = 0;
            UNROLL for (int i = 0; i < 4; i++) {
                F wanted = step * x[4 * k + i], size = absolute(wanted), even = (size + MAGIC) - MAGIC;
                F rounded = even + select(size - even == F(0.5f), F(1.f), F(0.f));
                I byte = bits(select(wanted < 0.f, -rounded, rounded) + MAGIC) & 255;
                levels[k] = levels[k] | (byte << 8 * i);
            }
        }
        pack_after_half<8>(d, levels, words);
        return has_beyond(x) | !(largest * step < F(200.f)) | !is_finite_half(d);
    }
};

// Q4_0 and Q5_0, levels from 0 to 2 * MAX - 1 of (level - MAX) * scale.
template <int MAX> struct Symmetric {
    enum { COLUMNS = 32, BYTES = MAX == 8 ? 18 : 22, USES_ROW = 1 };

    template <bool WEIGHTED>
    FN M quantize(const F *x, const float *importance, F mean_square, I *words) {
        I levels[32], packed[5], fifth;
        F scale;
        M is_odd;
        if (WEIGHTED) {
            F w[32];
            weigh<true, 32>(x, importance, mean_square, w);
            SymmetricFit fit = fit_symmetric<32, MAX>(x, w);
            for (int i = 0; i < 32; i++)
                levels[i] = select(fit.is_zero, I(0),
                                   clamp(nearest(fit.step * x[i]), -MAX, MAX - 1) + MAX);
            scale = fit.scale;
            is_odd = !is_finite(mean_square);
        } else {
            F size, step;
            scale = find_furthest<32>(x, size) / F((float)-MAX);
            step = inverse_or_zero(scale);
            for (int i = 0; i < 32; i++)
                levels[i] = smaller(truncate(step * x[i] + F(MAX + 0.5f)), I(2 * MAX - 1));
            is_odd = has_beyond(x) | !(size * absolute(step) < F(100.f));
        }
        I d = half_bits(scale);
        pack_halves(levels, MAX == 8 ? packed : packed + 1, fifth);
        packed[MAX == 8 ? 4 : 0] = fifth;
        pack_after_half<MAX == 8 ? 4 : 5>(d, packed, words);
        return is_odd | !is_finite_half(d);
    }
};

// Q4_1 and Q5_1, levels from 0 to MAX of level * scale + minimum.
template <int MAX> struct Affine {
    enum { COLUMNS = 32, BYTES = MAX == 15 ? 20 : 24, USES_ROW = 1 };

    template <bool WEIGHTED>
    FN M quantize(const F *x, const float *importance, F mean_square, I *words) {
        I levels[32], fifth;
        F scale, minimum;
        M is_odd;
        if (WEIGHTED) {
            F w[32];
            weigh<true, 32>(x, importance, mean_square, w);
            AffineFit fit = fit_affine<32, MAX>(x, w, -0.9f, 0.05f, 36);
            for (int i = 0; i < 32; i++) {
                I level = clamp(nearest(fit.step * (x[i] - fit.base)), 0, MAX);
                levels[i] = select(fit.is_flat, I(0), level);
            }
            scale = fit.scale;
            minimum = fit.low;
            is_odd = fit.is_odd | !is_finite(mean_square);
        } else {
            F high = x[0];
            minimum = x[0];
            for (int i = 1; i < 32; i++) {
                minimum = smaller(x[i], minimum);
                high = larger(x[i], high);
            }
            scale = (high - minimum) / F((float)MAX);
            F step = inverse_or_zero(scale);
            for (int i = 0; i < 32; i++)
                levels[i] = smaller(truncate((x[i] - minimum) * step + F(0.5f)), I(MAX));
            is_odd = has_beyond(x) | !((high - minimum) * step < F(100.f));
        }
        I d = half_bits(scale), m = half_bits(minimum);
        words[0] = d | (m << 16);
        pack_halves(levels, MAX == 15 ? words + 1 : words + 2, fifth);
        if (MAX != 15) words[1] = fifth;
        return is_odd | !(is_finite_half(d) & is_finite_half(m));
    }
};
