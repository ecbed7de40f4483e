/* A GPU's block on one thread of a processor, to check the kernels' arithmetic where there is no GPU.

   Every CUDA thread is a context of its own; one runs until it waits for its block or its warp. ldmatrix and mma follow
   the tables of fragments in the PTX manual (sections of the warp-level matrix instructions). Slow, and in order.
   A kernel whose threads never wait is a loop over them. */
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __host__
#define __launch_bounds__(n)
#define __restrict__ __restrict

struct dim3 { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

namespace host {
enum { LANES = 32, STACK = 1 << 16 };
struct Gate { int here = 0, turn = 0; };
struct Place { uint32_t words[8]; float floats[4]; int ints[4]; const void *row; };
struct Machine {
    std::vector<ucontext_t> threads;
    std::vector<char> stacks, done;
    std::vector<Gate> warps;
    std::vector<Place> places;
    Gate block;
    ucontext_t scheduler;
    int current = 0, count = 0;
    void (*body)(void **) = nullptr;
    void **arguments = nullptr;
};
inline Machine machine;

inline void wait(Gate &gate, int count) {
    int turn = gate.turn;
    if (++gate.here == count) {
        gate.here = 0;
        gate.turn++;
        return;
    }
    while (gate.turn == turn) swapcontext(&machine.threads[machine.current], &machine.scheduler);
}
inline int lane() { return machine.current % LANES; }
inline Place &mine() { return machine.places[machine.current]; }
inline Place &of(int lane) { return machine.places[machine.current / LANES * LANES + lane]; }
inline void warp() { wait(machine.warps[machine.current / LANES], LANES); }

inline void entry() {
    machine.body(machine.arguments);
    machine.done[machine.current] = 1;
    swapcontext(&machine.threads[machine.current], &machine.scheduler);
}

inline void run_block(int count, void (*body)(void **), void **arguments) {
    Machine &m = machine;
    m.count = count, m.body = body, m.arguments = arguments, m.block = Gate();
    m.threads.assign(count, ucontext_t()), m.stacks.resize((size_t)count * STACK), m.done.assign(count, 0);
    m.warps.assign(count / LANES, Gate()), m.places.assign(count, Place());
    for (int t = 0; t < count; t++) {
        getcontext(&m.threads[t]);
        m.threads[t].uc_stack.ss_sp = &m.stacks[(size_t)t * STACK];
        m.threads[t].uc_stack.ss_size = STACK;
        makecontext(&m.threads[t], entry, 0);
    }
    for (int left = count; left;) {
        for (m.current = 0; m.current < count; m.current++) {
            if (m.done[m.current]) continue;
            swapcontext(&m.scheduler, &m.threads[m.current]);
            left -= m.done[m.current];
        }
    }
}
} // namespace host

struct ThreadIndex { struct { operator int() const { return host::machine.current; } } x; };
inline ThreadIndex threadIdx;
inline dim3 blockIdx;

inline void __syncthreads() { host::wait(host::machine.block, host::machine.count); }

inline uint32_t bits_of(float a) {
    uint32_t bits;
    memcpy(&bits, &a, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float a;
    memcpy(&a, &bits, 4);
    return a;
}

inline float __int_as_float(int bits) { return float_of(bits); }
template <class T, class U> auto max(T a, U b) { return a > b ? a : b; }
template <class T, class U> auto min(T a, U b) { return a < b ? a : b; }

/* one of a pair of bfloat16 */
inline float one_of(uint32_t pair, int which) { return float_of(which ? pair & 0xffff0000u : pair << 16); }

inline uint32_t pair_sub(uint32_t a, uint32_t b) {
    uint32_t result = 0;
    for (int i = 0; i < 2; i++) {
        uint32_t bits = bits_of(one_of(a, i) - one_of(b, i));
        if (bits & 0xffffu) abort(); /* it would be rounded */
        result |= bits >> 16 << (16 * i);
    }
    return result;
}

inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

/* what lane ``from`` of the warp gives for v */
template <class T> inline T of_lane(T v, int from) {
    memcpy(host::mine().words, &v, sizeof v);
    host::warp();
    T other;
    memcpy(&other, host::of(from).words, sizeof other);
    host::warp();
    return other;
}

template <class T> inline T lanes_sum(T v) {
    for (int d = 16; d; d >>= 1) v += of_lane(v, host::lane() ^ d);
    return v;
}

inline unsigned __activemask() { return 0xffffffffu; }
template <class T> inline T __shfl_sync(unsigned, T v, int from, int = 32) { return of_lane(v, from); }
template <class T> inline T __shfl_down_sync(unsigned, T v, int by, int = 32) {
    int from = host::lane() + by;
    return of_lane(v, from < host::LANES ? from : host::lane());
}

template <class X> inline int dot4(X, int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (X)(a >> (8 * i)) * (int8_t)(b >> (8 * i));
    return c;
}

inline void copy16(void *to, const void *from, bool inside) {
    if (inside) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
inline void copies_sent() {}
template <int LEFT> inline void copies_arrived() {}

inline void matrices(uint32_t (&d)[4], const void *row) {
    host::mine().row = row;
    host::warp();
    for (int m = 0; m < 4; m++)
        memcpy(&d[m], (const char *)host::of(8 * m + host::lane() / 4).row + host::lane() % 4 * 4, 4);
    host::warp();
}

namespace host {
inline void show(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    memcpy(mine().words, a, 16);
    mine().words[4] = b0, mine().words[5] = b1;
    warp();
}
} // namespace host

template <class X> inline void multiply(X, int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::show(a, b0, b1);
    for (int e = 0; e < 4; e++) {
        int row = host::lane() / 4 + e / 2 * 8, column = host::lane() % 4 * 2 + e % 2;
        for (int k = 0; k < 32; k++) { /* a: row, 4 rows of k a lane; registers 0, 1: rows 0-7, 8-15; 2, 3: k from 16 */
            uint32_t left = host::of(row % 8 * 4 + k % 16 / 4).words[row / 8 + k / 16 * 2];
            uint32_t right = host::of(column * 4 + k % 16 / 4).words[4 + k / 16];
            d[e] += (X)(left >> (k % 4 * 8)) * (int8_t)(right >> (k % 4 * 8));
        }
    }
    host::warp();
}

inline void multiply_pairs(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::show(a, b0, b1);
    for (int e = 0; e < 4; e++) {
        int row = host::lane() / 4 + e / 2 * 8, column = host::lane() % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            uint32_t left = host::of(row % 8 * 4 + k % 8 / 2).words[row / 8 + k / 8 * 2];
            uint32_t right = host::of(column * 4 + k % 8 / 2).words[4 + k / 8];
            d[e] += one_of(left, k % 2) * one_of(right, k % 2);
        }
    }
    host::warp();
}

/* ``Waits``: whether threads of the kernel wait for each other */
template <bool Waits, auto Kernel, class... A, size_t... I>
void launch_with(void (*)(A...), void **arguments, unsigned grid, int block, std::index_sequence<I...>) {
    void (*body)(void **) = [](void **given) { Kernel(*static_cast<A *>(given[I])...); };
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        if (Waits) host::run_block(block, body, arguments);
        else
            for (host::machine.current = 0; host::machine.current < block; host::machine.current++) body(arguments);
    }
}

template <bool Waits, auto Kernel, class... A>
void launch(void (*kernel)(A...), void **arguments, unsigned grid, int block) {
    launch_with<Waits, Kernel>(kernel, arguments, grid, block, std::index_sequence_for<A...>{});
}
