/* The kernels as functions of a library: launch(kernel, grid x, grid y, threads, pointers, m). */
#include "integer.cu"
#undef TILE
#undef DEPTH
#undef THREADS
#undef ROWS_WARPS
#undef ROWS_COLUMNS
#define place half_place
#define fetch half_fetch
#include "nbits.cu"

typedef void (*Body)(void **);

static void call_int8_rows(void **p) {
    int8_rows((int8_t *)p[0], (int8_t *)p[1], (int32_t *)p[2], *(int *)p[5]);
}
static void call_int8_gemm(void **p) {
    int8_gemm((int8_t *)p[0], (int8_t *)p[1], (int32_t *)p[2], *(int *)p[5]);
}
static void call_w4_rows(void **p) {
    w4_rows((uint16_t *)p[0], (uint4 *)p[1], (float *)p[2], (uint8_t *)p[3], (float *)p[4]);
}
static void call_w4_gemm(void **p) {
    w4_gemm((uint16_t *)p[0], (uint4 *)p[1], (float *)p[2], (uint8_t *)p[3], (float *)p[4], *(int *)p[5]);
}

extern "C" void launch(int kernel, int grid_x, int grid_y, int threads, void **pointers) {
    static const Body bodies[] = {call_int8_rows, call_int8_gemm, call_w4_rows, call_w4_gemm};
    for (unsigned y = 0; y < (unsigned)grid_y; y++) {
        for (unsigned x = 0; x < (unsigned)grid_x; x++) {
            blockIdx = {x, y, 0};
            host::run_block(threads, bodies[kernel], pointers);
        }
    }
}
