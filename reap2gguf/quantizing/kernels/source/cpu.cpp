// The quantizers on a CPU: rows side by side, one in each lane. Called through ctypes.
#include <utility>

#include "dequantize.h"
#include "iq2.h"
#include "iq3.h"
#include "nonlinear.h"
#include "plain.h"
#include "symmetric_k.h"

#ifndef SOURCE_HASH
#define SOURCE_HASH ""  // of a trial
#endif

// The numbers of the types in ggml.h and in GGUF files.
enum GgmlType {
    GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q4_1 = 3, GGML_Q5_0 = 6, GGML_Q5_1 = 7, GGML_Q8_0 = 8,
    GGML_Q2_K = 10, GGML_Q3_K = 11, GGML_Q4_K = 12, GGML_Q5_K = 13, GGML_Q6_K = 14,
    GGML_IQ2_XXS = 16, GGML_IQ2_XS = 17, GGML_IQ3_XXS = 18, GGML_IQ4_NL = 20, GGML_IQ3_S = 21,
    GGML_IQ2_S = 22, GGML_IQ4_XS = 23, GGML_BF16 = 30,
};

// Transposes squares of SIDE x SIDE, side by side in SIDE registers: blocks of D x D change places, for
// D of 1, 2, 4 ...
template <int D, int... K>
FN void exchange(Floats &a, Floats &b, std::integer_sequence<int, K...>) {
    Floats low = __builtin_shufflevector(a, b, (K & D ? WIDTH + (K ^ D) : K)...);
    b = __builtin_shufflevector(a, b, (K & D ? WIDTH + K : K ^ D)...);
    a = low;
}
template <int D, int SIDE> FN void transpose(Floats *squares) {
    if constexpr (D < SIDE) {
        for (int i = 0; i < SIDE; i++)
            if (!(i & D))
                exchange<D>(squares[i], squares[i | D], std::make_integer_sequence<int, WIDTH>());
        transpose<2 * D, SIDE>(squares);
    }
}

// How rows are stored: they become float32 where they are read, which is exact.
enum { AS_F32, AS_BF16 };

// Rows of values, one after the other.
struct Rows {
    const void *values;
    int stored_as;
    i64 stride;  // values from one row to the next
};

FN Floats load(const float *values) {
    Floats loaded;
    memcpy(&loaded, values, sizeof loaded);
    return loaded;
}
FN Floats load(const u16 *values) { return (Floats)(widen(values) << 16); }

// LANES rows of `columns` values, from row-major memory to one F per column. If there are fewer
// rows, the last one is repeated.
template <class Value>
FN void gather_as(const Value *first, i64 stride, int n_rows, int columns, F *x) {
    for (int r = 0; r < REGISTERS; r++)
        for (int column = 0; column < columns; column += WIDTH) {
            Floats square[WIDTH];
            for (int k = 0; k < WIDTH; k++) {
                const int row = r * WIDTH + k;
                square[k] = load(first + stride * (row < n_rows ? row : n_rows - 1) + column);
            }
            transpose<1, WIDTH>(square);
            for (int k = 0; k < WIDTH; k++) x[column + k].v[r] = square[k];
        }
}
static void gather(const Rows &rows, i64 row, i64 column, int n_rows, int columns, F *x) {
    const i64 first = row * rows.stride + column;
    if (rows.stored_as == AS_BF16)
        gather_as((const u16 *)rows.values + first, rows.stride, n_rows, columns, x);
    else
        gather_as((const float *)rows.values + first, rows.stride, n_rows, columns, x);
}

// The first BYTES bytes of the words of each lane, to rows of a file that are `stride` bytes apart.
template <int BYTES> FN void scatter(const I *words, u8 *target, i64 stride, int n_rows) {
    enum { N_WORDS = (BYTES + 3) / 4, SIDE = WIDTH < 8 ? WIDTH : 8 };
    for (int r = 0; r < REGISTERS; r++)
        for (int first = 0; first < N_WORDS; first += SIDE) {
            Floats squares[SIDE];
            for (int k = 0; k < SIDE; k++)
                squares[k] = (Floats)words[first + k < N_WORDS ? first + k : first].v[r];
            transpose<1, SIDE>(squares);
            const int n_bytes = BYTES - 4 * first;
            for (int k = 0; k < WIDTH; k++) {
                const int row = r * WIDTH + k;
                if (row >= n_rows) break;
                const u8 *from = (const u8 *)&squares[k % SIDE] + k / SIDE * (4 * SIDE);
                u8 *to = target + stride * row + 4 * first;
                if (n_bytes >= 4 * SIDE) memcpy(to, from, 4 * SIDE);
                else memcpy(to, from, BYTES % (4 * SIDE));
            }
        }
}

// Does a type with importance ask for the mean square of whole rows? Those that do say USES_ROW.
template <class T> constexpr auto uses_row(int) -> decltype(T::USES_ROW, true) { return true; }
template <class T> constexpr bool uses_row(long) { return false; }

// The mean of the squares of each row, added in their order.
static F row_mean_square(const Rows &rows, i64 first, int n_rows) {
    F x[32], sum = 0.f;
    for (i64 column = 0; column < rows.stride; column += 32) {
        gather(rows, first, column, n_rows, 32, x);
        for (int i = 0; i < 32; i++) sum = sum + x[i] * x[i];
    }
    return sum / F((float)rows.stride);
}

template <class T, bool WEIGHTED>
static void quantize_rows(const Rows &rows, i64 n_rows, const float *importance, const void *tables,
                          u8 *target, u8 *is_odd) {
    const i64 n_blocks = rows.stride / T::COLUMNS, row_bytes = n_blocks * T::BYTES;
    F x[T::COLUMNS];
    I words[(T::BYTES + 3) / 4];
    for (i64 first = 0; first < n_rows; first += LANES) {
        const int n = n_rows - first < LANES ? (int)(n_rows - first) : LANES;
        F mean_square = 0.f;
        if (WEIGHTED && uses_row<T>(0))
            mean_square = row_mean_square(rows, first, n);
        for (i64 block = 0; block < n_blocks; block++) {
            const i64 column = block * T::COLUMNS;
            gather(rows, first, column, n, T::COLUMNS, x);
            M odd = quantize_block<T, WEIGHTED>((const T *)0, x, importance + column, mean_square,
                                                words, tables);
            scatter<T::BYTES>(words, target + first * row_bytes + block * T::BYTES, row_bytes, n);
            if (any(odd))
                for (int row = 0; row < n; row++)
                    is_odd[first + row] |= odd.v[row / WIDTH][row % WIDTH] != 0;
        }
    }
}

// F16 and BF16 have no blocks: here the lanes are neighbours in a row. A row is odd if it has a value
// beyond the type's range.
template <bool BRAIN>
static void round_halves(const Rows &rows, i64 n_rows, u8 *target, u8 *is_odd) {
    const int infinity = BRAIN ? 0x7f80 : 0x7c00;
    const i64 n_columns = rows.stride;
    for (i64 row = 0; row < n_rows; row++, target += 2 * n_columns)
        for (i64 first = 0; first < n_columns; first += LANES) {
            const int count = n_columns - first < LANES ? (int)(n_columns - first) : LANES;
            const i64 place = row * n_columns + first;
            float in[LANES] = {0};
            u16 stored[LANES] = {0}, out[LANES];
            u32 rounded[LANES];
            F x;
            if (rows.stored_as == AS_BF16) {
                memcpy(stored, (const u16 *)rows.values + place, count * sizeof *stored);
                EACH x.v[r] = load(stored + r * WIDTH);
            } else {
                memcpy(in, (const float *)rows.values + place, count * sizeof *in);
                EACH x.v[r] = load(in + r * WIDTH);
            }
            I halves = BRAIN ? bfloat_bits(x) : half_bits(x);
            is_odd[row] |= any((halves & infinity) == I(infinity));
            memcpy(rounded, halves.v, sizeof rounded);
            for (int k = 0; k < LANES; k++) out[k] = (u16)rounded[k];
            memcpy(target + 2 * first, out, count * sizeof *out);
        }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the object was compiled from.
EXPORT const char *reap_source() { return SOURCE_HASH; }

// Rows, stored as float32 or bfloat16, as blocks of a ggml type; 0 if the type is none of these.
// `importance` has a value for each column, or is null. `tables` is the Codebook of a type that has one. `is_odd` is set for
// rows whose bytes mean nothing: ggml must do them.
EXPORT int reap_quantize(int type, int stored_as, const void *values, i64 n_rows, i64 n_columns,
                         const float *importance, const void *tables, u8 *target, u8 *is_odd) {
    const Rows rows = {values, stored_as, n_columns};
#define QUANTIZE(T, WEIGHTED, importance) \
    quantize_rows<T, WEIGHTED>(rows, n_rows, importance, tables, target, is_odd)
#define CASE(ggml_type, ...)                                      \
    case ggml_type:                                              \
        if (importance) QUANTIZE(__VA_ARGS__, true, importance); \
        else QUANTIZE(__VA_ARGS__, false, (const float *)values);                \
        return 1;
#define CASE_WEIGHTED(ggml_type, ...) /* ggml ends the process without importance */ \
    case ggml_type:                                                               \
        if (importance) QUANTIZE(__VA_ARGS__, true, importance);                  \
        return importance || !n_rows;
    switch (type) {
        case GGML_F16: round_halves<false>(rows, n_rows, target, is_odd); return 1;
        case GGML_BF16: round_halves<true>(rows, n_rows, target, is_odd); return 1;
        CASE(GGML_Q4_0, Symmetric<8>)
        CASE(GGML_Q4_1, Affine<15>)
        CASE(GGML_Q5_0, Symmetric<16>)
        CASE(GGML_Q5_1, Affine<31>)
        CASE(GGML_Q8_0, Q8)
        CASE(GGML_Q2_K, Q2K)
        CASE(GGML_Q3_K, Q3K)
        CASE(GGML_Q4_K, AffineK<15>)
        CASE(GGML_Q5_K, AffineK<31>)
        CASE(GGML_Q6_K, Q6K)
        CASE_WEIGHTED(GGML_IQ2_XXS, Iq2Xxs)
        CASE_WEIGHTED(GGML_IQ2_XS, Iq2<false>)
        CASE(GGML_IQ3_XXS, Iq3<false>)
        CASE(GGML_IQ4_NL, IQ4NL)
        CASE(GGML_IQ3_S, Iq3<true>)
        CASE(GGML_IQ2_S, Iq2<true>)
        CASE(GGML_IQ4_XS, IQ4XS)
    }
    return 0;
}

// A function of its own: inlined into another, RESTRICT is forgotten and no loop becomes lanes.
template <class T>
static __attribute__((noinline)) void read_blocks(const u8 *RESTRICT raw, i64 n_blocks,
                                                  const u8 *RESTRICT codebook, float *RESTRICT out) {
    enum { GROUPS = T::COLUMNS / T::GROUP };
    for (i64 block = 0; block < n_blocks; block++)
        for (int group = 0; group < GROUPS; group++)
            T::read(raw + block * T::BYTES, group, codebook,
                    out + block * T::COLUMNS + group * T::GROUP);
}

// `codebook`: the entries of the type's grid, which only IQ2 and IQ3 types have.
EXPORT int reap_dequantize(int type, const u8 *raw, i64 n_blocks, const u8 *codebook, float *out) {
#define READ(ggml_type, ...) \
    case ggml_type: read_blocks<__VA_ARGS__>(raw, n_blocks, codebook, out); return 1;
    switch (type) {
        READ(GGML_Q4_0, ReadPlain<false, false>)
        READ(GGML_Q4_1, ReadPlain<false, true>)
        READ(GGML_Q5_0, ReadPlain<true, false>)
        READ(GGML_Q5_1, ReadPlain<true, true>)
        READ(GGML_Q8_0, ReadQ8)
        READ(GGML_Q2_K, ReadQ2K)
        READ(GGML_Q3_K, ReadQ3K)
        READ(GGML_Q4_K, ReadAffineK<false>)
        READ(GGML_Q5_K, ReadAffineK<true>)
        READ(GGML_Q6_K, ReadQ6K)
        READ(GGML_IQ2_XXS, ReadIQ2XXS)
        READ(GGML_IQ2_XS, ReadIQ2XS)
        READ(GGML_IQ3_XXS, ReadIQ3XXS)
        READ(GGML_IQ4_NL, ReadIQ4NL)
        READ(GGML_IQ3_S, ReadIQ3S)
        READ(GGML_IQ2_S, ReadIQ2S)
        READ(GGML_IQ4_XS, ReadIQ4XS)
    }
    return 0;
}
