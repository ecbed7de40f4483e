/* --------------------------------------------------------------------------- norms */

typedef struct { const int32_t *x; int32_t *y; int64_t width, epsilon; int centred; } Norm;

LEVELS static int64_t row_sum(const int32_t *x, int64_t n) {
    int64_t sum = 0;
    for (int64_t j = 0; j < n; j++) sum += x[j];
    return sum;
}

LEVELS static int32_t row_size(const int32_t *x, int32_t mean, int64_t n, int32_t *restrict y) {
    int32_t top = INT32_MIN, bottom = INT32_MAX;
    for (int64_t j = 0; j < n; j++) {
        y[j] = x[j] - mean;
        top = most_of(top, y[j]);
        bottom = least_of(bottom, y[j]);
    }
    return most_of(top, -bottom);
}

INLINE int32_t shortened(int32_t x, int shift) {
    return clipped(plus(x, (1 << shift) >> 1) >> shift, -(1 << 14), 1 << 14);
}

LEVELS static int64_t row_squares(const int32_t *y, int shift, int64_t n) {
    int64_t sum = 0;
    for (int64_t j = 0; j < n; j++) {
        int32_t s = shortened(y[j], shift);
        sum += s * s;
    }
    return sum;
}

LEVELS static void row_normal(int32_t *y, int shift, int32_t m, int power, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        int32_t s = shortened(y[j], shift), rest = clipped(y[j] - s * (1 << shift), -(1 << 15), 1 << 15);
        int32_t sum = s * m + toward_zero(rest * m, shift) + ((1 << power) >> 1);
        y[j] = clipped(sum >> power, -(1 << 26), 1 << 26);
    }
}

/* floor(sqrt(v)) for v in 2^28 .. 2^48 - 1, by Newton from above */
static int64_t integer_root(int64_t v) {
    int64_t root = INT64_C(1) << ((64 - __builtin_clzll((unsigned long long)v) + 1) / 2);
    for (int64_t next = (root + v / root) / 2; next < root; next = (root + v / root) / 2) root = next;
    return root;
}

static int norm_rows(const void *data, int64_t first, int64_t last) {
    const Norm *job = data;
    int64_t n = job->width;
    for (int64_t r = first; r < last; r++) {
        const int32_t *x = job->x + r * n;
        int32_t *y = job->y + r * n, mean = 0;
        if (job->centred) mean = (int32_t)clipped64(floor_division(row_sum(x, n) + n / 2, n), -(1 << 28), 1 << 28);
        int shift = reached(row_size(x, mean, n, y), 14, 29);
        int64_t p = INT64_C(1) << shift, square = row_squares(y, shift, n) * (1 << 18) / n;
        int64_t mean_square = square + job->epsilon * (1 << 18) / p / p;
        int64_t root = integer_root(clipped64(mean_square, 1 << 28, (INT64_C(1) << 48) - 1));
        if (root > (1 << 24) - 1) root = (1 << 24) - 1;
        int power = reached(root, 15, 23);
        int64_t m = ((INT64_C(1) << (29 + power)) + root / 2) / root;
        row_normal(y, shift, m < 32767 ? (int32_t)m : 32767, power, n);
    }
    return 1;
}

static OrtStatus *norm_of(const Call *call, int centred) {
    Tensor x;
    TRY(input(call, 0, &x));
    Norm job = {x.data, NULL, columns(&x), call->settings->value[0], centred};
    TRY(output(call, 0, x.dims, x.rank, &job.y));
    return in_pieces(call, norm_rows, &job, rows(&x), job.width);
}

static OrtStatus *rms_norm(const Call *call) { return norm_of(call, 0); }
static OrtStatus *layer_norm(const Call *call) { return norm_of(call, 1); }

/* --------------------------------------------------------------------------- codes of tokens */

typedef struct {
    const int32_t *x;
    uint8_t *codes;
    int32_t *zero, *step, *divisor;
    int64_t width;
    int bits, symmetric;
} Tokens;

LEVELS static void row_ends(const int32_t *x, int64_t n, int32_t *low, int32_t *high) {
    int32_t top = 0, bottom = 0;
    for (int64_t j = 0; j < n; j++) {
        top = most_of(top, x[j]);
        bottom = least_of(bottom, x[j]);
    }
    *low = bottom;
    *high = top;
}

LEVELS static void row_codes(const int32_t *x, int shift, int32_t levels, int32_t offset, Divisor by, int32_t low,
                             int32_t high, int64_t n, uint8_t *restrict codes) {
    int32_t top = (1 << 22) - 1;
    for (int64_t j = 0; j < n; j++) {
        int32_t moved = clipped(toward_zero(x[j], shift), -top, top) * levels + offset;
        codes[j] = (uint8_t)clipped(divided(most_of(moved, 0), by), low, high);
    }
}

static int token_rows(const void *data, int64_t first, int64_t last) {
    const Tokens *job = data;
    int grid_bits = job->bits - job->symmetric;
    int32_t levels = (1 << grid_bits) - 1, middle = 1 << grid_bits;
    for (int64_t r = first; r < last; r++) {
        const int32_t *x = job->x + r * job->width;
        int32_t low, high, zero, range;
        row_ends(x, job->width, &low, &high);
        int32_t size = job->symmetric ? most_of(high, -low) : high - low;
        int shift = reached(size, 22, job->symmetric ? 28 : 29);
        range = job->symmetric ? size >> shift : (high >> shift) - toward_zero(low, shift);
        int32_t width = clipped(range, 2, (1 << 22) - 1), depth = clipped(-toward_zero(low, shift), 0, (1 << 22) - 1);
        zero = job->symmetric ? middle : least_of((depth * levels + width / 2) / width, levels);
        int32_t first_code = job->symmetric ? middle - levels : 0;
        int32_t last_code = job->symmetric ? middle + levels : levels;
        row_codes(x, shift, levels, zero * width + width / 2, divisor_of(width), first_code, last_code, job->width,
                  job->codes + r * job->width);
        int octave = reached(width, 1, 21), exponent = (job->symmetric ? 29 : 30) - octave - shift;
        int64_t whole = (int64_t)width << (21 - octave);
        int64_t mantissa = ((whole << grid_bits) + (int64_t)levels * 128) / ((int64_t)levels * 256);
        job->zero[r] = zero;
        job->step[r] = (int32_t)clipped64(mantissa, 1, 32767);
        job->divisor[r] = 1 << clipped(exponent, 0, 29);
    }
    return 1;
}

static OrtStatus *tokens_of(const Call *call, int symmetric) {
    Tensor x;
    int64_t dims[MOST_DIMS];
    TRY(input(call, 0, &x));
    if (!x.rank) return failure("qcompile: tokens without an axis");
    if (call->settings->value[0] < 2 || call->settings->value[0] > 8)
        return failure("qcompile: codes have 2 to 8 bits");
    Tokens job = {.x = x.data, .width = columns(&x), .bits = (int)call->settings->value[0], .symmetric = symmetric};
    TRY(output(call, 0, x.dims, x.rank, &job.codes));
    memcpy(dims, x.dims, sizeof dims);
    dims[x.rank - 1] = 1;
    TRY(output(call, 1, dims, x.rank, &job.zero));
    TRY(output(call, 2, dims, x.rank, &job.step));
    TRY(output(call, 3, dims, x.rank, &job.divisor));
    return in_pieces(call, token_rows, &job, rows(&x), job.width);
}

static OrtStatus *quantize_tokens(const Call *call) { return tokens_of(call, 0); }
static OrtStatus *quantize_tokens_symmetric(const Call *call) { return tokens_of(call, 1); }

/* --------------------------------------------------------------------------- activations */

enum { RUN = 256 }; /* elements between two looks at a table */

/* ``whole``: the table of the function; else ``dents``: of what it lies below max(x, 0) */
typedef struct {
    const int32_t *x;
    int32_t *y;
    int64_t width;
    const int32_t *whole;
    const uint16_t *dents;
    int unit;
} Table;

LEVELS static void table_places(const int32_t *x, int unit, int steps, int even, int64_t n, int32_t *restrict place) {
    int shift = unit - steps;
    int32_t limit = REACH << unit, low = even ? 0 : -limit, start = (even ? 0 : limit) + ((1 << shift) >> 1);
    for (int64_t j = 0; j < n; j++) {
        int32_t size = even && x[j] < 0 ? -x[j] : x[j];
        place[j] = plus(clipped(size, low, limit), start) >> shift;
    }
}

LEVELS static void less_dents(const int32_t *x, const int32_t *dent, int unit, int64_t n, int32_t *restrict y) {
    int up = most_of(unit - DENT_FRACTION, 0), down = most_of(DENT_FRACTION - unit, 0);
    for (int64_t j = 0; j < n; j++) y[j] = most_of(x[j], 0) - (((dent[j] << up) + ((1 << down) >> 1)) >> down);
}

static int table_rows(const void *data, int64_t first, int64_t last) {
    const Table *job = data;
    int32_t place[RUN];
    for (int64_t start = first * job->width; start < last * job->width; start += RUN) {
        int64_t n = last * job->width - start < RUN ? last * job->width - start : RUN;
        const int32_t *x = job->x + start;
        int32_t *y = job->y + start;
        table_places(x, job->unit, job->dents ? DENT_STEP_BITS : SIGMOID_STEP_BITS, job->dents != NULL, n, place);
        if (job->whole) {
            for (int64_t j = 0; j < n; j++) y[j] = job->whole[place[j]];
        } else {
            for (int64_t j = 0; j < n; j++) place[j] = job->dents[place[j]];
            less_dents(x, place, job->unit, n, y);
        }
    }
    return 1;
}

static OrtStatus *looked_up(const Call *call, const int32_t *whole, const uint16_t *dents, int halved) {
    Tensor x;
    int64_t unit = call->settings->value[0];
    if (!is_power(unit, 1 << 26) || unit >> halved < 1 << (dents ? DENT_STEP_BITS : SIGMOID_STEP_BITS))
        return failure("qcompile: a unit that is no power of two between 2^11 and 2^26");
    TRY(input(call, 0, &x));
    Table job = {x.data, NULL, columns(&x), whole, dents, places(unit) - halved};
    TRY(output(call, 0, x.dims, x.rank, &job.y));
    return in_pieces(call, table_rows, &job, rows(&x), job.width);
}

static OrtStatus *integer_sigmoid(const Call *call) { return looked_up(call, sigmoid, NULL, 0); }
static OrtStatus *integer_tanh(const Call *call) { return looked_up(call, tanh_of_half, NULL, 1); }
static OrtStatus *integer_silu(const Call *call) { return looked_up(call, NULL, silu, 0); }
static OrtStatus *integer_gelu(const Call *call) { return looked_up(call, NULL, gelu, 0); }
static OrtStatus *integer_gelu_tanh(const Call *call) { return looked_up(call, NULL, gelu_tanh, 0); }
