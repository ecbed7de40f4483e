/* --------------------------------------------------------------------------- to another grid
 * Rescale: y = clip(requantize(lifted(clip(x + before, floor, ceiling))) + after, least, most), operands broadcast.
 * Each operand is brought to rows of its own values, so that one loop serves all ways to broadcast; powers of two are
 * brought to how many places they are. */

enum { X, BEFORE, LIFT, MULTIPLIER, DIVISOR, AFTER, BLOCK = 1024, REACH_OF_GRID = (1 << 30) - 1 };

typedef struct { int32_t floor, ceiling, low, high, least, most; int kind; } Grid;

/* Rows are taken in blocks along the axis before the last, so that narrow ones are worth a loop. */
typedef struct {
    Grid grid;
    Tensor operand[MOST_OPERANDS];
    int64_t step[MOST_OPERANDS][MOST_DIMS], dims[MOST_DIMS], width, height, block, blocks;
    int rank, turned /* x (B, n, m, d) as (B, m, n, d) */;
    void *out;
} Rescale;

typedef struct { const int32_t *x, *before, *lift, *multiplier, *shift, *after; } Row;

INLINE int32_t rescaled(int32_t x, int32_t before, int lift, int32_t m, int shift, int32_t after, Grid g) {
    int32_t end = REACH_OF_GRID >> lift, begun = clipped(clipped(plus(x, before), g.floor, g.ceiling), -end, end);
    int32_t y = clipped(plus(scaled(begun << lift, m), (1 << shift) >> 1) >> shift, g.low, g.high);
    return clipped(plus(y, after), g.least, g.most);
}

INLINE int32_t rescaled_at(const Row *r, int64_t j, Grid g) {
    return rescaled(r->x[j], r->before[j], r->lift[j], r->multiplier[j], r->shift[j], r->after[j], g);
}

LEVELS static void rescale_row32(Row r, Grid g, int64_t n, int32_t *restrict y) {
    for (int64_t j = 0; j < n; j++) y[j] = rescaled_at(&r, j, g);
}

LEVELS static void rescale_row8(Row r, Grid g, int64_t n, uint8_t *restrict y) {
    for (int64_t j = 0; j < n; j++) y[j] = (uint8_t)rescaled_at(&r, j, g);
}

/* The same where every operand but x is one number: nothing has to be spread. */
LEVELS static void rescale_even32(Row r, Grid g, int64_t n, int32_t *restrict y) {
    int32_t before = *r.before, lift = *r.lift, m = *r.multiplier, shift = *r.shift, after = *r.after;
    for (int64_t j = 0; j < n; j++) y[j] = rescaled(r.x[j], before, lift, m, shift, after, g);
}

LEVELS static void rescale_even8(Row r, Grid g, int64_t n, uint8_t *restrict y) {
    int32_t before = *r.before, lift = *r.lift, m = *r.multiplier, shift = *r.shift, after = *r.after;
    for (int64_t j = 0; j < n; j++) y[j] = (uint8_t)rescaled(r.x[j], before, lift, m, shift, after, g);
}

static OrtStatus *broadcast(Rescale *job) {
    Tensor *x = &job->operand[X];
    int64_t first = x->dims[1], second = x->dims[2];
    job->rank = 2;
    if (job->turned) {
        if (x->rank != 4) return failure("qcompile: only a tensor of four axes is turned");
        x->dims[1] = second;
        x->dims[2] = first;
    }
    for (int i = 0; i < MOST_OPERANDS; i++) job->rank = most_of(job->rank, job->operand[i].rank);
    for (int axis = 0; axis < job->rank; axis++) {
        job->dims[axis] = 1;
        for (int i = 0; i < MOST_OPERANDS; i++) {
            int64_t size = size_at(&job->operand[i], axis, job->rank);
            if (size != 1 && job->dims[axis] != 1 && size != job->dims[axis])
                return failure("qcompile: operands of Rescale do not broadcast");
            if (size != 1) job->dims[axis] = size;
        }
    }
    for (int i = 0; i < MOST_OPERANDS; i++) TRY(steps_of(&job->operand[i], job->dims, job->rank, job->step[i]));
    if (job->turned) {
        if (job->rank != 4) return failure("qcompile: an operand has more axes than what is turned");
        job->step[X][1] = second == 1 ? 0 : x->dims[3];
        job->step[X][2] = first == 1 ? 0 : x->dims[3] * second;
    }
    job->width = job->dims[job->rank - 1];
    job->height = job->dims[job->rank - 2];
    job->block = clipped64(BLOCK / most_of64(job->width, 1), 1, most_of64(job->height, 1));
    job->blocks = (job->height + job->block - 1) / job->block;
    return NULL;
}

/* One operand as ``count`` rows of values without gaps: where it lies, or copied to ``buffer``. */
LEVELS static const int32_t *spread(const int32_t *source, const int64_t *step, int64_t count, int64_t width,
                                    int32_t *buffer) {
    int64_t down = step[0], along = step[1];
    if ((along || width == 1) && (count == 1 || down == width)) return source;
    for (int64_t r = 0; r < count; r++, source += down) {
        int32_t *row = buffer + r * width;
        if (along) memcpy(row, source, sizeof(int32_t) * (size_t)width);
        else for (int64_t j = 0; j < width; j++) row[j] = *source;
    }
    return buffer;
}

static int rescale_evenly(const void *data, int64_t first, int64_t last) {
    const Rescale *job = data;
    int64_t start = first * job->width, count = (last - first) * job->width;
    const Tensor *operand = job->operand;
    Row r = {(const int32_t *)operand[X].data + start, operand[BEFORE].data, operand[LIFT].data,
             operand[MULTIPLIER].data, operand[DIVISOR].data, operand[AFTER].data};
    if (job->grid.kind == TYPE_INT32) rescale_even32(r, job->grid, count, (int32_t *)job->out + start);
    else rescale_even8(r, job->grid, count, (uint8_t *)job->out + start);
    return 1;
}

static int rescale_blocks(const void *data, int64_t first, int64_t last) {
    const Rescale *job = data;
    int64_t width = job->width, size = width * job->block;
    int32_t *buffer = malloc(sizeof(int32_t) * (size_t)(size * MOST_OPERANDS + 1));
    const int32_t *from[MOST_OPERANDS] = {0}, *row[MOST_OPERANDS];
    if (!buffer) return 0;
    for (int64_t at = first, held = 0; at < last; at++) {
        int64_t top = at % job->blocks * job->block, rest = at / job->blocks;
        int64_t start = (rest * job->height + top) * width;
        int64_t count = job->height - top < job->block ? job->height - top : job->block, place[MOST_DIMS] = {0};
        for (int axis = job->rank - 3; axis >= 0; axis--) {
            place[axis] = rest % job->dims[axis];
            rest /= job->dims[axis];
        }
        place[job->rank - 2] = top;
        for (int i = 0; i < MOST_OPERANDS; i++) {
            const int32_t *source = job->operand[i].data;
            for (int axis = 0; axis < job->rank - 1; axis++) source += place[axis] * job->step[i][axis];
            if (source == from[i] && count <= held) continue;
            from[i] = source;
            row[i] = spread(source, &job->step[i][job->rank - 2], count, width, buffer + i * size);
        }
        held = count;
        Row operands = {row[X], row[BEFORE], row[LIFT], row[MULTIPLIER], row[DIVISOR], row[AFTER]};
        int64_t n = count * width;
        if (job->grid.kind == TYPE_INT32) rescale_row32(operands, job->grid, n, (int32_t *)job->out + start);
        else rescale_row8(operands, job->grid, n, (uint8_t *)job->out + start);
    }
    free(buffer);
    return 1;
}

/* Bring the powers of two of an operand to places, in memory of its own. */
static OrtStatus *to_places(Tensor *powers) {
    int32_t *found = malloc(sizeof(int32_t) * (size_t)(powers->count + 1));
    if (!found) return failure("qcompile: no memory for a kernel's rows");
    for (int64_t i = 0; i < powers->count; i++) {
        int32_t power = ((const int32_t *)powers->data)[i];
        if (!is_power(power, 1 << 30)) {
            free(found);
            return failure("qcompile: a lift or divisor of Rescale is no power of two");
        }
        found[i] = places(power);
    }
    powers->data = found;
    return NULL;
}

static OrtStatus *run_rescale(const Call *call, Rescale *job) {
    Tensor *lift = &job->operand[LIFT], *divisor = &job->operand[DIVISOR];
    TRY(broadcast(job));
    int64_t count = 1;
    int rank = 0;
    for (int i = 0; i < MOST_OPERANDS; i++) rank = most_of(rank, job->operand[i].rank);
    for (int axis = 0; axis < job->rank; axis++) count *= job->dims[axis];
    TRY(output(call, 0, job->dims + job->rank - rank, rank, &job->out));
    TRY(to_places(lift));
    OrtStatus *status = to_places(divisor);
    if (status) {
        free(lift->data);
        return status;
    }
    int64_t outer = count ? count / (job->width * job->height) : 0;
    int is_even = !job->turned;
    for (int i = BEFORE; i <= AFTER; i++) is_even &= job->operand[i].count == 1;
    status = is_even ? in_pieces(call, rescale_evenly, job, outer * job->height, job->width)
                     : in_pieces(call, rescale_blocks, job, outer * job->blocks, job->block * job->width);
    free(lift->data);
    free(divisor->data);
    return status;
}

static OrtStatus *rescale_as(const Call *call, int kind, int turned) {
    const int64_t *s = call->settings->value;
    Grid grid = {(int32_t)s[0], (int32_t)s[1], (int32_t)s[2], (int32_t)s[3], (int32_t)s[4], (int32_t)s[5], kind};
    Rescale job = {.grid = grid, .turned = turned};
    for (int i = 0; i < MOST_OPERANDS; i++) TRY(input(call, (size_t)i, &job.operand[i]));
    return run_rescale(call, &job);
}

static OrtStatus *rescale(const Call *call) { return rescale_as(call, TYPE_INT32, 0); }
static OrtStatus *rescale_to_uint8(const Call *call) { return rescale_as(call, TYPE_UINT8, 0); }
static OrtStatus *rescale_to_int8(const Call *call) { return rescale_as(call, TYPE_INT8, 0); }
static OrtStatus *rescale_turned(const Call *call) { return rescale_as(call, TYPE_INT32, 1); }
static OrtStatus *rescale_to_uint8_turned(const Call *call) { return rescale_as(call, TYPE_UINT8, 1); }
static OrtStatus *rescale_to_int8_turned(const Call *call) { return rescale_as(call, TYPE_INT8, 1); }

/* A job that only requantises; x, multiplier and divisor are still to be set. */
static Rescale plain(int32_t least, int64_t low, int64_t high) {
    static int32_t none = 0, once = 1;
    Grid grid = {least, INT32_MAX, (int32_t)low, (int32_t)high, (int32_t)low, (int32_t)high, TYPE_INT32};
    Rescale job = {.grid = grid};
    Tensor zero = {.data = &none, .count = 1}, one = {.data = &once, .count = 1};
    job.operand[BEFORE] = job.operand[AFTER] = zero;
    job.operand[LIFT] = one;
    return job;
}

static OrtStatus *requantize(const Call *call) {
    Rescale job = plain(INT32_MIN, call->settings->value[0], call->settings->value[1]);
    TRY(input(call, 0, &job.operand[X]));
    TRY(input(call, 1, &job.operand[MULTIPLIER]));
    TRY(input(call, 2, &job.operand[DIVISOR]));
    return run_rescale(call, &job);
}

/* MultiplyWide, IntegerRelu2: the product of two wide values, of which the second is brought to 15 bits. */
LEVELS static void shorten(const int32_t *x, int narrow, int64_t n, int32_t *restrict y) {
    for (int64_t j = 0; j < n; j++) y[j] = clipped(plus(x[j], (1 << narrow) >> 1) >> narrow, -32767, 32767);
}

static OrtStatus *product_of(const Call *call, size_t second, int32_t least, int64_t low, int64_t high) {
    const int64_t *s = call->settings->value;
    int32_t divisor = (int32_t)s[1];
    Rescale job = plain(least, low, high);
    Tensor by = {.data = &divisor, .count = 1};
    if (!is_power(s[0], 1 << 15) || !is_power(s[1], 1 << 29))
        return failure("qcompile: a divisor that is no power of two");
    job.operand[DIVISOR] = by;
    TRY(input(call, 0, &job.operand[X]));
    TRY(input(call, second, &job.operand[MULTIPLIER]));
    Tensor *b = &job.operand[MULTIPLIER];
    int32_t *brief = malloc(sizeof(int32_t) * (size_t)(b->count + 1));
    if (!brief) return failure("qcompile: no memory for a product");
    shorten(b->data, places(s[0]), b->count, brief);
    if (least == 0)
        for (int64_t j = 0; j < b->count; j++) brief[j] = most_of(brief[j], 0);
    b->data = brief;
    OrtStatus *status = run_rescale(call, &job);
    free(brief);
    return status;
}

static OrtStatus *multiply_wide(const Call *call) {
    return product_of(call, 1, INT32_MIN, call->settings->value[2], call->settings->value[3]);
}

static OrtStatus *relu_squared(const Call *call) { return product_of(call, 0, 0, 0, call->settings->value[2]); }

/* SplitBytes */
typedef struct { const int32_t *x; int8_t *high, *low; int64_t width; } Bytes;

LEVELS static void split(const int32_t *x, int64_t n, int8_t *restrict high, int8_t *restrict low) {
    for (int64_t j = 0; j < n; j++) {
        int32_t whole = clipped(plus(x[j], 1 << 7) >> 8, -127, 127);
        high[j] = (int8_t)whole;
        low[j] = (int8_t)clipped(x[j] - whole * (1 << 8), -128, 127);
    }
}

static int split_rows(const void *data, int64_t first, int64_t last) {
    const Bytes *job = data;
    int64_t at = first * job->width;
    split(job->x + at, (last - first) * job->width, job->high + at, job->low + at);
    return 1;
}

static OrtStatus *split_bytes(const Call *call) {
    Tensor x;
    TRY(input(call, 0, &x));
    Bytes job = {.x = x.data, .width = columns(&x)};
    TRY(output(call, 0, x.dims, x.rank, &job.high));
    TRY(output(call, 1, x.dims, x.rank, &job.low));
    return in_pieces(call, split_rows, &job, rows(&x), job.width);
}
