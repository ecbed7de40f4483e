/* Metal for a C++ compiler: a launch is a loop over its threads, one after the other.
   Right for kernels whose threads share no memory; "threadgroup" does not compile. */
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned long ulong;
#define kernel static
#define device
#define constant const

namespace metal {
using std::abs; using std::exp; using std::floor; using std::fmod; using std::sqrt; using std::tanh;
template <class T> static T max(T a, T b) { return a > b ? a : b; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }
template <class T> static T select(T a, T b, bool chosen) { return chosen ? b : a; }
template <class T, class U> static T as_type(U value) {
    static_assert(sizeof(T) == sizeof(U));
    T found;
    __builtin_memcpy(&found, &value, sizeof found);
    return found;
}
}

template <class T> static T taken(void *place, const uint *index, size_t number, size_t count) {
    if constexpr (std::is_pointer_v<T>) return static_cast<T>(place);
    else if constexpr (std::is_reference_v<T>) return *static_cast<std::remove_reference_t<T> *>(place);
    else return index[number + 2 - count];  /* the last two are numbers of the block and the thread */
}

template <class... A, size_t... I>
static void each(void (*entry)(A...), void **arguments, uint grid, uint block, std::index_sequence<I...>) {
    for (uint index[2] = {0, 0}; index[0] < grid; index[0]++)
        for (index[1] = 0; index[1] < block; index[1]++)
            entry(taken<A>(I + 2 < sizeof...(A) ? arguments[I] : nullptr, index, I, sizeof...(A))...);
}

template <class... A>
static void launch(void (*entry)(A...), void **arguments, uint grid, uint block) {
    each(entry, arguments, grid, block, std::index_sequence_for<A...>{});
}
