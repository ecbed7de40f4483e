/* x (batch, m, k) int8 or uint8 times w (batch, n, k) int8 -> y (batch, m, n) int32, exact. k is a multiple of 16.

   int8_rows: dot products of four; a warp has one row and two columns, its lanes 16 bytes of each.
   int8_gemm: tensor cores; a block has 128 x 128, eight warps of 64 x 32, k in pieces of 64, three of them under way. */
#pragma once
#include "warp.cuh"

namespace integer {
enum { WARPS = 4, COLUMNS = 2, TILE = 128, DEPTH = 64, STAGES = 3, THREADS = 256 };

template <class X>
__device__ __forceinline__ void rows(const X *__restrict__ x, const int8_t *__restrict__ w, int32_t *__restrict__ y,
                                     int m, int n, int k) {
    Tile tile = tile_of_block(m, (n + WARPS * COLUMNS - 1) / (WARPS * COLUMNS));
    int lane = threadIdx.x % 32, first = (tile.column * WARPS + threadIdx.x / 32) * COLUMNS;
    if (first >= n) return;
    const X *row = x + ((int64_t)tile.batch * m + tile.row) * k;
    const int8_t *matrix = w + (int64_t)tile.batch * n * k;
    int sums[COLUMNS] = {};
#pragma unroll 4
    for (int at = lane * 16; at < k; at += 512) {
        int4 value = *reinterpret_cast<const int4 *>(row + at);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int4 weight = *reinterpret_cast<const int4 *>(matrix + (int64_t)least(first + c, n - 1) * k + at);
            int sum = dot4(X(), value.x, weight.x, sums[c]);
            sum = dot4(X(), value.y, weight.y, sum);
            sum = dot4(X(), value.z, weight.z, sum);
            sums[c] = dot4(X(), value.w, weight.w, sum);
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        int sum = lanes_sum(sums[c]);
        if (lane == 0 && first + c < n) y[((int64_t)tile.batch * m + tile.row) * n + first + c] = sum;
    }
}

/* 64-byte rows; 16-byte pieces are swapped so that eight rows of a matrix lie in different banks */
__device__ __forceinline__ int place(int row, int piece) { return row * DEPTH + ((piece ^ ((row >> 1) & 3)) * 16); }

template <class T>
__device__ __forceinline__ void fetch(T *to, const T *__restrict__ from, int start, int rows, int at, int k) {
#pragma unroll
    for (int i = 0; i < TILE * DEPTH / 16 / THREADS; i++) {
        int index = threadIdx.x + i * THREADS, row = index / 4, piece = index % 4;
        bool inside = start + row < rows && at + piece * 16 < k;
        copy16(to + place(row, piece), inside ? from + (int64_t)(start + row) * k + at + piece * 16 : from, inside);
    }
}

template <class X>
__device__ __forceinline__ void gemm(const X *__restrict__ x, const int8_t *__restrict__ w, int32_t *__restrict__ y,
                                     int m, int n, int k) {
    __shared__ __align__(128) X xs[STAGES][TILE * DEPTH];
    __shared__ __align__(128) int8_t ws[STAGES][TILE * DEPTH];
    Tile tile = tile_of_block((m + TILE - 1) / TILE, (n + TILE - 1) / TILE);
    x += (int64_t)tile.batch * m * k, w += (int64_t)tile.batch * n * k, y += (int64_t)tile.batch * m * n;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row0 = tile.row * TILE, column0 = tile.column * TILE, warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    const int steps = (k + DEPTH - 1) / DEPTH;
    int sums[4][4][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            fetch(xs[s], x, row0, m, s * DEPTH, k);
            fetch(ws[s], w, column0, n, s * DEPTH, k);
        }
        copies_sent();
    }
    for (int step = 0; step < steps; step++) {
        copies_arrived<STAGES - 2>();
        __syncthreads();
        int next = step + STAGES - 1;
        if (next < steps) {
            fetch(xs[next % STAGES], x, row0, m, next * DEPTH, k);
            fetch(ws[next % STAGES], w, column0, n, next * DEPTH, k);
        }
        copies_sent();
        const X *xt = xs[step % STAGES];
        const int8_t *wt = ws[step % STAGES];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) matrices(a[i], xt + place(warp_row + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < 2; j++)
                matrices(b[j], wt + place(warp_column + j * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) multiply(X(), sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) store(y, sums[i][j], row0 + warp_row + i * 16, column0 + warp_column + j * 8, m, n);
    }
}
} // namespace integer
