/* --------------------------------------------------------------------------- attention */

typedef struct {
    const int32_t *scores, *period;
    const uint8_t *mask;
    uint8_t *high, *low;
    int32_t *total;
    const uint16_t *table;
    int64_t width, dims[MOST_DIMS], mask_step[MOST_DIMS], period_step[MOST_DIMS];
    int rank, bits;
    int32_t lift;
} Softmax;

LEVELS static int32_t softmax_top(const int32_t *x, const uint8_t *mask, int64_t step, int64_t n,
                                  int32_t *restrict held) {
    int32_t top = -(1 << 29);
    if (step) for (int64_t j = 0; j < n; j++) held[j] = mask[j] ? x[j] : -(1 << 30);
    else for (int64_t j = 0; j < n; j++) held[j] = *mask ? x[j] : -(1 << 30);
    for (int64_t j = 0; j < n; j++) top = most_of(top, held[j]);
    return top;
}

LEVELS static void softmax_places(int32_t *restrict held, int64_t n, int32_t top, int32_t cap, int32_t steps,
                                  Divisor by, int32_t end) {
    for (int64_t j = 0; j < n; j++) held[j] = least_of(divided(times(clipped(top - held[j], 0, cap), steps), by), end);
}

LEVELS static uint32_t softmax_bytes(const int32_t *weights, int64_t n, uint8_t *restrict codes) {
    uint32_t sum = 0;
    for (int64_t j = 0; j < n; j++) sum += (uint32_t)weights[j];
    for (int64_t j = 0; j < n; j++) codes[j] = (uint8_t)weights[j];
    return sum;
}

LEVELS static uint32_t softmax_words(const int32_t *weights, int64_t n, uint8_t *restrict high, uint8_t *restrict low) {
    uint32_t sum = softmax_bytes(weights, n, low);
    for (int64_t j = 0; j < n; j++) high[j] = (uint8_t)(weights[j] >> 8);
    return sum;
}

static int softmax_rows(const void *data, int64_t first, int64_t last) {
    const Softmax *job = data;
    int64_t width = job->width;
    int32_t end = (job->bits + 1) * OCTAVE, cap = ((job->bits + 1) * 65536 - 1 + job->lift) / job->lift;
    int32_t *held = malloc(sizeof(int32_t) * (size_t)(width + 1));
    if (!held) return 0;
    for (int64_t r = first; r < last; r++) {
        int64_t rest = r, mask_at = 0, period_at = 0;
        for (int axis = job->rank - 2; axis >= 0; axis--) {
            int64_t at = rest % job->dims[axis];
            rest /= job->dims[axis];
            mask_at += at * job->mask_step[axis];
            period_at += at * job->period_step[axis];
        }
        const uint8_t *mask = job->mask + mask_at;
        int32_t top = softmax_top(job->scores + r * width, mask, job->mask_step[job->rank - 1], width, held);
        Divisor by = divisor_of(most_of(job->period[period_at], 1 << 13));
        softmax_places(held, width, top, cap, job->lift * OCTAVE, by, end);
        for (int64_t j = 0; j < width; j++) held[j] = job->table[held[j]];
        uint32_t sum = job->bits == 8 ? softmax_bytes(held, width, job->high + r * width)
                                      : softmax_words(held, width, job->high + r * width, job->low + r * width);
        job->total[r] = most_of((int32_t)sum, 1);
    }
    free(held);
    return 1;
}

static OrtStatus *softmax_of(const Call *call, int bits, const uint16_t *table) {
    Tensor scores, mask, period;
    TRY(input(call, 0, &scores));
    TRY(input(call, 1, &mask));
    TRY(input(call, 2, &period));
    if (!scores.rank) return failure("qcompile: scores without an axis");
    Softmax job = {.scores = scores.data, .mask = mask.data, .period = period.data, .table = table, .bits = bits,
                   .width = columns(&scores), .rank = scores.rank, .lift = (int32_t)call->settings->value[0]};
    memcpy(job.dims, scores.dims, sizeof job.dims);
    TRY(steps_of(&mask, job.dims, job.rank, job.mask_step));
    TRY(steps_of(&period, job.dims, job.rank, job.period_step));
    if (job.period_step[job.rank - 1]) return failure("qcompile: the period varies along a row");
    TRY(output(call, 0, scores.dims, scores.rank, &job.high));
    if (bits == 16) TRY(output(call, 1, scores.dims, scores.rank, &job.low));
    int64_t dims[MOST_DIMS];
    memcpy(dims, scores.dims, sizeof dims);
    dims[scores.rank - 1] = 1;
    TRY(output(call, bits == 16 ? 2 : 1, dims, scores.rank, &job.total));
    return in_pieces(call, softmax_rows, &job, rows(&scores), job.width);
}

static OrtStatus *softmax8(const Call *call) { return softmax_of(call, 8, halvings8); }
static OrtStatus *softmax16(const Call *call) { return softmax_of(call, 16, halvings16); }

typedef struct { const int32_t *high, *low, *total; int32_t *y; int64_t width; int32_t lift; } Mean;

LEVELS static void mean_row(const int32_t *sums, int32_t total, int64_t n, int32_t *restrict y) {
    int32_t count = clipped(total, 1, 255 * 32768);
    Divisor by = divisor_of(count);
    for (int64_t j = 0; j < n; j++) {
        int32_t moved = plus(sums[j], count << 7), whole = divided(moved, by);
        y[j] = ((whole - 128) << 7) + divided(((moved - times(whole, count)) << 7) + (count >> 1), by);
    }
}

LEVELS static void mean_row16(const int32_t *high, const int32_t *low, int32_t total, int32_t lift, int64_t n,
                              int32_t *restrict y) {
    int32_t count = most_of(total, 1 << 15), end = 1 << 29;
    int octave = reached(count, 16, 30);
    int64_t reciprocal = ((INT64_C(1) << (30 + octave)) + count / 2) / count;
    int32_t m = reciprocal < 32767 ? (int32_t)reciprocal : 32767;
    int high_shift = octave + 1, low_shift = octave + 9;
    for (int64_t j = 0; j < n; j++) {
        int32_t a = plus(scaled(times(high[j], lift), m), 1 << (high_shift - 1)) >> high_shift;
        int32_t b = plus(scaled(times(low[j], lift), m), 1 << (low_shift - 1)) >> low_shift;
        y[j] = clipped(a, -end, end) + clipped(b, -end, end);
    }
}

static int mean_rows(const void *data, int64_t first, int64_t last) {
    const Mean *job = data;
    for (int64_t r = first; r < last; r++) {
        int64_t at = r * job->width;
        if (job->low) mean_row16(job->high + at, job->low + at, job->total[r], job->lift, job->width, job->y + at);
        else mean_row(job->high + at, job->total[r], job->width, job->y + at);
    }
    return 1;
}

/* sums (..., d), total (..., 1), which may broadcast over the sums' leading axes of size 1 only */
static OrtStatus *mean_of(const Call *call, size_t total_place) {
    Tensor sums, total, low = {0};
    TRY(input(call, 0, &sums));
    if (total_place == 2) TRY(input(call, 1, &low));
    TRY(input(call, total_place, &total));
    int64_t *dims = sums.dims, spread[MOST_DIMS];
    TRY(steps_of(&total, dims, sums.rank, spread));
    int64_t width = columns(&sums), count = rows(&sums);
    if (total_place == 2 && low.count != sums.count) return failure("qcompile: sums that differ in shape");
    int32_t *each = NULL;
    if (total.count != count) {
        each = malloc(sizeof(int32_t) * (size_t)(count + 1));
        if (!each) return failure("qcompile: no memory for totals");
        for (int64_t r = 0; r < count; r++) {
            int64_t rest = r, at = 0;
            for (int axis = sums.rank - 2; axis >= 0; axis--) {
                at += rest % dims[axis] * spread[axis];
                rest /= dims[axis];
            }
            each[r] = ((const int32_t *)total.data)[at];
        }
    }
    Mean job = {sums.data, low.data, each ? each : total.data, NULL, width, 1};
    if (total_place == 2) job.lift = (int32_t)call->settings->value[0];
    OrtStatus *status = output(call, 0, dims, sums.rank, &job.y);
    if (!status) status = in_pieces(call, mean_rows, &job, count, width);
    free(each);
    return status;
}

static OrtStatus *normalize_attention(const Call *call) { return mean_of(call, 1); }
static OrtStatus *normalize_attention16(const Call *call) { return mean_of(call, 2); }

typedef struct {
    const int32_t *x, *cos, *sin;
    int32_t *y;
    int64_t width, dims[MOST_DIMS], cos_step[MOST_DIMS], sin_step[MOST_DIMS];
    int rank;
} Rotary;

INLINE int32_t turned(int32_t a, int32_t cos, int32_t b, int32_t sin) {
    int32_t sum = plus(times(a, cos), times(b, sin));
    return toward_zero(plus(sum, sum > 0 ? 1 << 13 : sum < 0 ? -(1 << 13) : 0), 14);
}

LEVELS static void rotary_row(const int32_t *x, const int32_t *cos, const int32_t *sin, int64_t half,
                              int32_t *restrict y) {
    for (int64_t j = 0; j < half; j++) y[j] = turned(x[j], cos[j], -x[half + j], sin[j]);
    for (int64_t j = half; j < 2 * half; j++) y[j] = turned(x[j], cos[j], x[j - half], sin[j]);
}

static int rotary_rows(const void *data, int64_t first, int64_t last) {
    const Rotary *job = data;
    for (int64_t r = first; r < last; r++) {
        int64_t rest = r, cos_at = 0, sin_at = 0, at = r * job->width;
        for (int axis = job->rank - 2; axis >= 0; axis--) {
            cos_at += rest % job->dims[axis] * job->cos_step[axis];
            sin_at += rest % job->dims[axis] * job->sin_step[axis];
            rest /= job->dims[axis];
        }
        rotary_row(job->x + at, job->cos + cos_at, job->sin + sin_at, job->width / 2, job->y + at);
    }
    return 1;
}

static OrtStatus *rotary(const Call *call) {
    Tensor x, cos, sin;
    TRY(input(call, 0, &x));
    TRY(input(call, 1, &cos));
    TRY(input(call, 2, &sin));
    Rotary job = {.x = x.data, .cos = cos.data, .sin = sin.data, .width = columns(&x), .rank = x.rank};
    memcpy(job.dims, x.dims, sizeof job.dims);
    TRY(steps_of(&cos, x.dims, x.rank, job.cos_step));
    TRY(steps_of(&sin, x.dims, x.rank, job.sin_step));
    if (job.width % 2 || !job.rank || columns(&cos) != job.width || columns(&sin) != job.width)
        return failure("qcompile: a rotary embedding needs tables as wide as its heads, which are even");
    TRY(output(call, 0, x.dims, x.rank, &job.y));
    return in_pieces(call, rotary_rows, &job, rows(&x), job.width);
}
