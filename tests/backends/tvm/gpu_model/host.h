/* A GPU's block on one thread of a processor, to check the kernels' arithmetic where there is no GPU.

   Every CUDA thread is a context of its own; one runs until it waits for its block or its warp. ldmatrix and mma follow
   the tables of fragments in the PTX manual (sections of the warp-level matrix instructions). Slow, and in order. */
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)
#define __restrict__ __restrict

struct dim3 { unsigned x, y, z; };
struct float2 { float x, y; };
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
    m.threads.assign(count, ucontext_t()), m.stacks.assign((size_t)count * STACK, 0), m.done.assign(count, 0);
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

inline float half_float(uint16_t bits) {
    _Float16 v;
    memcpy(&v, &bits, 2);
    return (float)v;
}

inline float2 half2_floats(uint32_t a) { return {half_float(a & 0xffff), half_float(a >> 16)}; }

inline uint32_t half2_sub(uint32_t a, uint32_t b) {
    uint32_t result = 0;
    for (int i = 0; i < 2; i++) {
        _Float16 difference = (_Float16)(half_float(a >> (16 * i) & 0xffff) - half_float(b >> (16 * i) & 0xffff));
        uint16_t bits;
        memcpy(&bits, &difference, 2);
        result |= (uint32_t)bits << (16 * i);
    }
    return result;
}

inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

template <class T> inline T lanes_sum(T v) {
    for (int d = 16; d; d >>= 1) {
        memcpy(host::mine().words, &v, sizeof v);
        host::warp();
        T other;
        memcpy(&other, host::of(host::lane() ^ d).words, sizeof other);
        host::warp();
        v += other;
    }
    return v;
}

inline int dot4(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int8_t)(a >> (8 * i)) * (int8_t)(b >> (8 * i));
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

inline void multiply_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::show(a, b0, b1);
    for (int e = 0; e < 4; e++) {
        int row = host::lane() / 4 + e / 2 * 8, column = host::lane() % 4 * 2 + e % 2;
        for (int k = 0; k < 32; k++) { /* a: row, 4 rows of k a lane; registers 0, 1: rows 0-7, 8-15; 2, 3: k from 16 */
            uint32_t left = host::of(row % 8 * 4 + k % 16 / 4).words[row / 8 + k / 16 * 2];
            uint32_t right = host::of(column * 4 + k % 16 / 4).words[4 + k / 16];
            d[e] += (int8_t)(left >> (k % 4 * 8)) * (int8_t)(right >> (k % 4 * 8));
        }
    }
    host::warp();
}

inline void multiply_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::show(a, b0, b1);
    for (int e = 0; e < 4; e++) {
        int row = host::lane() / 4 + e / 2 * 8, column = host::lane() % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            uint32_t left = host::of(row % 8 * 4 + k % 8 / 2).words[row / 8 + k / 8 * 2];
            uint32_t right = host::of(column * 4 + k % 8 / 2).words[4 + k / 8];
            d[e] += half_float(left >> (k % 2 * 16) & 0xffff) * half_float(right >> (k % 2 * 16) & 0xffff);
        }
    }
    host::warp();
}
