// IQ3_S and IQ3_XXS: super-blocks of 256 values in 8 blocks of 32, levels 1, 3 ... 15 in groups of
// four that are points of a grid.
//
// The algorithms are those of ggml (MIT licence, ggml-quants.c: quantize_row_iq3_s_impl,
// quantize_row_iq3_xxs_impl), done in lanes.
#pragma once
#include "codebooks.h"

// IS_S: IQ3_S, 512 points and a sign for each value; else IQ3_XXS, 256 points and seven signs for
// eight values.
template <bool IS_S> struct Iq3 : HasCodebook {
    enum { COLUMNS = 256, BYTES = IS_S ? 110 : 98, PARTS = 8, WIDE = 32, SPREAD = 2 };
    typedef Fitted<8, 4> Part;

    template <bool WEIGHTED>
    FN void fit(const F *x, const float *importance, F spread, const Codebook &book, Part &part, M &is_odd) {
        Values<4, 32> v;
        GridFit<4, 32> fit;
        UNROLL for (int i = 0; i < 32; i++) {
            F value = v.x[i] = x[i];
            v.w[i] = value * value;
            if (WEIGHTED) v.w[i] = F(importance[i]) * sqrt_of(spread + v.w[i]);
        }
        UNROLL for (int k = 0; k < 4; k++) {
            part.signs[k] = take_signs(v.x + 8 * k);
            if (!IS_S) part.signs[k] = make_even(part.signs[k], v.x + 8 * k, v.w + 8 * k);
        }
        prepare(v);
        M is_used = IS_S ? v.high != 0.f : !(v.high < 1e-8f);
        fit.is_odd = false;
        fit.scale = v.high / F(15.f);
        fit.off_grid = IS_S ? 255 : 0;
        UNROLL for (int g = 0; g < 8; g++) fit.codes[g] = 0;
        try_scales(v, is_used, v.high, 15.f, 0.2f, IS_S ? 9 : 15, book, fit);
        // IQ3_S moves all groups if one was off the grid
        I which = IS_S ? select(fit.off_grid == I(0), I(0), I(255)) : fit.off_grid;
        fit_again(v, is_used, which, book, fit);
        leave_part<IS_S ? 255 : 127>(fit, is_used, book, part, is_odd);
    }

    FN void pack(const Part *parts, I *words, M &is_odd) {
        I levels[8];
        M is_zero;
        I d = four_bits<8>(parts, IS_S ? 1.033f : 1.0125f, levels, is_zero, is_odd);
        if (IS_S) pack_s(d, parts, levels, words);
        else pack_xxs(d, parts, levels, is_zero, words);
    }

    FN void pack_s(I d, const Part *parts, const I *levels, I *words) {
        I bytes[24], halves[55];  // of block j: eight points in 3 j and 3 j + 1, signs in 3 j + 2
        halves[0] = d;
        for (int j = 0; j < 8; j++) {
            const I *p = parts[j].points, *s = parts[j].signs;
            for (int k = 0; k < 3; k++) bytes[3 * j + k] = 0;
            for (int k = 0; k < 4; k++) {
                bytes[3 * j] = bytes[3 * j] | ((p[k] & 255) << 8 * k);
                bytes[3 * j + 1] = bytes[3 * j + 1] | ((p[4 + k] & 255) << 8 * k);
                bytes[3 * j + 2] = bytes[3 * j + 2] | (s[k] << 8 * k);
            }
        }
        for (int j = 7; j >= 0; j--) close_gap(bytes, j, !parts[j].is_used);
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 3; k++) {
                I *two = halves + (k < 2 ? 1 + 4 * j + 2 * k : 37 + 2 * j);
                two[0] = bytes[3 * j + k] & 0xffff;
                two[1] = shift_right(bytes[3 * j + k], 16);
            }
        for (int i = 0; i < 4; i++) {
            I ninth = 0;
            for (int k = 0; k < 16; k++)
                ninth = ninth | (shift_right(parts[2 * i + k / 8].points[k % 8], 8) << k);
            halves[33 + i] = ninth;
        }
        for (int i = 0; i < 2; i++) {
            const I *l = levels + 4 * i;
            halves[53 + i] = l[0] | (l[1] << 4) | (l[2] << 8) | (l[3] << 12);
        }
        pack_halves<55>(halves, words);
    }

    // ggml writes nothing for a block of zeros and goes on at the same place: what follows comes
    // earlier, and the zeros are at the end. Only the ninth bits stay where they belong.
    FN void close_gap(I *bytes, int j, M is_gap) {
        if (!any(is_gap)) return;
        for (int i = 3 * j; i < 24; i++) bytes[i] = select(is_gap, i < 21 ? bytes[i + 3] : I(0), bytes[i]);
    }

    FN void pack_xxs(I d, const Part *parts, const I *levels, M is_zero, I *words) {
        I halves[49];
        halves[0] = d;
        for (int j = 0; j < 8; j++) {
            const I *p = parts[j].points, *s = parts[j].signs;
            for (int k = 0; k < 4; k++) halves[1 + 4 * j + k] = p[2 * k] | (p[2 * k + 1] << 8);
            I word = s[0] | (s[1] << 7) | (s[2] << 14) | (s[3] << 21) | (levels[j] << 28);
            halves[33 + 2 * j] = word & 0xffff;
            halves[34 + 2 * j] = shift_right(word, 16);
        }
        for (int i = 0; i < 49; i++) halves[i] = select(is_zero, I(0), halves[i]);
        pack_halves<49>(halves, words);
    }
};
