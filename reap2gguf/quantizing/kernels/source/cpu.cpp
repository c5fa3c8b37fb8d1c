// The quantizers on a CPU: rows side by side, one in each lane. Called through ctypes.
#include <utility>

#include "k_quants.h"

#ifndef SOURCE_HASH
#define SOURCE_HASH ""  // of a trial
#endif

// Transposes a square of WIDTH rows in registers: blocks of D x D change places, for D of 1, 2, 4 ...
template <int D, int... K>
FN void exchange(Floats &a, Floats &b, std::integer_sequence<int, K...>) {
    Floats low = __builtin_shufflevector(a, b, (K & D ? WIDTH + (K ^ D) : K)...);
    b = __builtin_shufflevector(a, b, (K & D ? WIDTH + K : K ^ D)...);
    a = low;
}
template <int D> FN void transpose(Floats *square) {
    if constexpr (D < WIDTH) {
        for (int i = 0; i < WIDTH; i++)
            if (!(i & D))
                exchange<D>(square[i], square[i | D], std::make_integer_sequence<int, WIDTH>());
        transpose<2 * D>(square);
    }
}

// LANES rows of `columns` values, from row-major memory to one F per column. If there are fewer
// rows, the last one is repeated.
static void gather(const float *rows, i64 stride, int n_rows, int columns, F *x) {
    for (int r = 0; r < REGISTERS; r++)
        for (int column = 0; column < columns; column += WIDTH) {
            Floats square[WIDTH];
            for (int k = 0; k < WIDTH; k++) {
                const int row = r * WIDTH + k;
                const float *values = rows + stride * (row < n_rows ? row : n_rows - 1);
                memcpy(&square[k], values + column, sizeof(Floats));
            }
            transpose<1>(square);
            for (int k = 0; k < WIDTH; k++) x[column + k].v[r] = square[k];
        }
}

template <class T, bool WEIGHTED>
static void quantize_rows(const float *rows, i64 n_rows, i64 n_columns, const float *importance,
                          u8 *target, u8 *is_odd) {
    enum { N_WORDS = (T::BYTES + 3) / 4 };
    const i64 n_blocks = n_columns / T::COLUMNS, row_bytes = n_blocks * T::BYTES;
    F x[T::COLUMNS];
    I words[N_WORDS];
    for (i64 first = 0; first < n_rows; first += LANES) {
        const int n = n_rows - first < LANES ? (int)(n_rows - first) : LANES;
        for (i64 block = 0; block < n_blocks; block++) {
            const i64 column = block * T::COLUMNS;
            gather(rows + first * n_columns + column, n_columns, n, T::COLUMNS, x);
            M odd = T::template quantize<WEIGHTED>(x, importance + column, F(0.f), words);
            for (int row = 0; row < n; row++) {
                const int r = row / WIDTH, k = row % WIDTH;
                u32 packed[N_WORDS];
                for (int i = 0; i < N_WORDS; i++) packed[i] = (u32)words[i].v[r][k];
                memcpy(target + (first + row) * row_bytes + block * T::BYTES, packed, T::BYTES);
                is_odd[first + row] |= odd.v[r][k] != 0;
            }
        }
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the object was compiled from.
EXPORT const char *reap_source() { return SOURCE_HASH; }

// Rows of float32 as blocks of a ggml type; 0 if the type is none of these. `importance` has a value
// for each column, or is null. `is_odd` is set for rows whose bytes mean nothing: ggml must do them.
EXPORT int reap_quantize(int type, const float *rows, i64 n_rows, i64 n_columns,
                         const float *importance, const void *tables, u8 *target, u8 *is_odd) {
    (void)tables;
#define CASE(number, ...)                                                                         \
    case number:                                                                                  \
        if (importance)                                                                           \
            quantize_rows<__VA_ARGS__, true>(rows, n_rows, n_columns, importance, target, is_odd); \
        else                                                                                      \
            quantize_rows<__VA_ARGS__, false>(rows, n_rows, n_columns, rows, target, is_odd);     \
        return 1;
    switch (type) {
        CASE(12, AffineK<15>)
        CASE(13, AffineK<31>)
    }
    return 0;
}
