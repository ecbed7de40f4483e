/* x (M, K) int8 times W (N, K) int8 -> y (M, N) int32, exact. K and N are macros; K is a multiple of 16.

   int8_rows: up to ROWS rows, dot products of four; a warp has two columns, its lanes 16 bytes of each.
   int8_gemm: tensor cores; a block has 128 x 128, eight warps of 64 x 32, K in pieces of 64, three of them under way. */
#include "warp.cuh"

#ifndef ROWS
#define ROWS 1
#endif

#define ROWS_WARPS 4
#define ROWS_COLUMNS 2

extern "C" __global__ void __launch_bounds__(32 * ROWS_WARPS)
int8_rows(const int8_t *__restrict__ x, const int8_t *__restrict__ w, int32_t *__restrict__ y, int m) {
    int lane = threadIdx.x % 32;
    int first = (blockIdx.x * ROWS_WARPS + threadIdx.x / 32) * ROWS_COLUMNS;
    if (first >= N) return;
    int sums[ROWS][ROWS_COLUMNS] = {};
#pragma unroll 4
    for (int k = lane * 16; k < K; k += 512) {
        int4 weight[ROWS_COLUMNS];
#pragma unroll
        for (int c = 0; c < ROWS_COLUMNS; c++) {
            int column = first + c < N ? first + c : N - 1;
            weight[c] = *reinterpret_cast<const int4 *>(w + (int64_t)column * K + k);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            int row = r < m ? r : m - 1;
            int4 value = *reinterpret_cast<const int4 *>(x + (int64_t)row * K + k);
#pragma unroll
            for (int c = 0; c < ROWS_COLUMNS; c++) {
                int sum = dot4(value.x, weight[c].x, sums[r][c]);
                sum = dot4(value.y, weight[c].y, sum);
                sum = dot4(value.z, weight[c].z, sum);
                sums[r][c] = dot4(value.w, weight[c].w, sum);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < ROWS_COLUMNS; c++) {
            int sum = lanes_sum(sums[r][c]);
            if (lane == 0 && r < m && first + c < N) y[(int64_t)r * N + first + c] = sum;
        }
    }
}

#define TILE 128
#define DEPTH 64
#define STAGES 3
#define THREADS 256

/* 64-byte rows; 16-byte pieces are swapped so that eight rows of a matrix lie in different banks */
__device__ __forceinline__ int place(int row, int piece) { return row * DEPTH + ((piece ^ ((row >> 1) & 3)) * 16); }

__device__ __forceinline__ void fetch(int8_t *to, const int8_t *from, int start, int rows, int k) {
#pragma unroll
    for (int i = 0; i < TILE * DEPTH / 16 / THREADS; i++) {
        int index = threadIdx.x + i * THREADS, row = index / 4, piece = index % 4;
        bool inside = start + row < rows && k + piece * 16 < K;
        copy16(to + place(row, piece), inside ? from + (int64_t)(start + row) * K + k + piece * 16 : from, inside);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
int8_gemm(const int8_t *__restrict__ x, const int8_t *__restrict__ w, int32_t *__restrict__ y, int m) {
    __shared__ __align__(128) int8_t xs[STAGES][TILE * DEPTH];
    __shared__ __align__(128) int8_t ws[STAGES][TILE * DEPTH];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE, warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    const int steps = (K + DEPTH - 1) / DEPTH;
    int sums[4][4][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            fetch(xs[s], x, row0, m, s * DEPTH);
            fetch(ws[s], w, column0, N, s * DEPTH);
        }
        copies_sent();
    }
    for (int step = 0; step < steps; step++) {
        copies_arrived<STAGES - 2>();
        __syncthreads();
        int next = step + STAGES - 1;
        if (next < steps) {
            fetch(xs[next % STAGES], x, row0, m, next * DEPTH);
            fetch(ws[next % STAGES], w, column0, N, next * DEPTH);
        }
        copies_sent();
        const int8_t *xt = xs[step % STAGES], *wt = ws[step % STAGES];
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
                for (int j = 0; j < 4; j++) multiply_s8(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = row0 + warp_row + i * 16 + lane / 4 + e / 2 * 8;
                int column = column0 + warp_column + j * 8 + lane % 4 * 2 + e % 2;
                if (row < m && column < N) y[(int64_t)row * N + column] = sums[i][j][e];
            }
        }
    }
}
