/* x (m, k) float32 times codes of 4 bits -> y (m, n) float32; products are exact, sums float32.

   k is a multiple of 32; a group of ``group`` rows, a multiple of 32 or k itself, has a scale and a zero point:
   scale (n, groups) float32, zero (n, groups) uint8.
   rows: a block stages one row of x, a warp has two columns of it, its lanes 32 codes (16 bytes) of each.
   gemm: tensor cores; a block has 32 x 128, four warps of 32 x 32. Codes go from global memory straight to the lanes
         that multiply them; a float32 is the sum of three bfloat16, so that three products lose nothing. */
#pragma once
#include "warp.cuh"

namespace nbits {
#define MAGIC 0x43004300u /* two bfloat16 of 128; their low bits count in ones */
enum { WARPS = 4, COLUMNS = 2, CHUNK = 4096, TILE = 32, DEPTH = 128, THREADS = 128, STRIDE = DEPTH + 8 };

/* codes (bits 0..3 of both halves) less the zero point, as two bfloat16: exact */
__device__ __forceinline__ uint32_t unpacked(uint32_t bits, uint32_t base) {
    return pair_sub((bits & 0x000f000fu) | MAGIC, base);
}

__device__ __forceinline__ uint32_t base_of(int zero) { return MAGIC + zero * 0x00010001u; }

__device__ __forceinline__ float word_sum(uint32_t word, uint32_t base, const float *x, float sum) {
    float4 low = *reinterpret_cast<const float4 *>(x), high = *reinterpret_cast<const float4 *>(x + 4);
    float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t pair = unpacked(word >> (4 * i), base);
        sum = fused(float_of(pair & 0xffff0000u), values[2 * i + 1], sum);
        sum = fused(float_of(pair << 16), values[2 * i], sum);
    }
    return sum;
}

/* codes: (n, k / 32) of 16 bytes; in a word of 8, nibble i is row 2 i and nibble i + 4 is row 2 i + 1 */
__device__ __forceinline__ void rows(const float *__restrict__ x, const uint4 *__restrict__ codes,
                                     const float *__restrict__ scale, const uint8_t *__restrict__ zero,
                                     float *__restrict__ y, int m, int n, int k, int group) {
    __shared__ __align__(16) float xs[CHUNK / 32 * 36]; /* 32 and a gap, so that lanes read from different banks */
    Tile tile = tile_of_block(m, (n + WARPS * COLUMNS - 1) / (WARPS * COLUMNS));
    int lane = threadIdx.x % 32, first = (tile.column * WARPS + threadIdx.x / 32) * COLUMNS;
    const int groups = (k + group - 1) / group;
    const float *row = x + (int64_t)tile.row * k;
    float sums[COLUMNS] = {};
    for (int start = 0; start < k; start += CHUNK) {
        int size = least(CHUNK, k - start);
        __syncthreads();
        for (int i = threadIdx.x * 4; i < size; i += WARPS * 32 * 4)
            *reinterpret_cast<float4 *>(xs + i / 32 * 36 + i % 32) = *reinterpret_cast<const float4 *>(row + start + i);
        __syncthreads();
#pragma unroll 4
        for (int at = lane * 32; at < size; at += 1024) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                int64_t column = least(first + c, n - 1), grid = column * groups + (start + at) / group;
                uint4 code = codes[column * (k / 32) + (start + at) / 32];
                const float *value = xs + at / 32 * 36;
                uint32_t base = base_of(zero[grid]);
                float sum = word_sum(code.x, base, value, 0.0f);
                sum = word_sum(code.y, base, value + 8, sum);
                sum = word_sum(code.z, base, value + 16, sum);
                sum = word_sum(code.w, base, value + 24, sum);
                sums[c] = fused(sum, scale[grid], sums[c]);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        float sum = lanes_sum(sums[c]);
        if (lane == 0 && first + c < n) y[(int64_t)tile.row * n + first + c] = sum;
    }
}

__device__ __forceinline__ void fetch(float *to, const float *__restrict__ x, int start, int rows, int at, int k) {
#pragma unroll
    for (int i = 0; i < TILE * DEPTH / 4 / THREADS; i++) {
        int index = threadIdx.x + i * THREADS, row = index / (DEPTH / 4), piece = index % (DEPTH / 4) * 4;
        bool inside = start + row < rows && at + piece < k;
        copy16(to + row * STRIDE + piece, inside ? x + (int64_t)(start + row) * k + at + piece : x, inside);
    }
}

__device__ __forceinline__ float without_top(float a) { return a - float_of(bits_of(a) & 0xffff0000u); }

/* the upper halves of two floats, which are bfloat16 */
__device__ __forceinline__ uint32_t tops(float2 v) { return bits_of(v.x) >> 16 | (bits_of(v.y) & 0xffff0000u); }

/* 16 x 16 of x as three tiles of bfloat16 whose sum it is */
__device__ __forceinline__ void split(uint32_t (&parts)[3][4], const float *tile, int s) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const float *at = tile + (lane / 4 + r % 2 * 8) * STRIDE + s * 16 + lane % 4 * 2 + r / 2 * 8;
        float2 v = *reinterpret_cast<const float2 *>(at);
#pragma unroll
        for (int part = 0; part < 3; part++) {
            parts[part][r] = tops(v);
            v = {without_top(v.x), without_top(v.y)};
        }
    }
}

/* sums += part * scale of the group, part = 0 */
__device__ __forceinline__ void add_group(float (&sums)[2][4][4], float (&part)[2][4][4], const float *__restrict__ scale,
                                          int column0, int n, int groups, int group) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int column = least(column0 + j * 8 + threadIdx.x % 4 * 2 + e % 2, n - 1);
            float step = scale[(int64_t)column * groups + group];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sums[i][j][e] = fused(part[i][j][e], step, sums[i][j][e]);
                part[i][j][e] = 0.0f;
            }
        }
    }
}

/* codes: (n / 8, k / 128, 32 lanes) of 16 bytes. A lane has column lane / 4 of the eight; 16-bit part s of its bytes is
   for rows 16 s + 2 (lane % 4) + {0, 1, 8, 9}, nibbles in the order 0, 8, 1, 9, so that two masks give both pairs */
__device__ __forceinline__ void gemm(const float *__restrict__ x, const uint4 *__restrict__ codes,
                                     const float *__restrict__ scale, const uint8_t *__restrict__ zero,
                                     float *__restrict__ y, int m, int n, int k, int group) {
    __shared__ __align__(128) float xs[2][TILE * STRIDE];
    Tile tile = tile_of_block((m + TILE - 1) / TILE, (n + 127) / 128);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row0 = tile.row * TILE, column0 = (tile.column * 4 + warp) * 32;
    const int pieces = (k + DEPTH - 1) / DEPTH, groups = (k + group - 1) / group;
    float sums[2][4][4] = {};
    uint4 code[4];
    fetch(xs[0], x, row0, m, 0, k);
    copies_sent();
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++) {
        int start = piece * DEPTH;
        if (piece + 1 < pieces) fetch(xs[(piece + 1) % 2], x, row0, m, start + DEPTH, k);
        copies_sent();
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int eight = least(column0 / 8 + j, (n + 7) / 8 - 1);
            code[j] = codes[((int64_t)eight * pieces + piece) * 32 + lane];
        }
        copies_arrived<1>();
        __syncthreads();
        float part[2][4][4] = {};
#pragma unroll
        for (int s = 0; s < 8; s++) {
            int at = start + s * 16, grid = least(at / group, groups - 1); /* behind k, x is zero */
            uint32_t b[4][2];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int64_t column = least(column0 + j * 8 + lane / 4, n - 1);
                uint32_t base = base_of(zero[column * groups + grid]);
                uint32_t words[4] = {code[j].x, code[j].y, code[j].z, code[j].w};
                uint32_t bits = words[s / 2] >> (s % 2 * 16), spread = (bits & 0xffu) | (bits & 0xff00u) << 8;
                b[j][0] = unpacked(spread, base), b[j][1] = unpacked(spread >> 4, base);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t a[3][4];
                split(a, xs[piece % 2] + i * 16 * STRIDE, s);
#pragma unroll
                for (int p = 0; p < 3; p++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) multiply_pairs(part[i][j], a[p], b[j][0], b[j][1]);
                }
            }
            if ((at + 16) % group == 0 || s == 7) add_group(sums, part, scale, column0, n, groups, grid);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) store(y, sums[i][j], row0 + i * 16, column0 + j * 8, m, n);
    }
}
#undef MAGIC
} // namespace nbits
