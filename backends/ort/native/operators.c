/* --------------------------------------------------------------------------- operators */

typedef OrtStatus *(*Compute)(const Call *call);

/* What ONNX Runtime reads of an operator; members that are not used here are null. */
typedef struct OrtCustomOp {
    uint32_t version;
    void *(*create)(const struct OrtCustomOp *, const Entry *, const void *);
    const char *(*name)(const struct OrtCustomOp *);
    const char *(*provider)(const struct OrtCustomOp *);
    int (*input_type)(const struct OrtCustomOp *, size_t);
    size_t (*input_count)(const struct OrtCustomOp *);
    int (*output_type)(const struct OrtCustomOp *, size_t);
    size_t (*output_count)(const struct OrtCustomOp *);
    void (*compute)(void *, void *);
    void (*destroy)(void *);
    int (*input_kind)(const struct OrtCustomOp *, size_t);
    int (*output_kind)(const struct OrtCustomOp *, size_t);
    int (*memory)(const struct OrtCustomOp *, size_t);
    int (*variadic[4])(const struct OrtCustomOp *);
    OrtStatus *(*create2)(const struct OrtCustomOp *, const Entry *, const void *, void **);
    OrtStatus *(*compute2)(void *, void *);
    OrtStatus *(*infer)(const struct OrtCustomOp *, void *);
    int (*first_version)(const struct OrtCustomOp *);
    int (*last_version)(const struct OrtCustomOp *);
    void *in_place[4];
} OrtCustomOp;

typedef struct {
    OrtCustomOp face;
    const char *name;
    Compute compute;
    int inputs[MOST_OPERANDS], outputs[4]; /* types, 0 after the last */
    const char *attributes[MOST_SETTINGS];
} Operator;

typedef struct { Settings settings; Compute compute; } Kernel;

static size_t count_of(const int *types, size_t most) {
    size_t count = 0;
    while (count < most && types[count]) count++;
    return count;
}

static const char *name_of(const OrtCustomOp *op) { return ((const Operator *)op)->name; }
static const char *on_cpu(const OrtCustomOp *op) { return (void)op, NULL; }
static int input_type(const OrtCustomOp *op, size_t i) { return ((const Operator *)op)->inputs[i]; }
static size_t input_count(const OrtCustomOp *op) { return count_of(((const Operator *)op)->inputs, MOST_OPERANDS); }
static int output_type(const OrtCustomOp *op, size_t i) { return ((const Operator *)op)->outputs[i]; }
static size_t output_count(const OrtCustomOp *op) { return count_of(((const Operator *)op)->outputs, 4); }
static int always(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, REQUIRED; }
static int in_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int no_variadic(const OrtCustomOp *op) { return (void)op, 0; }
static int first_version(const OrtCustomOp *op) { return (void)op, 1; }
static int last_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }
static void destroy(void *kernel) { free(kernel); }

static OrtStatus *create(const OrtCustomOp *face, const Entry *table, const void *info, void **made) {
    const Operator *op = (const Operator *)face;
    Kernel *kernel = calloc(1, sizeof *kernel);
    (void)table;
    if (!kernel) return failure("qcompile: no memory for a kernel");
    kernel->compute = op->compute;
    for (int i = 0; i < MOST_SETTINGS && op->attributes[i]; i++) {
        int64_t *value = &kernel->settings.value[i];
        const char *name = op->attributes[i];
        OrtStatus *status = CALL(AT_ATTRIBUTE_INT, (const void *, const char *, int64_t *))(info, name, value);
        if (status) {
            free(kernel);
            return status;
        }
    }
    *made = kernel;
    return NULL;
}

static OrtStatus *compute(void *made, void *context) {
    const Kernel *kernel = made;
    Call call = {context, &kernel->settings};
    return kernel->compute(&call);
}

#define FACE {API_VERSION, NULL, name_of, on_cpu, input_type, input_count, output_type, output_count, NULL, destroy, \
              always, always, in_memory, {no_variadic, no_variadic, no_variadic, no_variadic}, create, compute, NULL, \
              first_version, last_version, {NULL, NULL, NULL, NULL}}
#define I32 TYPE_INT32
#define GRID {"floor", "ceiling", "low", "high", "least", "most"}
#define SIX {I32, I32, I32, I32, I32, I32}

static const Operator OPERATORS[] = {
    {FACE, "Rescale", rescale, SIX, {I32}, GRID},
    {FACE, "RescaleTurned", rescale_turned, SIX, {I32}, GRID},
    {FACE, "RescaleToUint8", rescale_to_uint8, SIX, {TYPE_UINT8}, GRID},
    {FACE, "RescaleToUint8Turned", rescale_to_uint8_turned, SIX, {TYPE_UINT8}, GRID},
    {FACE, "RescaleToInt8", rescale_to_int8, SIX, {TYPE_INT8}, GRID},
    {FACE, "RescaleToInt8Turned", rescale_to_int8_turned, SIX, {TYPE_INT8}, GRID},
    {FACE, "Requantize", requantize, {I32, I32, I32}, {I32}, {"low", "high"}},
    {FACE, "RequantizeSigned", requantize, {I32, I32, I32}, {I32}, {"low", "high"}},
    {FACE, "MultiplyWide", multiply_wide, {I32, I32}, {I32}, {"narrow", "divisor", "low", "high"}},
    {FACE, "IntegerRelu2", relu_squared, {I32}, {I32}, {"narrow", "divisor", "high"}},
    {FACE, "SplitBytes", split_bytes, {I32}, {TYPE_INT8, TYPE_INT8}, {NULL}},
    {FACE, "IntegerSoftmax", softmax8, {I32, TYPE_BOOL, I32}, {TYPE_UINT8, I32}, {"lift"}},
    {FACE, "IntegerSoftmax16", softmax16, {I32, TYPE_BOOL, I32}, {TYPE_UINT8, TYPE_UINT8, I32}, {"lift"}},
    {FACE, "NormalizeAttention", normalize_attention, {I32, I32}, {I32}, {NULL}},
    {FACE, "NormalizeAttention16", normalize_attention16, {I32, I32, I32}, {I32}, {"lift"}},
    {FACE, "IntegerRotaryEmbedding", rotary, {I32, I32, I32}, {I32}, {NULL}},
    {FACE, "IntegerRMSNorm", rms_norm, {I32}, {I32}, {"epsilon"}},
    {FACE, "IntegerLayerNorm", layer_norm, {I32}, {I32}, {"epsilon"}},
    {FACE, "QuantizePerTokenInteger", quantize_tokens, {I32}, {TYPE_UINT8, I32, I32, I32}, {"bits"}},
    {FACE, "QuantizePerTokenIntegerSymmetric", quantize_tokens_symmetric, {I32}, {TYPE_UINT8, I32, I32, I32}, {"bits"}},
    {FACE, "IntegerSigmoid", integer_sigmoid, {I32}, {I32}, {"unit"}},
    {FACE, "IntegerTanh", integer_tanh, {I32}, {I32}, {"unit"}},
    {FACE, "IntegerSilu", integer_silu, {I32}, {I32}, {"unit"}},
    {FACE, "IntegerGelu", integer_gelu, {I32}, {I32}, {"unit"}},
    {FACE, "IntegerGeluTanh", integer_gelu_tanh, {I32}, {I32}, {"unit"}},
};

/* What ``SessionOptions.register_custom_ops_library`` calls. The domain lives as long as the library. */
#if defined(_WIN32)
__declspec(dllexport)
#else
__attribute__((visibility("default")))
#endif
OrtStatus *RegisterCustomOps(void *options, const OrtApiBase *base) {
    static void *domain;
    api = base->table(API_VERSION);
    if (!api) {
        api = base->table(1); /* enough to say so */
        return failure("qcompile: the kernels need ONNX Runtime 1.18 or newer");
    }
    if (!domain) {
        void *made;
        TRY(CALL(AT_CREATE_DOMAIN, (const char *, void **))("qcompile", &made));
        for (size_t i = 0; i < sizeof OPERATORS / sizeof *OPERATORS; i++)
            TRY(CALL(AT_DOMAIN_ADD, (void *, const OrtCustomOp *))(made, &OPERATORS[i].face));
        domain = made;
    }
    return CALL(AT_ADD_DOMAIN, (void *, void *))(options, domain);
}
