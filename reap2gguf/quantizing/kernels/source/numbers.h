// Rounding and half precision as ggml does them, in lanes.
#pragma once
#include "lanes.h"

// Added to a float32 below 2^22, this leaves the nearest integer (ties to even) in the lowest bits.
#define MAGIC 12582912.f
// Beyond it, ggml's rounding gives other numbers than the nearest: such blocks are left to ggml.
#define ROUNDABLE 4194303.f
#define LARGEST_FLOAT 0x1.fffffep127f

// The nearest integer, with ggml's result also where it is none. NaN gives 0, as on x86-64.
FN I nearest(F v) {
    I raw = bits(v + MAGIC);
    return select(v == v, (raw & 0x7fffff) - 0x400000, I(0));
}

// The nearest integer from 0 to MAX as a float, for |v| < ROUNDABLE: three operations.
template <int MAX> FN F level(F v) {
    return smaller(larger(v + MAGIC, F(MAGIC)), F(MAGIC + MAX)) - MAGIC;
}

// The same from LOW to HIGH.
template <int LOW, int HIGH> FN F level(F v) {
    return smaller(larger(v + MAGIC, F(MAGIC + LOW)), F(MAGIC + HIGH)) - MAGIC;
}

FN M is_roundable(F v) { return absolute(v) < ROUNDABLE; }

FN I clamp(I a, int low, int high) { return smaller(larger(a, I(low)), I(high)); }

// The 16 bits of the nearest half, ties to even, subnormals kept; infinity if it is too large.
FN I half_bits(F f) {
    I word = bits(f), twice = word << 1;
    // adding a number of the right size rounds the mantissa at the place where a half ends
    I bias = twice & (int)0xff000000;
    bias = shift_right(bias, 1);
    bias = larger(bias, I(0x38800000));
    F rounded = (absolute(f) * 0x1p+112f) * 0x1p-110f + from_bits(bias + 0x07800000);
    I raw = bits(rounded);
    I exponent = shift_right(raw, 13) & 0x7c00, mantissa = raw & 0xfff;
    I finite = exponent + mantissa;
    I magnitude = select((word & 0x7fffffff) > I(0x7f800000), I(0x7e00), finite);
    return (shift_right(word, 16) & 0x8000) | magnitude;
}

// The 16 bits of the nearest bfloat16, ties to even; NaN stays NaN.
FN I bfloat_bits(F f) {
    I word = bits(f), high = shift_right(word, 16);
    I rounded = shift_right(word + ((high & 1) + 0x7fff), 16);
    return select((word & 0x7fffffff) > I(0x7f800000), high | 64, rounded);
}

// The float32 of the 16 bits of a half.
FN F half_value(I h) {
    I magnitude = h & 0x7fff, word = (magnitude << 13) + 0x38000000;
    word = select(magnitude < I(0x7c00), word, word | 0x7f800000);
    F value = select(magnitude < I(0x400), from_bits(magnitude | 0x3f000000) - F(0.5f), from_bits(word));
    return from_bits(bits(value) | ((h & 0x8000) << 16));
}

FN M is_finite_half(I h) { return (h & 0x7c00) != I(0x7c00); }

FN M is_finite(F v) { return absolute(v) <= LARGEST_FLOAT; }

FN F inverse_or_zero(F x) { return select(x != 0.f, F(1.f) / x, F(0.f)); }

// N words after a half, in a block that is packed without a gap.
template <int N> FN void pack_after_half(I half, const I *in, I *words) {
    words[0] = half | (in[0] << 16);
    for (int k = 1; k < N; k++) words[k] = shift_right(in[k - 1], 16) | (in[k] << 16);
    words[N] = shift_right(in[N - 1], 16);
}
