// IQ2_S, IQ2_XS and IQ2_XXS: super-blocks of 256 values in blocks of 16 or 32, levels 1, 3 and 5 in
// groups of eight that are points of a grid.
//
// The algorithms are those of ggml (MIT licence, ggml-quants.c: quantize_row_iq2_s_impl,
// quantize_row_iq2_xs_impl, quantize_row_iq2_xxs_impl, make_qp_quants), done in lanes.
#pragma once
#include "codebooks.h"

// The lowest byte of an integer in a float, as ggml keeps levels between its rounds: -1 becomes 255.
FN F low_byte(F level) { return to_float(bits(level + MAGIC) & 255); }

// The nearest integer of at most MAX, without a lower limit, for |v| < ROUNDABLE.
template <int MAX> FN F at_most(F v) { return smaller(v + MAGIC, F(MAGIC + MAX)) - MAGIC; }

// A first scale for values of which some are negative, by levels up to MAX: tries, then up to five
// rounds in which one level at a time moves.
template <int MAX, int N> FN F first_scale(const F *x, const F *w, F low, F high, M wanted, M &is_odd) {
    M beyond = false;
    F step = F((float)MAX) / high, scale = F(1.f) / step, least = 0.f;
    UNROLL for (int i = 0; i < N; i++) {
        F difference = x[i] - scale * low_byte((step * x[i] + MAGIC) - MAGIC);
        least = least + (w[i] * difference) * difference;
    }
    for (int k = -4; k <= 4; k++) {
        if (k == 0) continue;
        F tried = F(0.1f * k + MAX) / high, tried_scale = F(1.f) / tried, error = 0.f;
        beyond = beyond | !(is_roundable(tried * low) & is_roundable(tried * high));
        UNROLL for (int i = 0; i < N; i++) {
            F difference = x[i] - tried_scale * at_most<MAX>(tried * x[i]);
            error = error + (w[i] * difference) * difference;
        }
        M is_better = error < least;
        least = select(is_better, error, least);
        step = select(is_better, tried, step);
    }
    F sum_xl = 0.f, sum_l2 = 0.f, levels[N];
    UNROLL for (int i = 0; i < N; i++) {
        F l = at_most<MAX>(step * x[i]);
        levels[i] = low_byte(l);
        sum_xl = sum_xl + (w[i] * x[i]) * l;
        sum_l2 = sum_l2 + (w[i] * l) * l;
    }
    for (int round = 0; round < 5; round++) {
        M has_moved = false;
        UNROLL for (int i = 0; i < N; i++) {
            F l = levels[i], wx = w[i] * x[i];
            F xl = sum_xl - wx * l, l2 = sum_l2 - (w[i] * l) * l;
            M moves = (xl > 0.f) & (l2 > 0.f);
            F ideal = (x[i] * l2) / xl;
            beyond = beyond | (moves & !is_roundable(ideal));
            F moved = at_most<MAX>(ideal);
            F moved_xl = xl + wx * moved, moved_l2 = l2 + (w[i] * moved) * moved;
            moves = moves & (moved != l);
            moves = moves & ((moved_xl * moved_xl) * sum_l2 > (sum_xl * sum_xl) * moved_l2);
            levels[i] = select(moves, low_byte(moved), l);
            sum_xl = select(moves, moved_xl, sum_xl);
            sum_l2 = select(moves, moved_l2, sum_l2);
            has_moved = has_moved | (moves & wanted);
        }
        if (!any(has_moved)) break;
    }
    is_odd = is_odd | beyond;
    return select(sum_l2 > 0.f, sum_xl / sum_l2, F(0.f));
}

// Values, their weights and signs of a block of N; ggml multiplies importance by sqrt(spread + x^2).
template <int N, bool EVEN>
FN void take_block(const F *x, const float *importance, F spread, Values<8, N> &v, I *signs) {
    UNROLL for (int i = 0; i < N; i++) {
        v.x[i] = x[i];
        v.w[i] = F(importance[i]) * sqrt_of(spread + x[i] * x[i]);
    }
    UNROLL for (int k = 0; k < N / 8; k++) {
        signs[k] = take_signs(v.x + 8 * k);
        if (EVEN) signs[k] = make_even(signs[k], v.x + 8 * k, v.w + 8 * k);
    }
    prepare(v);
}

// IS_S: IQ2_S, 1024 points and a sign for each value; else IQ2_XS, 512 points and seven signs for
// eight values. Blocks of 16.
template <bool IS_S> struct Iq2 : HasCodebook {
    enum { COLUMNS = 256, BYTES = IS_S ? 82 : 74, PARTS = 16, WIDE = 16, SPREAD = IS_S ? 2 : 1 };
    typedef Fitted<2, 2> Part;

    template <bool WEIGHTED>
    FN void fit(const F *x, const float *importance, F spread, const Codebook &book, Part &part, M &is_odd) {
        Values<8, 16> v;
        GridFit<8, 16> fit;
        if (WEIGHTED) {
            take_block<16, !IS_S>(x, importance, spread, v, part.signs);
        } else {
            UNROLL for (int i = 0; i < 16; i++) {
                v.x[i] = x[i];
                v.w[i] = 0.25f * spread + v.x[i] * v.x[i];
            }
            UNROLL for (int k = 0; k < 2; k++) part.signs[k] = take_signs(v.x + 8 * k);
            prepare(v);
        }
        M is_used = !(v.high < (IS_S ? 1e-8f : 1e-15f));
        fit.is_odd = false;
        fit.scale = v.high / F(5.f);
        fit.off_grid = fit.codes[0] = fit.codes[1] = 0;
        try_scales(v, is_used, v.high, 5.f, 0.1f, 9, book, fit);
        fit_again(v, is_used, fit.off_grid, book, fit);
        leave_part<IS_S ? 255 : 127>(fit, is_used, book, part, is_odd);
    }

    FN void pack(const Part *parts, I *words, M &is_odd) {
        I levels[16], halves[IS_S ? 41 : 37];
        M is_zero;
        halves[0] = four_bits<16>(parts, IS_S ? 0.9875f : 1.f, levels, is_zero, is_odd);
        if (IS_S) {
            for (int i = 0; i < 16; i++) {
                const I *p = parts[i].points, *s = parts[i].signs;
                halves[1 + i] = (p[0] & 255) | ((p[1] & 255) << 8);
                halves[17 + i] = s[0] | (s[1] << 8);
            }
            for (int i = 0; i < 4; i++) {
                I high = 0;
                for (int k = 0; k < 8; k++)
                    high = high | (shift_right(parts[4 * i + k / 2].points[k % 2], 8) << 2 * k);
                halves[33 + i] = high;
            }
        } else {
            for (int i = 0; i < 32; i++) {
                I both = parts[i / 2].points[i % 2] | (parts[i / 2].signs[i % 2] << 9);
                halves[1 + i] = select(is_zero, I(0), both);
            }
        }
        for (int i = 0; i < 4; i++) {
            const I *l = levels + 4 * i;
            halves[(IS_S ? 37 : 33) + i] = l[0] | (l[1] << 4) | (l[2] << 8) | (l[3] << 12);
        }
        pack_halves<IS_S ? 41 : 37>(halves, words);
    }
};

// 256 points, seven signs for eight values, blocks of 32.
struct Iq2Xxs : HasCodebook {
    enum { COLUMNS = 256, BYTES = 66, PARTS = 8, WIDE = 32, SPREAD = 1 };
    typedef Fitted<4, 4> Part;

    template <bool WEIGHTED>
    FN void fit(const F *x, const float *importance, F spread, const Codebook &book, Part &part, M &is_odd) {
        Values<8, 32> v;
        GridFit<8, 32> fit;
        take_block<32, true>(x, importance, spread, v, part.signs);
        M is_used = !(v.high < 1e-15f);
        fit.is_odd = false;
        fit.scale = first_scale<4, 32>(v.x, v.w, v.low, v.high, is_used, fit.is_odd);
        is_odd = is_odd | (is_used & fit.is_odd);
        F extent = fit.scale * F(3.f);
        is_used = is_used & !(extent <= 0.f);
        fit.off_grid = 0;
        UNROLL for (int g = 0; g < 4; g++) fit.codes[g] = 0;
        try_scales(v, is_used, extent, 5.f, 0.1f, 6, book, fit);
        fit_again(v, is_used, I(15), book, fit);
        leave_part<127>(fit, is_used, book, part, is_odd);
    }

    FN void pack(const Part *parts, I *words, M &is_odd) {
        M is_zero;
        I levels[8], halves[33];
        halves[0] = four_bits<8>(parts, 1.f, levels, is_zero, is_odd);
        for (int j = 0; j < 8; j++) {
            const I *p = parts[j].points, *s = parts[j].signs;
            I word = s[0] | (s[1] << 7) | (s[2] << 14) | (s[3] << 21) | (levels[j] << 28);
            halves[1 + 4 * j] = p[0] | (p[1] << 8);
            halves[2 + 4 * j] = p[2] | (p[3] << 8);
            halves[3 + 4 * j] = word & 0xffff;
            halves[4 + 4 * j] = shift_right(word, 16);
        }
        for (int i = 0; i < 33; i++) halves[i] = select(is_zero, I(0), halves[i]);
        pack_halves<33>(halves, words);
    }
};
