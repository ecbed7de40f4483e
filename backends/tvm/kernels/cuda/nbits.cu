/* x (M, K) float16 times codes of 4 bits -> y (M, N) float32. K, N and GROUP are macros; K is a multiple of 128,
   GROUP of 32 and a divisor of K or K itself. scale (N, K / GROUP) float32, zero (N, K / GROUP) uint8.

   w4_rows: one row; a warp has two columns, its lanes 32 codes (16 bytes) of each.
   w4_gemm: tensor cores; a block has 64 x 128, four warps of 64 x 32. Codes go from global memory straight to the
            lanes that multiply them. */
#include "warp.cuh"

#define GROUPS (K / GROUP)
#define MAGIC 0x64006400u /* two float16 of 1024; their low bits count in ones */

/* codes (bits 0..3 of both halves) less the zero point, as two float16: exact */
__device__ __forceinline__ uint32_t unpacked(uint32_t bits, uint32_t base) {
    return half2_sub((bits & 0x000f000fu) | MAGIC, base);
}

__device__ __forceinline__ uint32_t base_of(int zero) { return MAGIC + zero * 0x00010001u; }

#define ROWS_WARPS 4
#define ROWS_COLUMNS 2
#define PIECE 1024 /* codes of a column that a warp reads at once */

__device__ __forceinline__ float word_sum(uint32_t word, uint32_t base, uint4 x, float sum) {
    uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 weight = half2_floats(unpacked(word >> (4 * i), base)), value = half2_floats(pairs[i]);
        sum = fused(weight.x, value.x, fused(weight.y, value.y, sum));
    }
    return sum;
}

/* codes: (N, K / 32) of 16 bytes; in a word of 8, nibble i is row 2 i and nibble i + 4 is row 2 i + 1 */
extern "C" __global__ void __launch_bounds__(32 * ROWS_WARPS)
w4_rows(const uint16_t *__restrict__ x, const uint4 *__restrict__ codes, const float *__restrict__ scale,
        const uint8_t *__restrict__ zero, float *__restrict__ y) {
    int lane = threadIdx.x % 32;
    int first = (blockIdx.x * ROWS_WARPS + threadIdx.x / 32) * ROWS_COLUMNS;
    if (first >= N) return;
    float sums[ROWS_COLUMNS] = {};
#pragma unroll 4
    for (int k = lane * 32; k < K; k += PIECE) {
        uint4 code[ROWS_COLUMNS];
        const uint4 *values = reinterpret_cast<const uint4 *>(x + k);
        uint4 v0 = values[0], v1 = values[1], v2 = values[2], v3 = values[3];
#pragma unroll
        for (int c = 0; c < ROWS_COLUMNS; c++) {
            int column = first + c < N ? first + c : N - 1;
            code[c] = codes[(int64_t)column * (K / 32) + k / 32];
        }
#pragma unroll
        for (int c = 0; c < ROWS_COLUMNS; c++) {
            int64_t at = (int64_t)(first + c < N ? first + c : N - 1) * GROUPS + k / GROUP;
            uint32_t base = base_of(zero[at]);
            float sum = word_sum(code[c].x, base, v0, 0.0f);
            sum = word_sum(code[c].y, base, v1, sum);
            sum = word_sum(code[c].z, base, v2, sum);
            sum = word_sum(code[c].w, base, v3, sum);
            sums[c] = fused(sum, scale[at], sums[c]);
        }
    }
#pragma unroll
    for (int c = 0; c < ROWS_COLUMNS; c++) {
        float sum = lanes_sum(sums[c]);
        if (lane == 0 && first + c < N) y[first + c] = sum;
    }
}

#define TILE_M 64
#define DEPTH 128
#define THREADS 128

__device__ __forceinline__ int place(int row, int piece) { return row * DEPTH + ((piece ^ (row & 7)) * 8); }

__device__ __forceinline__ void fetch(uint16_t *to, const uint16_t *x, int start, int rows, int k) {
#pragma unroll
    for (int i = 0; i < TILE_M * DEPTH / 8 / THREADS; i++) {
        int index = threadIdx.x + i * THREADS, row = index / 16, piece = index % 16;
        bool inside = start + row < rows;
        copy16(to + place(row, piece), inside ? x + (int64_t)(start + row) * K + k + piece * 8 : x, inside);
    }
}

/* sums += part * scale of the group, part = 0 */
__device__ __forceinline__ void add_group(float (&sums)[4][4][4], float (&part)[4][4][4], const float *__restrict__ scale,
                                          int column0, int group) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int column = column0 + j * 8 + threadIdx.x % 4 * 2 + e % 2;
            float step = scale[(column < N ? column : N - 1) * GROUPS + group];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[i][j][e] = fused(part[i][j][e], step, sums[i][j][e]);
                part[i][j][e] = 0.0f;
            }
        }
    }
}

/* codes: (N / 8, K / 128, 32 lanes) of 16 bytes. A lane has column lane / 4 of the eight; 16-bit part s of its bytes is
   for rows 16 s + 2 (lane % 4) + {0, 1, 8, 9}, nibbles in the order 0, 8, 1, 9, so that two masks give both pairs */
extern "C" __global__ void __launch_bounds__(THREADS)
w4_gemm(const uint16_t *__restrict__ x, const uint4 *__restrict__ codes, const float *__restrict__ scale,
        const uint8_t *__restrict__ zero, float *__restrict__ y, int m) {
    __shared__ __align__(128) uint16_t xs[2][TILE_M * DEPTH];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row0 = blockIdx.y * TILE_M, column0 = (blockIdx.x * 4 + warp) * 32;
    float sums[4][4][4] = {};
    uint4 code[4];
    fetch(xs[0], x, row0, m, 0);
    copies_sent();
    for (int k = 0; k < K; k += DEPTH) {
        if (k + DEPTH < K) fetch(xs[(k / DEPTH + 1) % 2], x, row0, m, k + DEPTH);
        copies_sent();
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int eight = column0 / 8 + j;
            eight = eight < (N + 7) / 8 ? eight : (N + 7) / 8 - 1;
            code[j] = codes[((int64_t)eight * (K / DEPTH) + k / DEPTH) * 32 + lane];
        }
        copies_arrived<1>();
        __syncthreads();
        const uint16_t *xt = xs[k / DEPTH % 2];
        float part[4][4][4] = {};
#pragma unroll
        for (int s = 0; s < 8; s++) {
            uint32_t a[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) matrices(a[i], xt + place(i * 16 + lane % 16, s * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int column = column0 + j * 8 + lane / 4;
                uint32_t base = base_of(zero[(column < N ? column : N - 1) * GROUPS + (k + s * 16) / GROUP]);
                uint32_t words[4] = {code[j].x, code[j].y, code[j].z, code[j].w};
                uint32_t bits = words[s / 2] >> (s % 2 * 16), spread = (bits & 0xffu) | (bits & 0xff00u) << 8;
                uint32_t b0 = unpacked(spread, base), b1 = unpacked(spread >> 4, base);
#pragma unroll
                for (int i = 0; i < 4; i++) multiply_f16(part[i][j], a[i], b0, b1);
            }
            if ((s + 1) * 16 % GROUP == 0 || s == 7) add_group(sums, part, scale, column0, (k + s * 16) / GROUP);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = row0 + i * 16 + lane / 4 + e / 2 * 8, column = column0 + j * 8 + lane % 4 * 2 + e % 2;
                if (row < m && column < N) y[(int64_t)row * N + column] = sums[i][j][e];
            }
        }
    }
}
