// gpu.cu on a processor: what CUDA has besides C++, and a loop over the threads of a launch. Threads
// run one after the other, the last of a block first, so kernels whose threads wait for one another
// cannot run here, except where the first thread alone reads what the others of its block left.
#include <math.h>
#include <string.h>

#define __CUDACC__
#define __CUDACC_RTC__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))

struct uint4 { unsigned x, y, z, w; };
struct int4 { int x, y, z, w; };
struct ushort4 { unsigned short x, y, z, w; };
struct Place { int x; };
static Place blockIdx, blockDim, threadIdx;

static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float __int_as_float(int word) { float f; memcpy(&f, &word, 4); return f; }
static inline int __float_as_int(float f) { int word; memcpy(&word, &f, 4); return word; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static inline unsigned __shfl_down_sync(unsigned, unsigned value, int) { return value; }
static inline void __syncwarp() {}
static inline void __syncthreads() {}
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long both = low | (unsigned long long)high << 32;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}

#include "gpu.cu"

template <class Kernel, class... Values> static void launch(int n_blocks, Kernel kernel, Values... values) {
    blockDim.x = 128;
    for (blockIdx.x = 0; blockIdx.x < n_blocks; blockIdx.x++)
        for (threadIdx.x = 127; threadIdx.x >= 0; threadIdx.x--) kernel(values...);
}

#if defined(QUANTIZER) || defined(FITTED)
extern "C" void run_quantize(int n_blocks, const void *values, int stored_as, int n_rows, int n_columns,
                             const float *importance, const int *matrix_of, const unsigned *largest,
                             const float *mean_squares, const void *tables, unsigned char *target,
                             unsigned char *is_odd) {
    launch(n_blocks, reap::quantize, (const uint4 *)values, stored_as, n_rows, n_columns, importance,
           matrix_of, largest, mean_squares, tables, target, is_odd);
}
#endif

#ifdef READER
extern "C" void run_dequantize(int n_blocks, const unsigned char *raw, long long count,
                               const unsigned char *codebook, float *out) {
    launch(n_blocks, reap::dequantize, raw, count, codebook, out);
}
#endif
