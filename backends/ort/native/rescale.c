/* --------------------------------------------------------------------------- to another grid
 * Rescale: y = clip(requantize(clip(x + before, floor, ceiling) * lift) + after, least, most), operands broadcast.
 * Each operand is brought to a row of its own values, so that one loop serves all ways to broadcast. */

enum { X, BEFORE, MULTIPLIER, DIVISOR, AFTER };

typedef struct { int32_t floor, ceiling, lift, low, high, least, most; int kind; } Grid;

typedef struct {
    Grid grid;
    Tensor operand[MOST_OPERANDS];
    int64_t step[MOST_OPERANDS][MOST_DIMS], dims[MOST_DIMS], width;
    int rank, spread[MOST_OPERANDS];
    void *out;
} Rescale;

typedef struct { const int32_t *x, *before, *multiplier, *divisor, *after; const int32_t *shift; } Row;

INLINE int32_t rescaled(const Row *r, int64_t j, Grid g) {
    int32_t x = times(clipped(plus(r->x[j], r->before[j]), g.floor, g.ceiling), g.lift);
    int32_t y = plus(scaled(x, r->multiplier[j]), r->divisor[j] >> 1) >> r->shift[j];
    return clipped(plus(clipped(y, g.low, g.high), r->after[j]), g.least, g.most);
}

LEVELS static void rescale_row32(Row r, Grid g, int64_t n, int32_t *restrict y) {
    for (int64_t j = 0; j < n; j++) y[j] = rescaled(&r, j, g);
}

LEVELS static void rescale_row8(Row r, Grid g, int64_t n, uint8_t *restrict y) {
    for (int64_t j = 0; j < n; j++) y[j] = (uint8_t)rescaled(&r, j, g);
}

static OrtStatus *broadcast(Rescale *job) {
    job->rank = 0;
    for (int i = 0; i < MOST_OPERANDS; i++) job->rank = most_of(job->rank, job->operand[i].rank);
    for (int axis = 0; axis < job->rank; axis++) {
        job->dims[axis] = 1;
        for (int i = 0; i < MOST_OPERANDS; i++) {
            int own = axis - job->rank + job->operand[i].rank;
            int64_t size = own < 0 ? 1 : job->operand[i].dims[own];
            if (size != 1 && job->dims[axis] != 1 && size != job->dims[axis])
                return failure("qcompile: operands of Rescale do not broadcast");
            if (size != 1) job->dims[axis] = size;
        }
    }
    job->width = job->rank ? job->dims[job->rank - 1] : 1;
    for (int i = 0; i < MOST_OPERANDS; i++) {
        int64_t step = 1;
        for (int axis = job->rank - 1; axis >= 0; axis--) {
            int own = axis - job->rank + job->operand[i].rank;
            int64_t size = own < 0 ? 1 : job->operand[i].dims[own];
            job->step[i][axis] = size == 1 ? 0 : step;
            step *= size;
        }
        job->spread[i] = job->width > 1 && job->step[i][job->rank - 1] == 0; /* one value for the whole row */
    }
    return NULL;
}

static int rescale_rows(const void *data, int64_t first, int64_t last) {
    const Rescale *job = data;
    int64_t width = job->width, at[MOST_DIMS] = {0}, offset[MOST_OPERANDS] = {0};
    int32_t *buffer = malloc(sizeof(int32_t) * (size_t)width * (MOST_OPERANDS + 1));
    const int32_t *from[MOST_OPERANDS] = {0}, *row[MOST_OPERANDS];
    int32_t *shift = buffer + MOST_OPERANDS * width;
    if (!buffer) return 0;
    int64_t rest = first;
    for (int axis = job->rank - 2; axis >= 0; axis--) {
        at[axis] = rest % job->dims[axis];
        rest /= job->dims[axis];
        for (int i = 0; i < MOST_OPERANDS; i++) offset[i] += at[axis] * job->step[i][axis];
    }
    for (int64_t r = first; r < last; r++) {
        for (int i = 0; i < MOST_OPERANDS; i++) {
            const int32_t *source = (const int32_t *)job->operand[i].data + offset[i];
            if (source == from[i]) continue;
            from[i] = source;
            row[i] = job->spread[i] ? buffer + i * width : source;
            if (job->spread[i])
                for (int64_t j = 0; j < width; j++) buffer[i * width + j] = *source;
            if (i == DIVISOR)
                for (int64_t j = 0; j < width; j++) shift[j] = places(source[job->spread[i] ? 0 : j]);
        }
        Row operands = {row[X], row[BEFORE], row[MULTIPLIER], row[DIVISOR], row[AFTER], shift};
        if (job->grid.kind == TYPE_INT32) rescale_row32(operands, job->grid, width, (int32_t *)job->out + r * width);
        else rescale_row8(operands, job->grid, width, (uint8_t *)job->out + r * width);
        for (int axis = job->rank - 2; axis >= 0; axis--) {
            for (int i = 0; i < MOST_OPERANDS; i++) offset[i] += job->step[i][axis];
            if (++at[axis] < job->dims[axis]) break;
            for (int i = 0; i < MOST_OPERANDS; i++) offset[i] -= at[axis] * job->step[i][axis];
            at[axis] = 0;
        }
    }
    free(buffer);
    return 1;
}

static OrtStatus *run_rescale(const Call *call, Rescale *job) {
    TRY(broadcast(job));
    TRY(output(call, 0, job->dims, job->rank, &job->out));
    int64_t count = 1;
    for (int axis = 0; axis < job->rank; axis++) count *= job->dims[axis];
    return in_pieces(call, rescale_rows, job, job->width ? count / job->width : 0, job->width);
}

static OrtStatus *rescale_as(const Call *call, int kind) {
    const int64_t *s = call->settings->value;
    Grid grid = {(int32_t)s[0], (int32_t)s[1], (int32_t)s[2], (int32_t)s[3],
                 (int32_t)s[4], (int32_t)s[5], (int32_t)s[6], kind};
    Rescale job = {.grid = grid};
    for (int i = 0; i < MOST_OPERANDS; i++) TRY(input(call, (size_t)i, &job.operand[i]));
    return run_rescale(call, &job);
}

static OrtStatus *rescale(const Call *call) { return rescale_as(call, TYPE_INT32); }
static OrtStatus *rescale_to_uint8(const Call *call) { return rescale_as(call, TYPE_UINT8); }
static OrtStatus *rescale_to_int8(const Call *call) { return rescale_as(call, TYPE_INT8); }

static OrtStatus *requantize(const Call *call) {
    static int32_t none = 0;
    int32_t low = (int32_t)call->settings->value[0], high = (int32_t)call->settings->value[1];
    Grid grid = {INT32_MIN, INT32_MAX, 1, low, high, low, high, TYPE_INT32};
    Rescale job = {.grid = grid};
    Tensor zero = {.data = &none, .rank = 0, .count = 1};
    job.operand[BEFORE] = job.operand[AFTER] = zero;
    TRY(input(call, 0, &job.operand[X]));
    TRY(input(call, 1, &job.operand[MULTIPLIER]));
    TRY(input(call, 2, &job.operand[DIVISOR]));
    return run_rescale(call, &job);
}

/* MultiplyWide, IntegerRelu2: the product of two wide values. */
typedef struct { const int32_t *a, *b; int32_t *y; int64_t width; int32_t low, high; int narrow, divisor, positive; } Product;

LEVELS static void product_row(const int32_t *a, const int32_t *b, const Product p, int64_t n, int32_t *restrict y) {
    int32_t half_narrow = (1 << p.narrow) >> 1, half = (1 << p.divisor) >> 1, floor = p.positive ? 0 : INT32_MIN;
    for (int64_t j = 0; j < n; j++) {
        int32_t x = most_of(a[j], floor), by = most_of(b[j], floor);
        int32_t brief = clipped(plus(by, half_narrow) >> p.narrow, -32767, 32767);
        y[j] = clipped(plus(scaled(x, brief), half) >> p.divisor, p.low, p.high);
    }
}

static int product_rows(const void *data, int64_t first, int64_t last) {
    const Product *p = data;
    int64_t start = first * p->width;
    product_row(p->a + start, p->b + start, *p, (last - first) * p->width, p->y + start);
    return 1;
}

static OrtStatus *product_of(const Call *call, size_t second, int positive, int64_t low, int64_t high) {
    const int64_t *s = call->settings->value;
    Tensor a, b;
    TRY(input(call, 0, &a));
    TRY(input(call, second, &b));
    if (a.rank != b.rank || memcmp(a.dims, b.dims, sizeof(int64_t) * (size_t)a.rank))
        return failure("qcompile: a product of values that differ in shape");
    Product p = {a.data, b.data, NULL, columns(&a), (int32_t)low, (int32_t)high, places(s[0]), places(s[1]), positive};
    TRY(output(call, 0, a.dims, a.rank, &p.y));
    return in_pieces(call, product_rows, &p, rows(&a), p.width);
}

static OrtStatus *multiply_wide(const Call *call) {
    return product_of(call, 1, 0, call->settings->value[2], call->settings->value[3]);
}

static OrtStatus *relu_squared(const Call *call) { return product_of(call, 0, 1, 0, call->settings->value[2]); }
