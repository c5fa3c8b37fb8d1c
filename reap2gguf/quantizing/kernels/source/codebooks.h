// What IQ2 and IQ3 share: groups of four or eight levels that are points of a grid.
//
// The algorithms are those of ggml (MIT licence, ggml-quants.c: quantize_row_iq3_s_impl and its
// neighbours, iq3_find_best_neighbour, iq2_find_best_neighbour), done in lanes. The tables are made
// by codebooks.py. Level l stands for 2 l + 1. A group's code is its levels, BITS each, the first in
// the lowest bits.
#pragma once
#include "numbers.h"

struct Codebook {
    // Of each code: negative for a point of the grid, with its number in the lowest 16 bits;
    // else where its neighbours are: first chunk of `codes` * 1024 + how many they are.
    const int *places;
    // The neighbours' codes in chunks of 16, nearest first. A list's room at the end is filled with
    // its first code.
    const u16 *codes;
};

#define FARTHEST 3.402823466e+38f  // what is not nearer than this is not taken

template <int GROUP> struct Grid {
    enum { BITS = GROUP == 4 ? 3 : 2, MASK = (1 << BITS) - 1, MAX = GROUP == 4 ? 7 : 2 };
};

#ifdef __CUDACC__

// The nearest of a code's neighbours: the first one with the smallest weighted distance of
// scale * point from x. The code itself if it is a point, or if `wanted` is no. Four codes are loaded at
// a time; those that fill a list up are the first again, which is not nearer than itself.
template <int GROUP>
FN I nearest_point(I code, I place, M wanted, const F *x, const F *w, F scale, const Codebook &book,
                   M &is_odd) {
    enum { BITS = Grid<GROUP>::BITS, MASK = Grid<GROUP>::MASK };
    if (place < 0 || !wanted) return code;
    const ushort4 *list = (const ushort4 *)book.codes + 4 * (place >> 10);
    const int count = place & 1023;
    F least = FARTHEST;
    for (int j = 0; j < count; j += 4) {
        const ushort4 four = *list++;
        const I others[4] = {four.x, four.y, four.z, four.w};
        UNROLL for (int k = 0; k < 4; k++) {
            F distance = 0.f;
            UNROLL for (int i = 0; i < GROUP; i++) {
                // an odd number as a float by its bits, faster than by converting it
                I odd = (others[k] << 1 >> BITS * i & 2 * MASK) | 1;
                F difference = scale * (from_bits(0x4b000000 | odd) - 0x1p23f) - x[i];
                distance = distance + (w[i] * difference) * difference;
            }
            if (distance < least) {
                least = distance;
                code = others[k];
            }
        }
    }
    is_odd |= !(least < FARTHEST);
    return code;
}

#else

// Of one lane's group, each value's weighted distance from each level.
template <int GROUP> struct Distances {
    enum { BITS = Grid<GROUP>::BITS, N = GROUP == 4 ? EIGHT : 1 };
    Floats table[GROUP][N];

    FN void measure(Distances &all, const F *x, const F *w, float scale, int k) {
        for (int n = 0; n < N; n++) {
            Floats steps;
            for (int i = 0; i < WIDTH; i++)
                steps[i] = (float)(2 * ((n * WIDTH + i) & Grid<GROUP>::MASK) + 1);
            steps = scale * steps;
            for (int i = 0; i < GROUP; i++) {
                Floats difference = steps - lane(x[i], k);
                all.table[i][n] = (lane(w[i], k) * difference) * difference;
            }
        }
    }

    // From WIDTH points: sums of what their levels pick.
    FN Floats from(const Distances &all, const u16 *points) {
        Ints codes = widen(points);
        Floats sum = {};
        for (int i = 0; i < GROUP; i++) {
            Ints levels = codes >> BITS * i;  // and more above, which is not looked at
            Floats part = GROUP == 4 ? pick8(all.table[i], levels) : pick4(all.table[i][0], levels);
            sum = i ? sum + part : part;
        }
        return sum;
    }
};

// For one lane. A distance is added up by the same operations in the same order as point by point,
// so it is the same number. Most lists are a chunk of 16 or less: one for which no branch is guessed.
template <int GROUP>
FN int nearest_of(const u16 *list, int count, const F *x, const F *w, float scale, int k, bool &is_odd) {
    enum { PARTS = 16 / WIDTH };
    Distances<GROUP> all;
    Distances<GROUP>::measure(all, x, w, scale, k);
    Floats nearest[PARTS];
    Ints chunk[PARTS] = {};
    for (int p = 0; p < PARTS; p++) {
        nearest[p] = Distances<GROUP>::from(all, list + WIDTH * p);
        nearest[p] = nearest[p] < FARTHEST ? nearest[p] : FARTHEST - (Floats){};
    }
    for (int j = 16; j < count; j += 16)
        for (int p = 0; p < PARTS; p++) {
            Floats next = Distances<GROUP>::from(all, list + j + WIDTH * p);
            chunk[p] = next < nearest[p] ? j - (Ints){} : chunk[p];
            nearest[p] = next < nearest[p] ? next : nearest[p];
        }
    Floats least = nearest[0];
    for (int p = 1; p < PARTS; p++) least = nearest[p] < least ? nearest[p] : least;
    const float distance = smallest(least);
    u32 found = 0;
    for (int p = 0; p < PARTS; p++) found |= where_equal(nearest[p], distance) << WIDTH * p;
    int first = __builtin_ctz(found);
    if (count > 16) {  // the first place of all that are equally near
        first += chunk[first / WIDTH][first % WIDTH];
        while (found &= found - 1) {
            int other = __builtin_ctz(found);
            other += chunk[other / WIDTH][other % WIDTH];
            first = other < first ? other : first;
        }
    }
    is_odd = is_odd | !(distance < FARTHEST);
    return list[first];
}

template <int GROUP>
FN I nearest_point(I code, I place, M wanted, const F *x, const F *w, F scale, const Codebook &book,
                   M &is_odd) {
    int codes[LANES], places[LANES], wants[LANES], odd[LANES], waiting[LANES], n = 0;
    memcpy(codes, &code, sizeof codes);
    memcpy(places, &place, sizeof places);
    memcpy(wants, &wanted, sizeof wants);
    memset(odd, 0, sizeof odd);
    for (int k = 0; k < LANES; k++) {
        waiting[n] = k;
        n += (wants[k] != 0) & (places[k] >= 0);
    }
    for (int j = 0; j < n; j++) {
        const int k = waiting[j];
        bool strange = false;
        codes[k] = nearest_of<GROUP>(book.codes + 16 * (places[k] >> 10), places[k] & 1023, x, w,
                                     lane(scale, k), k, strange);
        odd[k] = -(int)strange;
    }
    M beyond;
    memcpy(&beyond, odd, sizeof odd);
    is_odd = is_odd | beyond;
    memcpy(&code, codes, sizeof codes);
    return code;
}

#endif

// The code of the nearest levels; PLAIN if |x * inverse| is in the plain range.
template <int GROUP, bool PLAIN> FN I nearest_levels(const F *x, F inverse) {
    enum { BITS = Grid<GROUP>::BITS, MASK = Grid<GROUP>::MASK, MAX = Grid<GROUP>::MAX };
    I code = 0;
    UNROLL for (int i = 0; i < GROUP; i++) {
        if (!PLAIN) {
            code = code | (clamp(nearest(0.5f * (inverse * x[i] - 1.f)), 0, MAX) << BITS * i);
            continue;
        }
        F biased = smaller(larger(0.5f * (inverse * x[i] - 1.f) + MAGIC, F(MAGIC)), F(MAGIC + MAX));
        code = code | ((bits(biased) & MASK) << BITS * i);
    }
    return code;
}

FN M is_plain(F inverse, F low, F high) {
    return is_roundable(0.5f * (inverse * high - 1.f)) & is_roundable(0.5f * (inverse * low - 1.f));
}

// N values without their signs, and what does not change from try to try.
template <int GROUP, int N> struct Values {
    F x[N], w[N], root[N], wx[N];  // w are weights, root their square roots
    F low, high;
};

// Levels and the scale that goes with them.
template <int GROUP, int N> struct GridFit {
    enum { GROUPS = N / GROUP };
    F scale, best;
    I codes[GROUPS];
    I off_grid;  // bit k: the levels of group k were no point before
    M is_odd;    // beyond the plain range
};

template <int GROUP, int N>
FN void sum_levels(const Values<GROUP, N> &v, const I *codes, F &sum_xq, F &sum_q2) {
    enum { BITS = Grid<GROUP>::BITS, MASK = Grid<GROUP>::MASK };
    sum_xq = sum_q2 = 0.f;
    UNROLL for (int i = 0; i < N; i++) {
        F q = to_float((shift_right(codes[i / GROUP] << 1, BITS * (i % GROUP)) & 2 * MASK) | 1);
        sum_xq = sum_xq + v.wx[i] * q;
        sum_q2 = sum_q2 + (v.w[i] * q) * q;
    }
}

// One scale after another, (top + delta * try) / extent; the fit keeps what is best. Lanes that are
// not `wanted` may gain anything.
template <int GROUP, int N>
FN void try_scales(const Values<GROUP, N> &v, M wanted, F extent, float top, float delta, int last_try,
                   const Codebook &book, GridFit<GROUP, N> &fit) {
    enum { GROUPS = N / GROUP };
    fit.best = 0.f;
    fit.is_odd = fit.is_odd | !is_plain(F(top + delta * last_try) / extent, v.low, v.high);
    for (int k = -last_try; k <= last_try; k++) {
        F inverse = F(top + delta * k) / extent, scale = F(1.f) / inverse, sum_xq, sum_q2;
        I codes[GROUPS], off_grid = 0;
        ROLL_ALL for (int g = 0; g < GROUPS; g++) {
            I code = nearest_levels<GROUP, true>(v.x + GROUP * g, inverse);
            I place = look_up(book.places, code);
            off_grid = off_grid | select(place < I(0), I(0), I(1 << g));
            codes[g] = nearest_point<GROUP>(code, place, wanted, v.x + GROUP * g, v.root + GROUP * g, scale,
                                            book, fit.is_odd);
        }
        sum_levels(v, codes, sum_xq, sum_q2);
        M is_better = (sum_q2 > 0.f) & (sum_xq * sum_xq > fit.best * sum_q2);
        fit.scale = select(is_better, sum_xq / sum_q2, fit.scale);
        fit.best = select(is_better, fit.scale * sum_xq, fit.best);
        fit.off_grid = select(is_better, off_grid, fit.off_grid);
        UNROLL for (int g = 0; g < GROUPS; g++) fit.codes[g] = select(is_better, codes[g], fit.codes[g]);
    }
}

// Levels anew for the scale that was found, of the groups in `which` (bits), and the scale anew.
template <int GROUP, int N>
FN void fit_again(const Values<GROUP, N> &v, M wanted, I which, const Codebook &book,
                  GridFit<GROUP, N> &fit) {
    wanted = wanted & (fit.scale > 0.f) & (which != I(0));
    F inverse = F(1.f) / fit.scale, sum_xq, sum_q2;
    ROLL_ALL for (int g = 0; g < N / GROUP; g++) {
        M moves = wanted & ((which & 1 << g) != I(0));
        I code = nearest_levels<GROUP, false>(v.x + GROUP * g, inverse);
        I place = look_up(book.places, code);
        code = nearest_point<GROUP>(code, place, moves, v.x + GROUP * g, v.root + GROUP * g, fit.scale, book,
                                    fit.is_odd);
        fit.codes[g] = select(moves, code, fit.codes[g]);
    }
    sum_levels(v, fit.codes, sum_xq, sum_q2);
    fit.scale = select(wanted & (sum_q2 > 0.f), sum_xq / sum_q2, fit.scale);
}

// The signs of eight values as bits; `x` become magnitudes.
FN I take_signs(F *x) {
    I signs = 0;
    UNROLL for (int i = 0; i < 8; i++) {
        M is_positive = x[i] >= 0.f;
        signs = signs | select(is_positive, I(0), I(1 << i));
        x[i] = select(is_positive, x[i], -x[i]);
    }
    return signs;
}

// An even number of signs for eight magnitudes, so that seven bits say all: if it is odd, the value
// that weighs least gets the other sign, and a negative magnitude.
FN I make_even(I signs, F *x, const F *w) {
    I parity = signs ^ shift_right(signs, 4);
    parity = parity ^ shift_right(parity, 2);
    parity = (parity ^ shift_right(parity, 1)) & 1;
    F least = (w[0] * x[0]) * x[0];
    I flipped = 1;
    UNROLL for (int i = 1; i < 8; i++) {
        F weighed = (w[i] * x[i]) * x[i];
        M is_less = weighed < least;
        least = select(is_less, weighed, least);
        flipped = select(is_less, I(1 << i), flipped);
    }
    flipped = select(parity == I(0), I(0), flipped);
    UNROLL for (int i = 0; i < 8; i++) x[i] = select((flipped & 1 << i) != I(0), -x[i], x[i]);
    return (signs ^ flipped) & 127;
}

// The extremes of the values, and products that all tries need.
template <int GROUP, int N> FN void prepare(Values<GROUP, N> &v) {
    v.low = v.high = v.x[0];
    UNROLL for (int i = 0; i < N; i++) {
        v.high = larger(v.high, v.x[i]);
        v.low = smaller(v.low, v.x[i]);
        v.root[i] = sqrt_of(v.w[i]);
        v.wx[i] = v.w[i] * v.x[i];
    }
}

// A negative scale is stored as a positive one with all signs turned.
FN void make_positive(F &scale, I *signs, int n, int mask) {
    M is_negative = scale < 0.f;
    for (int k = 0; k < n; k++) signs[k] = signs[k] ^ select(is_negative, I(mask), I(0));
    scale = select(is_negative, -scale, scale);
}

// Four bits for each scale of N parts, as (level + 1/2) * 2 d where 31 d is the largest, and d as a half.
// `is_zero` says where all are.
template <int N, class P>
FN I four_bits(const P *parts, float factor, I *levels, M &is_zero, M &is_odd) {
    F largest = 0.f;
    for (int j = 0; j < N; j++) largest = larger(largest, parts[j].scale);
    is_zero = largest == 0.f;
    F d = largest / F(31.f), inverse = F(1.f) / d;
    is_odd = is_odd | (!is_zero & !is_roundable(inverse * largest));
    for (int j = 0; j < N; j++) {
        I level = clamp(nearest(0.5f * (inverse * parts[j].scale - 1.f)), 0, 15);
        levels[j] = select(is_zero, I(0), level);
    }
    I half = select(is_zero, I(0), half_bits(d * factor));
    is_odd = is_odd | !is_finite_half(half);
    return half;
}

// Pieces of 16 bits, two in a word.
template <int N> FN void pack_halves(const I *halves, I *words) {
    for (int i = 0; i < N / 2; i++) words[i] = halves[2 * i] | (halves[2 * i + 1] << 16);
    if (N % 2) words[N / 2] = halves[N - 1];
}

template <int N> FN F add_squares(F sum, const F *x) {
    for (int i = 0; i < N; i++) sum = sum + x[i] * x[i];
    return sum;
}

FN I point_number(const Codebook &book, I code) { return look_up(book.places, code) & 0xffff; }

// A type with a codebook derives from this. Its super-blocks have PARTS parts of WIDE values, which
// `fit` fits one by one and `pack` puts together; a part knows of the others only `spread`, the mean
// square of all values times SPREAD. So a GPU can have a thread for each part.
struct HasCodebook {};

// What the fit of a part leaves: zeros where it is not used.
template <int N_POINTS, int N_SIGNS> struct Fitted {
    F scale;
    M is_used;
    I points[N_POINTS], signs[N_SIGNS];
};

template <class T> FN F spread_of(F sum_of_squares) {
    return F((float)T::SPREAD) * sum_of_squares / F((float)T::COLUMNS);
}

// The fit's scale without its sign, and the points' numbers; SIGN_MASK are the signs that are stored.
template <int SIGN_MASK, int GROUP, int N, class P>
FN void leave_part(GridFit<GROUP, N> &fit, M is_used, const Codebook &book, P &part, M &is_odd) {
    make_positive(fit.scale, part.signs, N / 8, SIGN_MASK);
    is_odd = is_odd | (is_used & (fit.is_odd | !(fit.scale >= 0.f)));
    part.is_used = is_used;
    part.scale = select(is_used, fit.scale, F(0.f));
    UNROLL for (int g = 0; g < N / GROUP; g++)
        part.points[g] = select(is_used, point_number(book, fit.codes[g]), I(0));
    UNROLL for (int k = 0; k < N / 8; k++) part.signs[k] = select(is_used, part.signs[k], I(0));
}

template <class T, bool WEIGHTED>
FN M quantize_block(const void *, const F *x, const float *importance, F mean_square, I *words,
                    const void *) {
    return T::template quantize<WEIGHTED>(x, importance, mean_square, words);
}
template <class T, bool WEIGHTED>
FN M quantize_block(const HasCodebook *, const F *x, const float *importance, F, I *words,
                    const void *book) {
    typename T::Part parts[T::PARTS];
    const F spread = spread_of<T>(add_squares<T::COLUMNS>(F(0.f), x));
    M is_odd = !is_finite(spread);
    for (int j = 0; j < T::PARTS; j++)
        T::template fit<WEIGHTED>(x + T::WIDE * j, importance + T::WIDE * j, spread, *(const Codebook *)book,
                                  parts[j], is_odd);
    T::pack(parts, words, is_odd);
    return is_odd;
}
