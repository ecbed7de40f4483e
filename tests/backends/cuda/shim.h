/* CUDA C for a C++ compiler: a launch is a loop over its threads, one after the other.
   Right for kernels whose threads share no memory; a __shared__ or __syncthreads does not compile. */
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

struct Index { unsigned x = 0, y = 0, z = 0; };
static Index blockIdx, threadIdx;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

template <class T, class U> static auto max(T a, U b) { return a > b ? a : b; }
template <class T, class U> static auto min(T a, U b) { return a < b ? a : b; }
static inline float __int_as_float(int i) { union { int i; float f; } u = {i}; return u.f; }

template <class... A, size_t... I>
static void each(void (*kernel)(A...), void **arguments, unsigned grid, unsigned block, std::index_sequence<I...>) {
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++) kernel(*static_cast<A *>(arguments[I])...);
}

template <class... A>
static void launch(void (*kernel)(A...), void **arguments, unsigned grid, unsigned block) {
    each(kernel, arguments, grid, block, std::index_sequence_for<A...>{});
}
