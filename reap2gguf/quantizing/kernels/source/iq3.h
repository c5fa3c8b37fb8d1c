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
    enum { COLUMNS = 256, BYTES = IS_S ? 110 : 98 };

    template <bool WEIGHTED>
    FN M quantize(const F *x, const float *importance, I *words, const Codebook &book) {
        F scales[8], spread = F(2.f) * sum_of_squares<256>(x) / F(256.f);
        I points[64], signs[32], levels[8];
        M used[8];
        M is_odd = !is_finite(spread);
        for (int j = 0; j < 8; j++) {
            Values<4, 32> v;
            GridFit<4, 32> fit;
            UNROLL for (int i = 0; i < 32; i++) {
                F value = v.x[i] = x[32 * j + i];
                v.w[i] = value * value;
                if (WEIGHTED) v.w[i] = F(importance[32 * j + i]) * sqrt_of(spread + v.w[i]);
            }
            for (int k = 0; k < 4; k++) {
                I *s = signs + 4 * j + k;
                *s = take_signs(v.x + 8 * k);
                if (!IS_S) *s = make_even(*s, v.x + 8 * k, v.w + 8 * k);
            }
            prepare(v);
            M is_used = IS_S ? v.high != 0.f : !(v.high < 1e-8f);
            fit.is_odd = false;
            fit.scale = v.high / F(15.f);
            fit.off_grid = IS_S ? 255 : 0;
            for (int g = 0; g < 8; g++) fit.codes[g] = 0;
            try_scales(v, is_used, v.high, 15.f, 0.2f, IS_S ? 9 : 15, book, fit);
            // IQ3_S moves all groups if one was off the grid
            I which = IS_S ? select(fit.off_grid == I(0), I(0), I(255)) : fit.off_grid;
            fit_again(v, is_used, which, book, fit);
            make_positive(fit.scale, signs + 4 * j, 4, IS_S ? 255 : 127);
            is_odd = is_odd | (is_used & (fit.is_odd | !(fit.scale >= 0.f)));
            used[j] = is_used;
            scales[j] = select(is_used, fit.scale, F(0.f));
            for (int g = 0; g < 8; g++)
                points[8 * j + g] = select(is_used, point_number(book, fit.codes[g]), I(0));
            for (int k = 0; k < 4; k++) signs[4 * j + k] = select(is_used, signs[4 * j + k], I(0));
        }
        M is_zero;
        I d = four_bits<8>(scales, IS_S ? 1.033f : 1.0125f, levels, is_zero, is_odd);
        if (IS_S) pack_s(d, points, signs, levels, used, words);
        else pack_xxs(d, points, signs, levels, is_zero, words);
        return is_odd;
    }

    FN void pack_s(I d, const I *points, const I *signs, const I *levels, const M *used, I *words) {
        I bytes[24], halves[55];  // of block j: eight points in 3 j and 3 j + 1, signs in 3 j + 2
        halves[0] = d;
        for (int j = 0; j < 8; j++) {
            for (int k = 0; k < 3; k++) bytes[3 * j + k] = 0;
            for (int k = 0; k < 12; k++) {
                I byte = k < 8 ? points[8 * j + k] & 255 : signs[4 * j + k - 8];
                bytes[3 * j + k / 4] = bytes[3 * j + k / 4] | (byte << 8 * (k % 4));
            }
        }
        for (int j = 7; j >= 0; j--) close_gap(bytes, j, !used[j]);
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 3; k++) {
                I *two = halves + (k < 2 ? 1 + 4 * j + 2 * k : 37 + 2 * j);
                two[0] = bytes[3 * j + k] & 0xffff;
                two[1] = shift_right(bytes[3 * j + k], 16);
            }
        for (int i = 0; i < 4; i++) {
            I ninth = 0;
            for (int k = 0; k < 16; k++) ninth = ninth | (shift_right(points[16 * i + k], 8) << k);
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

    FN void pack_xxs(I d, const I *points, const I *signs, const I *levels, M is_zero, I *words) {
        I halves[49];
        halves[0] = d;
        for (int i = 0; i < 32; i++) halves[1 + i] = points[2 * i] | (points[2 * i + 1] << 8);
        for (int j = 0; j < 8; j++) {
            const I *s = signs + 4 * j;
            I word = s[0] | (s[1] << 7) | (s[2] << 14) | (s[3] << 21) | (levels[j] << 28);
            halves[33 + 2 * j] = word & 0xffff;
            halves[34 + 2 * j] = shift_right(word, 16);
        }
        for (int i = 0; i < 49; i++) halves[i] = select(is_zero, I(0), halves[i]);
        pack_halves<49>(halves, words);
    }
};
