// Numbers side by side: what the quantizers are written in, for a CPU and for a GPU.
//
// F is a float32, I an int32 and M a yes or no, in each of LANES lanes. Lanes never meet: each works
// on a row of its own, with the operations that ggml does, in the same order. So the bytes are ggml's.
// On a CPU the lanes are those of vector registers, several registers together (REGISTERS), so that
// one can wait for a result while another computes. On a GPU a thread is a lane.
//
// Nothing may fuse a multiplication with an addition: compile with -ffp-contract=off, or --fmad=false.
// Division and square root are the correctly rounded ones.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define RESTRICT __restrict__  // what it points to is reached through nothing else

#ifdef __CUDACC__

#define FN __device__ __forceinline__ static
#define UNROLL _Pragma("unroll")
#ifdef __CUDACC_RTC__  // which does not have it
#define __builtin_inff() __int_as_float(0x7f800000)
#endif
#define ROLL _Pragma("unroll 8")  // a long loop, which would need too many registers
#define ROLL_ALL _Pragma("unroll 1")  // copies of a long body would not fit the cache of instructions
#define NEIGHBOURS UNROLL
typedef float F;
typedef int I;
typedef bool M;

FN F select(M m, F a, F b) { return m ? a : b; }
FN I select(M m, I a, I b) { return m ? a : b; }
FN I bits(F a) { return __float_as_int(a); }
FN F from_bits(I a) { return __int_as_float(a); }
FN F to_float(I a) { return (F)a; }
FN F sqrt_of(F a) { return __fsqrt_rn(a); }
FN F larger(F a, F b) { return a > b ? a : b; }
FN F smaller(F a, F b) { return a < b ? a : b; }
FN I larger(I a, I b) { return a > b ? a : b; }
FN I smaller(I a, I b) { return a < b ? a : b; }
FN I shift_right(I a, int n) { return (I)((u32)a >> n); }  // zeros come in
FN I truncate(F a) { return (I)a; }
FN bool any(M m) { return m; }
// byte `index` of sixteen: `low` has the first eight
FN I pick16(u64 low, u64 high, I index) {
    u64 half = index < 8 ? low : high;
    return (I)__byte_perm((u32)half, (u32)(half >> 32), index & 7) & 255;
}
// sixteen of them, by the four bits from `shift` on of 16 bytes
FN void pick_values(u64 low, u64 high, const u8 *index, int shift, signed char *values) {
    UNROLL for (int i = 0; i < 16; i++)
        values[i] = (signed char)pick16(low, high, index[i] >> shift & 15);
}
template <class T> FN I look_up(const T *table, I index) { return (I)table[index]; }
FN F look_up(const float *table, I index) { return table[index]; }

#else

#include <math.h>
#include <string.h>
#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#define FN static inline __attribute__((always_inline))
#define UNROLL
#define ROLL
#define ROLL_ALL
// Before a loop over neighbours that is to become lanes: a GCC that unrolls it first finds none.
#if defined(__GNUC__) && !defined(__clang__)
#define NEIGHBOURS _Pragma("GCC unroll 1")
#else
#define NEIGHBOURS
#endif

#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX2__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
#ifndef REGISTERS
#define REGISTERS 2
#endif
enum { LANES = WIDTH * REGISTERS };

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int Ints __attribute__((vector_size(WIDTH * 4)));
typedef u32 Words __attribute__((vector_size(WIDTH * 4)));

// Number `r` of the registers that the lanes fill. All of them are done in one statement, so that the
// compiler can let them run side by side.
#define EACH for (int r = 0; r < REGISTERS; r++)
#define BINARY(result, name, left, right, expression) \
    FN result name(left a, right b) { result c; EACH c.v[r] = expression; return c; }

struct F {
    Floats v[REGISTERS];
    inline __attribute__((always_inline)) F() {}
    inline __attribute__((always_inline)) F(float x) { EACH v[r] = x - (Floats){}; }
};
struct I {
    Ints v[REGISTERS];
    inline __attribute__((always_inline)) I() {}
    inline __attribute__((always_inline)) I(int x) { EACH v[r] = x - (Ints){}; }
};
struct M {
    Ints v[REGISTERS];  // all bits of a lane, or none
    inline __attribute__((always_inline)) M() {}
    inline __attribute__((always_inline)) M(bool x) { EACH v[r] = -(int)x - (Ints){}; }
};

BINARY(F, operator+, F, F, a.v[r] + b.v[r])
BINARY(F, operator-, F, F, a.v[r] - b.v[r])
BINARY(F, operator*, F, F, a.v[r] * b.v[r])
BINARY(F, operator/, F, F, a.v[r] / b.v[r])
BINARY(M, operator<, F, F, a.v[r] < b.v[r])
BINARY(M, operator>, F, F, a.v[r] > b.v[r])
BINARY(M, operator<=, F, F, a.v[r] <= b.v[r])
BINARY(M, operator>=, F, F, a.v[r] >= b.v[r])
BINARY(M, operator==, F, F, a.v[r] == b.v[r])
BINARY(M, operator!=, F, F, a.v[r] != b.v[r])
BINARY(I, operator+, I, I, a.v[r] + b.v[r])
BINARY(I, operator-, I, I, a.v[r] - b.v[r])
BINARY(I, operator*, I, I, a.v[r] * b.v[r])
BINARY(I, operator&, I, I, a.v[r] & b.v[r])
BINARY(I, operator|, I, I, a.v[r] | b.v[r])
BINARY(I, operator^, I, I, a.v[r] ^ b.v[r])
BINARY(I, operator<<, I, int, a.v[r] << b)
BINARY(I, shift_right, I, int, (Ints)((Words)a.v[r] >> b))  // zeros come in
BINARY(M, operator<, I, I, a.v[r] < b.v[r])
BINARY(M, operator>, I, I, a.v[r] > b.v[r])
BINARY(M, operator==, I, I, a.v[r] == b.v[r])
BINARY(M, operator!=, I, I, a.v[r] != b.v[r])
BINARY(M, operator&, M, M, a.v[r] & b.v[r])
BINARY(M, operator|, M, M, a.v[r] | b.v[r])

FN F operator-(F a) { EACH a.v[r] = -a.v[r]; return a; }
FN M operator!(M a) { EACH a.v[r] = ~a.v[r]; return a; }
FN F select(M m, F a, F b) { EACH a.v[r] = m.v[r] ? a.v[r] : b.v[r]; return a; }
FN I select(M m, I a, I b) { EACH a.v[r] = m.v[r] ? a.v[r] : b.v[r]; return a; }
FN I bits(F a) { I b; EACH b.v[r] = (Ints)a.v[r]; return b; }
FN F from_bits(I a) { F b; EACH b.v[r] = (Floats)a.v[r]; return b; }
FN F to_float(I a) { F b; EACH b.v[r] = __builtin_convertvector(a.v[r], Floats); return b; }

// The registers' own instructions, where a compiler does not find them: one of F -> F, two of F, F -> F
#if defined(__AVX512F__)
#define SQRT(a) (Floats)_mm512_maskz_sqrt_ps((__mmask16)-1, (__m512)(a))
#define LARGER(a, b) (Floats)_mm512_maskz_max_ps((__mmask16)-1, (__m512)(a), (__m512)(b))
#define SMALLER(a, b) (Floats)_mm512_maskz_min_ps((__mmask16)-1, (__m512)(a), (__m512)(b))
#elif defined(__AVX2__)
#define SQRT(a) (Floats)_mm256_sqrt_ps((__m256)(a))
#define LARGER(a, b) (Floats)_mm256_max_ps((__m256)(a), (__m256)(b))
#define SMALLER(a, b) (Floats)_mm256_min_ps((__m256)(a), (__m256)(b))
#else
#if defined(__aarch64__)
#define SQRT(a) (Floats)vsqrtq_f32((float32x4_t)(a))
#else
#define SQRT(a) (Floats)_mm_sqrt_ps((__m128)(a))
#endif
// NEON's own give NaN where either is NaN; x86 and ggml's comparisons give the second
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#endif

FN F sqrt_of(F a) { EACH a.v[r] = SQRT(a.v[r]); return a; }
BINARY(F, larger, F, F, LARGER(a.v[r], b.v[r]))    // a > b ? a : b
BINARY(F, smaller, F, F, SMALLER(a.v[r], b.v[r]))  // a < b ? a : b
BINARY(I, larger, I, I, a.v[r] > b.v[r] ? a.v[r] : b.v[r])
BINARY(I, smaller, I, I, a.v[r] < b.v[r] ? a.v[r] : b.v[r])

// towards zero, for what an int32 can hold
FN I truncate(F a) { I b; EACH b.v[r] = __builtin_convertvector(a.v[r], Ints); return b; }

// Byte `index` of sixteen: `low` has the first eight. Bytes of an index with the highest bit set pick 0.
FN I pick16(u64 low, u64 high, I index) {
#if defined(__AVX512BW__)
    const __m512i table = _mm512_set4_epi64((i64)high, (i64)low, (i64)high, (i64)low);
    EACH index.v[r] = (Ints)_mm512_shuffle_epi8(table, (__m512i)(index.v[r] | (int)0x80808000));
#elif defined(__AVX2__)
    const __m256i table = _mm256_set_epi64x((i64)high, (i64)low, (i64)high, (i64)low);
    EACH index.v[r] = (Ints)_mm256_shuffle_epi8(table, (__m256i)(index.v[r] | (int)0x80808000));
#elif defined(__aarch64__)
    const uint8x16_t table = vcombine_u8(vcreate_u8(low), vcreate_u8(high));
    EACH index.v[r] = (Ints)vqtbl1q_u8(table, (uint8x16_t)(index.v[r] | (int)0x80808000));
#else
    EACH for (int k = 0; k < WIDTH; k++) {
        const int i = index.v[r][k];
        index.v[r][k] = (int)((i < 8 ? low : high) >> 8 * (i & 7)) & 255;
    }
#endif
    return index;
}

// Sixteen of them, by the four bits from `shift` on of 16 bytes.
FN void pick_values(u64 low, u64 high, const u8 *index, int shift, signed char *values) {
#if defined(__AVX2__)
    __m128i levels = _mm_srli_epi16(_mm_loadu_si128((const __m128i *)index), shift);
    levels = _mm_and_si128(levels, _mm_set1_epi8(15));
    levels = _mm_shuffle_epi8(_mm_set_epi64x((i64)high, (i64)low), levels);
    _mm_storeu_si128((__m128i *)values, levels);
#elif defined(__aarch64__)
    const uint8x16_t table = vcombine_u8(vcreate_u8(low), vcreate_u8(high));
    uint8x16_t levels = vshlq_u8(vld1q_u8(index), vdupq_n_s8((signed char)-shift));
    vst1q_u8((u8 *)values, vqtbl1q_u8(table, vandq_u8(levels, vdupq_n_u8(15))));
#else
    for (int i = 0; i < 16; i++) {
        const int level = index[i] >> shift & 15;
        values[i] = (signed char)((level < 8 ? low : high) >> 8 * (level & 7));
    }
#endif
}

FN bool any(M m) {
    Ints all = m.v[0];
    for (int r = 1; r < REGISTERS; r++) all |= m.v[r];
    int found = 0;
    for (int k = 0; k < WIDTH; k++) found |= all[k];
    return found != 0;
}

// table[index] of each lane, a gather
template <class T> FN I look_up(const T *table, I index) {
    I b;
    EACH for (int k = 0; k < WIDTH; k++) b.v[r][k] = (int)table[index.v[r][k]];
    return b;
}
FN F look_up(const float *table, I index) {
    F b;
    EACH for (int k = 0; k < WIDTH; k++) b.v[r][k] = table[index.v[r][k]];
    return b;
}

// What follows works on one register, with several numbers of one lane in it.

typedef u16 Shorts __attribute__((vector_size(WIDTH * 2)));
typedef float AnyFloat __attribute__((may_alias));

// The number of one lane, from memory.
FN float lane(const F &a, int k) { return ((const AnyFloat *)&a)[k]; }

FN Ints widen(const u16 *numbers) {
#if defined(__AVX512F__)
    const __m256i wide = _mm256_loadu_si256((const __m256i *)numbers);
    return (Ints)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, wide);
#else
    Shorts shorts;
    memcpy(&shorts, numbers, sizeof shorts);
    return __builtin_convertvector(shorts, Ints);
#endif
}

// Registers that hold a table of eight. A wider register has it twice.
enum { EIGHT = WIDTH < 8 ? 8 / WIDTH : 1 };

// table[index & 7]
FN Floats pick8(const Floats *table, Ints index) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_permutexvar_ps((__mmask16)-1, (__m512i)index, (__m512)table[0]);
#elif defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps((__m256)table[0], (__m256i)index);
#else
    Floats picked;
    for (int k = 0; k < WIDTH; k++) picked[k] = ((const AnyFloat *)table)[index[k] & 7];
    return picked;
#endif
}

// table[index & 3] of a table of four, which every four numbers of the register repeat
FN Floats pick4(Floats table, Ints index) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_permutevar_ps((__mmask16)-1, (__m512)table, (__m512i)index);
#elif defined(__AVX2__)
    return (Floats)_mm256_permutevar_ps((__m256)table, (__m256i)index);
#else
    Floats picked;
    for (int k = 0; k < WIDTH; k++) picked[k] = table[index[k] & 3];
    return picked;
#endif
}

FN float smallest(Floats a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256 eight = _mm256_min_ps(_mm512_maskz_extractf32x8_ps((__mmask8)-1, (__m512)a, 0),
                                 _mm512_maskz_extractf32x8_ps((__mmask8)-1, (__m512)a, 1));
#else
    __m256 eight = (__m256)a;
#endif
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_movehdup_ps(four)));
#else
    float least = a[0];
    for (int k = 1; k < WIDTH; k++) least = a[k] < least ? a[k] : least;
    return least;
#endif
}

// Bit k says whether number k of the register is `b`.
FN u32 where_equal(Floats a, float b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_EQ_OQ);
#elif defined(__AVX2__)
    return (u32)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(b), _CMP_EQ_OQ));
#else
    u32 found = 0;
    for (int k = 0; k < WIDTH; k++) found |= (u32)(a[k] == b) << k;
    return found;
#endif
}

#endif

FN F absolute(F a) { return from_bits(bits(a) & 0x7fffffff); }
