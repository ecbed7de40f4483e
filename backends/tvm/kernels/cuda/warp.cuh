/* What the kernels ask of a warp: PTX on a GPU; host.h has the same functions for a processor, after the PTX manual. */
#pragma once
#ifdef __CUDACC__
#include <cstdint>

/* a - b of two bfloat16 pairs, exact for the small whole numbers that codes are */
__device__ __forceinline__ uint32_t pair_sub(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return r;
}

__device__ __forceinline__ uint32_t bits_of(float a) { return __float_as_uint(a); }
__device__ __forceinline__ float float_of(uint32_t a) { return __uint_as_float(a); }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }

template <class T> __device__ __forceinline__ T lanes_sum(T v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

__device__ __forceinline__ int dot4(int8_t, int a, int b, int c) { return __dp4a(a, b, c); }

__device__ __forceinline__ int dot4(uint8_t, int a, int b, int c) {
    int r;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

/* 16 bytes from global to shared memory; zeros where not ``inside`` */
__device__ __forceinline__ void copy16(void *to, const void *from, bool inside) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_sent() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT> __device__ __forceinline__ void copies_arrived() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* four matrices of 8 rows of 16 bytes; lane 8 m + r gives the address of row r of matrix m */
__device__ __forceinline__ void matrices(uint32_t (&d)[4], const void *row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at) : "memory");
}

#define MULTIPLY(FORM, HELD, d, a, b0, b1)                                                                             \
    asm volatile("mma.sync.aligned." FORM " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                     \
                 : HELD(d[0]), HELD(d[1]), HELD(d[2]), HELD(d[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

/* 16 x 32 times 32 x 8; the first argument is of the type of a, b is int8 */
__device__ __forceinline__ void multiply(int8_t, int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MULTIPLY("m16n8k32.row.col.s32.s8.s8.s32", "+r", d, a, b0, b1);
}

__device__ __forceinline__ void multiply(uint8_t, int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MULTIPLY("m16n8k32.row.col.s32.u8.s8.s32", "+r", d, a, b0, b1);
}

/* 16 x 16 times 16 x 8, bfloat16 into float32 */
__device__ __forceinline__ void multiply_pairs(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MULTIPLY("m16n8k16.row.col.f32.bf16.bf16.f32", "+f", d, a, b0, b1);
}
#else
#include "host.h"
#endif

struct Tile {
    int batch, row, column;
};

/* where a block is among the tiles of ``batch`` products; columns change fastest */
__device__ __forceinline__ Tile tile_of_block(int rows, int columns) {
    int block = blockIdx.x, rest = block / columns;
    return {rest / rows, rest % rows, block % columns};
}

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }

/* a lane's four sums of a tile of 16 x 8 from (row, column) on */
template <class T>
__device__ __forceinline__ void store(T *__restrict__ y, const T (&sums)[4], int row, int column, int m, int n) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        int r = row + lane / 4 + e / 2 * 8, c = column + lane % 4 * 2 + e % 2;
        if (r < m && c < n) y[(int64_t)r * n + c] = sums[e];
    }
}
