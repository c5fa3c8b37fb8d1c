// The quantizers on a GPU: a thread quantizes one block of one row, or, of a type with a codebook, fits
// one part of a super-block. Compiled at run time by NVRTC, one type at a time: QUANTIZER or FITTED names
// its struct, WITH_IMPORTANCE says whether there is an importance.
//
// Neighbouring threads have neighbouring rows of the same columns, as lanes have on a CPU. So they read
// the same importance. A block's values wait in the thread's local memory, which the hardware keeps
// transposed: neighbouring threads read neighbouring words.
namespace reap {  // CUDA has some of the names itself
#include "dequantize.h"
#include "iq2.h"
#include "iq3.h"
#include "k_quants.h"
#include "nonlinear.h"
#include "plain.h"
#include "symmetric_k.h"

// How values are stored: they become float32 where they are read, which is exact.
enum { AS_F32, AS_F16, AS_BF16 };
#define NOT_FINITE 0x7f800000u  // the bits of infinity; those of NaN are larger

// Values 8 * i to 8 * i + 7 of 16-bit values, or half as many of 32-bit ones.
FN void widen(uint4 loaded, int stored_as, F *x) {
    const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    UNROLL for (int k = 0; k < 4; k++) {
        if (stored_as == AS_F32) {
            x[k] = from_bits((I)words[k]);
        } else if (stored_as == AS_BF16) {
            x[2 * k] = from_bits((I)(words[k] << 16));
            x[2 * k + 1] = from_bits((I)(words[k] & 0xffff0000u));
        } else {
            x[2 * k] = half_value((I)(words[k] & 0xffffu));
            x[2 * k + 1] = half_value((I)(words[k] >> 16));
        }
    }
}

// COUNT values from number `first` on. Both are multiples of 16, so that reads are aligned.
template <int COUNT> FN void read(const uint4 *values, int stored_as, i64 first, F *x) {
    if (stored_as == AS_F32) {
        for (int i = 0; i < COUNT / 4; i++) widen(values[first / 4 + i], AS_F32, x + 4 * i);
    } else if (stored_as == AS_BF16) {
        for (int i = 0; i < COUNT / 8; i++) widen(values[first / 8 + i], AS_BF16, x + 8 * i);
    } else {
        for (int i = 0; i < COUNT / 8; i++) widen(values[first / 8 + i], AS_F16, x + 8 * i);
    }
}

// The bits of the largest |x| of each row: beyond NOT_FINITE if the row has infinity or NaN. A warp for
// each row.
extern "C" __global__ void find_largest(const uint4 *values, int stored_as, int n_rows, int n_columns,
                                        u32 *largest) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= n_rows) return;
    const int step = stored_as == AS_F32 ? 4 : 8;
    const uint4 *row_values = values + (i64)row * n_columns / step;
    u32 found = 0;
    for (int i = threadIdx.x % 32; i < n_columns / step; i += 32) {
        F x[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
        widen(row_values[i], stored_as, x);
        UNROLL for (int k = 0; k < 8; k++) found = max(found, (u32)bits(absolute(x[k])));
    }
    for (int k = 16; k; k /= 2) found = max(found, __shfl_down_sync(0xffffffffu, found, k));
    if (threadIdx.x % 32 == 0) largest[row] = found;
}

// The mean square of each row, added up in the order of its columns. A thread for each row: 32 of them
// read tiles of 32 columns together. Start it with 32 threads in a block.
extern "C" __global__ void find_mean_squares(const uint4 *values, int stored_as, int n_rows,
                                             int n_columns, float *mean_squares) {
    __shared__ F tile[32][33];
    const int first = blockIdx.x * 32, own = threadIdx.x, per_read = stored_as == AS_F32 ? 4 : 8;
    F sum = 0.f;
    for (int column = 0; column < n_columns; column += 32) {
        for (int i = own; i < 32 * 32 / per_read; i += 32) {
            const int row = i / (32 / per_read), place = i % (32 / per_read) * per_read;
            F x[8];
            if (first + row < n_rows)
                widen(values[((i64)(first + row) * n_columns + column + place) / per_read], stored_as, x);
            for (int k = 0; k < per_read; k++) tile[row][place + k] = x[k];
        }
        __syncwarp();
        for (int i = 0; i < 32; i++) sum = sum + tile[own][i] * tile[own][i];
        __syncwarp();
    }
    if (first + own < n_rows) mean_squares[first + own] = sum / (F)n_columns;
}

#if defined(QUANTIZER) || defined(FITTED)

template <int N_BYTES> FN void store(const I *words, u8 *target) {
    if (N_BYTES % 16 == 0) {
        UNROLL for (int i = 0; i < N_BYTES / 16; i++)
            ((int4 *)target)[i] = make_int4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    } else if (N_BYTES % 4 == 0) {
        UNROLL for (int i = 0; i < N_BYTES / 4; i++) ((I *)target)[i] = words[i];
    } else {
        UNROLL for (int i = 0; i < N_BYTES / 2; i++)
            ((u16 *)target)[i] = (u16)((u32)words[i / 2] >> 16 * (i % 2));
    }
}

#endif

#ifdef QUANTIZER

// Rows of `values` (n_rows x n_columns) as blocks of one type. `importance` holds a value for each column
// of each matrix, and `matrix_of` says which matrix a row is of. A row with `largest` beyond NOT_FINITE
// is left out. `is_odd` is set for rows whose bytes mean nothing: ggml must do them.
extern "C" __global__ void
quantize(const uint4 *values, int stored_as, int n_rows, int n_columns, const float *importance,
         const int *matrix_of, const u32 *largest, const float *mean_squares, const void *tables,
         u8 *target, u8 *is_odd) {
    typedef QUANTIZER T;
    static_assert(T::BYTES % 2 == 0 && T::COLUMNS % 32 == 0, "blocks begin at even bytes");
    const int n_blocks = n_columns / T::COLUMNS;
    const i64 number = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int row = (int)(number % n_rows), block = (int)(number / n_rows);
    if (block >= n_blocks || largest[row] >= NOT_FINITE) return;
    F x[T::COLUMNS];
    I words[(T::BYTES + 3) / 4];
    read<T::COLUMNS>(values, stored_as, (i64)row * n_columns + block * T::COLUMNS, x);
    const float *weights = WITH_IMPORTANCE ? importance + (i64)matrix_of[row] * n_columns + block * T::COLUMNS : 0;
    const F mean_square = mean_squares ? mean_squares[row] : 0.f;
    M odd = T::template quantize<WITH_IMPORTANCE>(x, weights, mean_square, words);
    store<T::BYTES>(words, target + ((i64)row * n_blocks + block) * T::BYTES);
    if (odd) is_odd[row] = 1;
}

#endif

#ifdef FITTED

// The same for a type with a codebook, which `tables` has: a thread for each part of a super-block,
// neighbours beside each other. Each adds up the squares of all values, which is little beside its fit;
// the first one packs what all left. Start it with THREADS threads in a block.
extern "C" __global__ void
quantize(const uint4 *values, int stored_as, int n_rows, int n_columns, const float *importance,
         const int *matrix_of, const u32 *largest, const float *, const void *tables, u8 *target,
         u8 *is_odd) {
    typedef FITTED T;
    enum { THREADS = 128 };
    __shared__ T::Part parts[THREADS];
    const int n_blocks = n_columns / T::COLUMNS, part = threadIdx.x % T::PARTS;
    const i64 number = ((i64)blockIdx.x * THREADS + threadIdx.x) / T::PARTS;  // of the super-block
    const int row = (int)(number / n_blocks), column = (int)(number % n_blocks) * T::COLUMNS;
    const bool is_wanted = row < n_rows && largest[row] < NOT_FINITE;
    M odd = false;
    if (is_wanted) {
        const i64 first = (i64)row * n_columns + column;
        F x[32], sum = 0.f;
        for (int i = 0; i < T::COLUMNS; i += 32) {
            read<32>(values, stored_as, first + i, x);
            sum = add_squares<32>(sum, x);
        }
        const F spread = spread_of<T>(sum);
        odd = !is_finite(spread);
        read<T::WIDE>(values, stored_as, first + T::WIDE * part, x);
        const float *weights =
            WITH_IMPORTANCE ? importance + (i64)matrix_of[row] * n_columns + column + T::WIDE * part : 0;
        T::template fit<WITH_IMPORTANCE>(x, weights, spread, *(const Codebook *)tables, parts[threadIdx.x], odd);
    }
    __syncthreads();
    if (is_wanted && part == 0) {
        I words[(T::BYTES + 3) / 4];
        T::pack(parts + threadIdx.x, words, odd);
        store<T::BYTES>(words, target + number * T::BYTES);
    }
    if (odd) is_odd[row] = 1;
}

#endif

#ifdef READER

// Blocks as float32: a thread for each group of neighbours.
extern "C" __global__ void dequantize(const u8 *raw, i64 n_blocks, const u8 *codebook, float *out) {
    enum { GROUPS = READER::COLUMNS / READER::GROUP };
    const i64 number = (i64)blockIdx.x * blockDim.x + threadIdx.x, block = number / GROUPS;
    const int group = (int)(number % GROUPS);
    if (block >= n_blocks) return;
    READER::read(raw + block * READER::BYTES, group, codebook,
                 out + block * READER::COLUMNS + group * READER::GROUP);
}

#endif
}  // namespace reap
