/* The few positions of ONNX Runtime's C interface that are used here. Its tables only ever grow at their end, so that
 * a position keeps its meaning; ``RegisterCustomOps`` asks for the version that has all of them. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct OrtStatus OrtStatus;
typedef void (*Entry)(void);
typedef struct { const Entry *(*table)(uint32_t version); const char *(*version_text)(void); } OrtApiBase;

enum { API_VERSION = 18, TYPE_UINT8 = 2, TYPE_INT8 = 3, TYPE_INT32 = 6, TYPE_BOOL = 9, FAIL = 1, REQUIRED = 0 };
enum {
    AT_CREATE_STATUS = 0, AT_CREATE_DOMAIN = 26, AT_DOMAIN_ADD = 27, AT_ADD_DOMAIN = 28, AT_TENSOR_DATA = 51,
    AT_DIMENSIONS_COUNT = 61, AT_DIMENSIONS = 62, AT_TENSOR_SHAPE = 65, AT_ATTRIBUTE_INT = 86, AT_INPUT = 90,
    AT_OUTPUT = 91, AT_RELEASE_SHAPE = 99, AT_PARALLEL_FOR = 274,
};

static const Entry *api;

#define CALL(place, type) ((OrtStatus *(*) type)api[place])

static OrtStatus *failure(const char *text) { return CALL(AT_CREATE_STATUS, (int, const char *))(FAIL, text); }

#define TRY(call) do { OrtStatus *status_ = (call); if (status_) return status_; } while (0)

/* --------------------------------------------------------------------------- tensors */

enum { MOST_DIMS = 8, MOST_OPERANDS = 6, MOST_SETTINGS = 8 };

typedef struct { void *data; int64_t dims[MOST_DIMS]; int rank; int64_t count; } Tensor;

/* attributes of a node, in the order of its operator's ``names`` */
typedef struct { int64_t value[MOST_SETTINGS]; } Settings;

typedef struct { void *context; const Settings *settings; } Call;

static OrtStatus *input(const Call *call, size_t place, Tensor *out) {
    void *value, *shape;
    size_t rank;
    TRY(CALL(AT_INPUT, (void *, size_t, void **))(call->context, place, &value));
    TRY(CALL(AT_TENSOR_DATA, (void *, void **))(value, &out->data));
    TRY(CALL(AT_TENSOR_SHAPE, (void *, void **))(value, &shape));
    OrtStatus *status = CALL(AT_DIMENSIONS_COUNT, (void *, size_t *))(shape, &rank);
    if (!status && rank > MOST_DIMS) status = failure("qcompile: a tensor of more than 8 dimensions");
    if (!status) status = CALL(AT_DIMENSIONS, (void *, int64_t *, size_t))(shape, out->dims, rank);
    ((void (*)(void *))api[AT_RELEASE_SHAPE])(shape);
    out->rank = (int)rank;
    out->count = 1;
    for (size_t i = 0; !status && i < rank; i++) out->count *= out->dims[i];
    return status;
}

static OrtStatus *output(const Call *call, size_t place, const int64_t *dims, int rank, void *data) {
    void *value;
    typedef OrtStatus *(*Output)(void *, size_t, const int64_t *, size_t, void **);
    TRY(((Output)api[AT_OUTPUT])(call->context, place, dims, (size_t)rank, &value));
    return CALL(AT_TENSOR_DATA, (void *, void **))(value, (void **)data);
}

/* The last axis, and how many rows of it there are. */
static int64_t columns(const Tensor *x) { return x->rank ? x->dims[x->rank - 1] : 1; }
static int64_t rows(const Tensor *x) { return columns(x) ? x->count / columns(x) : 0; }

/* The size of ``x`` along an axis of a shape of ``rank`` dimensions that it broadcasts to. */
static int64_t size_at(const Tensor *x, int axis, int rank) {
    int own = axis - rank + x->rank;
    return own < 0 ? 1 : x->dims[own];
}

/* How far it is in ``x`` from one index to the next of each axis of ``dims``, to which it broadcasts. */
static OrtStatus *steps_of(const Tensor *x, const int64_t *dims, int rank, int64_t *steps) {
    int64_t step = 1;
    if (x->rank > rank) return failure("qcompile: an operand has more dimensions than what it belongs to");
    for (int axis = rank - 1; axis >= 0; axis--) {
        int64_t size = size_at(x, axis, rank);
        if (size != 1 && size != dims[axis]) return failure("qcompile: an operand does not broadcast");
        steps[axis] = size == 1 ? 0 : step;
        step *= size;
    }
    return NULL;
}

/* --------------------------------------------------------------------------- work in pieces */

/* ``run`` does the rows first .. last - 1 of a job; false where memory is short. */
typedef int (*Rows)(const void *job, int64_t first, int64_t last);
typedef struct { Rows run; const void *job; int64_t rows, step; int *failed; } Pieces;

enum { PIECE = 1 << 15 }; /* elements that are worth a thread */

static void one_piece(void *data, size_t index) {
    const Pieces *p = data;
    int64_t first = (int64_t)index * p->step, last = first + p->step;
    if (!p->run(p->job, first, last < p->rows ? last : p->rows)) *p->failed = 1;
}

static OrtStatus *in_pieces(const Call *call, Rows run, const void *job, int64_t row_count, int64_t width) {
    int failed = 0;
    int64_t step = 1 + PIECE / (width + 1);
    Pieces p = {run, job, row_count, step, &failed};
    size_t pieces = (size_t)((row_count + step - 1) / step);
    if (pieces < 2) {
        p.step = row_count;
        if (row_count) one_piece(&p, 0);
    } else {
        typedef void (*Task)(void *, size_t);
        TRY(CALL(AT_PARALLEL_FOR, (void *, Task, size_t, size_t, void *))(call->context, one_piece, pieces, 0, &p));
    }
    return failed ? failure("qcompile: no memory for a kernel's rows") : NULL;
}

/* --------------------------------------------------------------------------- arithmetic */

/* One body for each level of the processor, chosen when the library is loaded. */
#if defined(LEVELS)
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(__AVX512F__) && __GNUC__ >= 12
#define LEVELS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(__AVX2__)
#define LEVELS __attribute__((target_clones("avx2", "default")))
#else
#define LEVELS
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE int32_t least_of(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t most_of(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE int32_t clipped(int32_t x, int32_t low, int32_t high) { return least_of(most_of(x, low), high); }
INLINE int64_t most_of64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t clipped64(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
INLINE int is_power(int64_t x, int64_t most) { return x > 0 && x <= most && !(x & (x - 1)); }
INLINE int places(int64_t power) { return __builtin_ctzll((unsigned long long)power); }

/* a + b and a * b, wrapping as ONNX's integers do */
INLINE int32_t plus(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
INLINE int32_t times(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }

/* floor(x * m / 2^16) for |x| < 2^30, |m| < 2^15 */
INLINE int32_t scaled(int32_t x, int32_t m) { return times(x >> 16, m) + (times(x & 0xffff, m) >> 16); }

/* x / 2^shift toward zero */
INLINE int32_t toward_zero(int32_t x, int shift) { return plus(x, (x >> 31) & ((1 << shift) - 1)) >> shift; }

/* How many of 2^first .. 2^last are at most x. */
INLINE int reached(int64_t x, int first, int last) {
    int count = x < 1 ? 0 : 64 - __builtin_clzll((unsigned long long)x) - first;
    return count < 0 ? 0 : count > last - first + 1 ? last - first + 1 : count;
}

INLINE int64_t floor_division(int64_t a, int64_t b) { return a / b - (a % b < 0); }

/* Division of numbers below 2^31 by one divisor, exact (Granlund and Montgomery, 1994, theorem 4.2). */
typedef struct { uint64_t factor; int shift; } Divisor;

INLINE Divisor divisor_of(int32_t d) {
    int bits = d > 1 ? 32 - __builtin_clz((unsigned)d - 1) : 0;
    Divisor made = {((UINT64_C(1) << (31 + bits)) + (uint64_t)d - 1) / (uint64_t)d, 31 + bits};
    return made;
}

INLINE int32_t divided(int32_t n, Divisor by) { return (int32_t)(((uint64_t)(uint32_t)n * by.factor) >> by.shift); }
