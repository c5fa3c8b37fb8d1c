// Blocks as float32: each type's group of 16 or 32 neighbours, for a CPU and for a GPU.
//
// The formats and the order of the operations are those of ggml (MIT licence, ggml-common.h and the
// dequantize_row functions of ggml-quants.c). Levels are put together eight at a time, as the bytes of
// a 64-bit word, and then scaled in loops of fixed length, which a compiler turns into lanes.
// A type has COLUMNS and BYTES of a block, GROUP, the number of values that a thread of a GPU reads at
// a time, and `read`. Only IQ2 and IQ3 types have a codebook: its entries of 8 (IQ2) or 4 (IQ3) bytes,
// one after the other.
#pragma once
#include "lanes.h"

FN u32 word16(const u8 *p) { return p[0] | (u32)p[1] << 8; }
FN u32 word32(const u8 *p) { return word16(p) | word16(p + 2) << 16; }

FN float as_float(u32 word) {
    float f;
    memcpy(&f, &word, sizeof f);
    return f;
}
FN u32 as_word(float f) {
    u32 word;
    memcpy(&word, &f, sizeof word);
    return word;
}

// The float32 of the half at p. No multiplication: those of subnormals are slow on some processors.
FN float half_at(const u8 *p) {
    const u32 h = word16(p), magnitude = h & 0x7fff;
    const u32 subnormal = as_word(as_float(0x3f000000 | magnitude) - 0.5f);
    const u32 normal = (magnitude << 13) + 0x38000000;  // from an exponent of five bits to one of eight
    const u32 beyond = magnitude < 0x7c00 ? 0 : 0x7f800000;
    return as_float((magnitude < 0x400 ? subnormal : normal | beyond) | (h & 0x8000) << 16);
}

#define ALL(byte) (0x0101010101010101ull * (byte))  // the same byte eight times

FN u64 word64(const u8 *p) {
    u64 word;
    memcpy(&word, p, sizeof word);
    return word;
}

// Eight bits as eight bytes of 0 or 1.
FN u64 spread(u32 eight) {
    const u64 own = (eight & 255) * ALL(1) & 0x8040201008040201ull;  // each byte keeps its bit
    return (own + ALL(127)) >> 7 & ALL(1);
}

// N levels, less OFFSET, times `scale`.
template <int N, int OFFSET> FN void scale_levels(const void *levels, float scale, float *RESTRICT out) {
    signed char level[N];
    memcpy(level, levels, N);
    NEIGHBOURS for (int i = 0; i < N; i++) out[i] = scale * (float)(level[i] - OFFSET);
}

template <int N>
FN void scale_levels(const void *levels, float scale, float minus, float *RESTRICT out) {
    signed char level[N];
    memcpy(level, levels, N);
    NEIGHBOURS for (int i = 0; i < N; i++) out[i] = scale * (float)level[i] - minus;
}

struct ReadQ8 {
    enum { COLUMNS = 32, BYTES = 34, GROUP = 32 };
    FN void read(const u8 *block, int, const u8 *, float *out) {
        scale_levels<32, 0>(block + 2, half_at(block), out);
    }
};

// Q4_0, Q4_1, Q5_0, Q5_1: in each byte a value of the first half and one of the second.
template <bool FIVE, bool AFFINE> struct ReadPlain {
    enum { START = AFFINE ? 4 : 2, COLUMNS = 32, BYTES = START + (FIVE ? 20 : 16), GROUP = 32 };
    FN void read(const u8 *block, int, const u8 *, float *out) {
        const float d = half_at(block);
        u64 levels[4];
        UNROLL for (int k = 0; k < 4; k++) {
            levels[k] = word64(block + START + (FIVE ? 4 : 0) + 8 * (k % 2)) >> 4 * (k / 2) & ALL(15);
            if (FIVE) levels[k] |= spread(block[START + k]) << 4;
        }
        if (AFFINE) scale_levels<32>(levels, d, -half_at(block + 2), out);
        else scale_levels<32, FIVE ? 16 : 8>(levels, d, out);
    }
};

struct ReadQ2K {
    enum { COLUMNS = 256, BYTES = 84, GROUP = 16 };
    FN void read(const u8 *block, int group, const u8 *, float *out) {
        const int shift = 2 * (group / 2 % 4), both = block[group];
        const float scale = half_at(block + 80) * (float)(both & 15);
        const float minus = half_at(block + 82) * (float)(both >> 4);
        const u8 *q = block + 16 + 32 * (group / 8) + 16 * (group % 2);
        u64 levels[2];
        for (int k = 0; k < 2; k++) levels[k] = word64(q + 8 * k) >> shift & ALL(3);
        scale_levels<16>(levels, scale, minus, out);
    }
};

struct ReadQ3K {
    enum { COLUMNS = 256, BYTES = 110, GROUP = 16 };
    FN void read(const u8 *block, int group, const u8 *, float *out) {
        const u8 *high = block + 16 * (group % 2), *q = high + 32 + 32 * (group / 8), *s = block + 96;
        const int shift = 2 * (group / 2 % 4), bit = group / 2;
        const int four = (group < 8 ? s[group] : s[group - 8] >> 4) & 15;
        const int two = s[8 + group % 4] >> 2 * (group / 4) & 3;
        const float scale = half_at(block + 108) * (float)((four | two << 4) - 32);
        u64 levels[2];
        for (int k = 0; k < 2; k++)
            levels[k] = (word64(q + 8 * k) >> shift & ALL(3)) | (word64(high + 8 * k) >> bit & ALL(1)) << 2;
        scale_levels<16, 4>(levels, scale, out);
    }
};

// Q4_K and Q5_K.
template <bool FIVE> struct ReadAffineK {
    enum { COLUMNS = 256, BYTES = FIVE ? 176 : 144, GROUP = 32 };
    FN void read(const u8 *block, int group, const u8 *, float *out) {
        const u8 *s = block + 4, *q = block + (FIVE ? 48 : 16) + 32 * (group / 2);
        const int shift = 4 * (group % 2), g = group % 4;
        const int level = group < 4 ? s[g] & 63 : (s[g + 8] & 15) | s[g] >> 6 << 4;
        const int minimum = group < 4 ? s[g + 4] & 63 : s[g + 8] >> 4 | s[g + 4] >> 6 << 4;
        u64 levels[4];
        for (int k = 0; k < 4; k++) {
            levels[k] = word64(q + 8 * k) >> shift & ALL(15);
            if (FIVE) levels[k] |= (word64(block + 16 + 8 * k) >> group & ALL(1)) << 4;
        }
        scale_levels<32>(levels, half_at(block) * (float)level, half_at(block + 2) * (float)minimum, out);
    }
};

struct ReadQ6K {
    enum { COLUMNS = 256, BYTES = 210, GROUP = 16 };
    FN void read(const u8 *block, int group, const u8 *, float *out) {
        const int half = group / 8, run = group / 2 % 4, at = 16 * (group % 2);
        const u8 *fours = block + 64 * half + 32 * (run % 2) + at, *twos = block + 128 + 32 * half + at;
        u64 levels[2];
        for (int k = 0; k < 2; k++)
            levels[k] = (word64(fours + 8 * k) >> 4 * (run / 2) & ALL(15)) |
                        (word64(twos + 8 * k) >> 2 * run & ALL(3)) << 4;
        scale_levels<16, 32>(levels, half_at(block + 208) * (float)(signed char)block[192 + group], out);
    }
};

// The sixteen values of IQ4, for the levels in the four bits from `shift` on of 16 bytes.
FN void read_uneven(const u8 *q, int shift, float scale, float *out) {
    signed char values[16];
    pick_values(0xf6eaddcfbfad9881ull, 0x7159453526190d01ull, q, shift, values);
    scale_levels<16, 0>(values, scale, out);
}

struct ReadIQ4NL {
    enum { COLUMNS = 32, BYTES = 18, GROUP = 16 };
    FN void read(const u8 *block, int group, const u8 *, float *out) {
        read_uneven(block + 2, 4 * group, half_at(block), out);
    }
};

struct ReadIQ4XS {
    enum { COLUMNS = 256, BYTES = 136, GROUP = 16 };
    FN void read(const u8 *block, int group, const u8 *, float *out) {
        const int j = group / 2;
        const int low = block[4 + j / 2] >> 4 * (j % 2) & 15, high = word16(block + 2) >> 2 * j & 3;
        const float scale = half_at(block) * (float)((low | high << 4) - 32);
        read_uneven(block + 8 + 16 * j, 4 * (group % 2), scale, out);
    }
};

// Seven signs as eight: the last makes the number of minuses even.
FN u32 even_signs(u32 seven) {
    u32 parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return seven | (parity & 1) << 7;
}

// Eight values of a codebook, negative where `signs` has a bit. None of them is 0.
FN u64 with_signs(const u8 *first, const u8 *second, u32 signs) {
    const u64 minus = spread(signs);
    return ((word32(first) | (u64)word32(second) << 32) ^ minus * 255) + minus;
}

struct ReadIQ2XXS {
    enum { COLUMNS = 256, BYTES = 66, GROUP = 32 };
    FN void read(const u8 *block, int group, const u8 *codebook, float *out) {
        const u8 *q = block + 2 + 8 * group;
        const u32 signs = word32(q + 4);
        u64 values[4];
        UNROLL for (int k = 0; k < 4; k++) {
            const u8 *entry = codebook + 8 * q[k];
            values[k] = with_signs(entry, entry + 4, even_signs(signs >> 7 * k & 127));
        }
        scale_levels<32, 0>(values, half_at(block) * (0.5f + (float)(signs >> 28)) * 0.25f, out);
    }
};

struct ReadIQ2XS {
    enum { COLUMNS = 256, BYTES = 74, GROUP = 16 };
    FN void read(const u8 *block, int group, const u8 *codebook, float *out) {
        const int level = block[66 + group / 2] >> 4 * (group % 2) & 15;
        u64 values[2];
        UNROLL for (int k = 0; k < 2; k++) {
            const u32 both = word16(block + 2 + 4 * group + 2 * k);
            const u8 *entry = codebook + 8 * (both & 511);
            values[k] = with_signs(entry, entry + 4, even_signs(both >> 9));
        }
        scale_levels<16, 0>(values, half_at(block) * (0.5f + (float)level) * 0.25f, out);
    }
};

struct ReadIQ2S {
    enum { COLUMNS = 256, BYTES = 82, GROUP = 16 };
    FN void read(const u8 *block, int group, const u8 *codebook, float *out) {
        const int level = block[74 + group / 2] >> 4 * (group % 2) & 15;
        u64 values[2];
        UNROLL for (int k = 0; k < 2; k++) {
            const int at = 2 * group + k, high = block[66 + at / 4] >> 2 * (at % 4) & 3;
            const u8 *entry = codebook + 8 * (block[2 + at] | high << 8);
            values[k] = with_signs(entry, entry + 4, block[34 + at]);
        }
        scale_levels<16, 0>(values, half_at(block) * (0.5f + (float)level) * 0.25f, out);
    }
};

struct ReadIQ3XXS {
    enum { COLUMNS = 256, BYTES = 98, GROUP = 32 };
    FN void read(const u8 *block, int group, const u8 *codebook, float *out) {
        const u8 *q = block + 2 + 8 * group;
        const u32 signs = word32(block + 66 + 4 * group);
        u64 values[4];
        UNROLL for (int k = 0; k < 4; k++)
            values[k] = with_signs(codebook + 4 * q[2 * k], codebook + 4 * q[2 * k + 1],
                                   even_signs(signs >> 7 * k & 127));
        scale_levels<32, 0>(values, half_at(block) * (0.5f + (float)(signs >> 28)) * 0.5f, out);
    }
};

struct ReadIQ3S {
    enum { COLUMNS = 256, BYTES = 110, GROUP = 32 };
    FN void read(const u8 *block, int group, const u8 *codebook, float *out) {
        const u8 *q = block + 2 + 8 * group, *signs = block + 74 + 4 * group;
        const int high = block[66 + group], level = block[106 + group / 2] >> 4 * (group % 2) & 15;
        u64 values[4];
        UNROLL for (int k = 0; k < 4; k++) {
            const int first = q[2 * k] | (high >> 2 * k & 1) << 8;
            const int second = q[2 * k + 1] | (high >> (2 * k + 1) & 1) << 8;
            values[k] = with_signs(codebook + 4 * first, codebook + 4 * second, signs[k]);
        }
        scale_levels<32, 0>(values, half_at(block) * (float)(1 + 2 * level), out);
    }
};
