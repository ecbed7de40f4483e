#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* RTLD_DEFAULT */
#endif
#include "qcompile_program.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__aarch64__)
#define ARCH "aarch64"
#elif defined(__x86_64__)
#define ARCH "x86_64"
#else
#error "programs are compiled for aarch64 and x86_64"
#endif

enum { ALIGNMENT = 64, DEPTH = 64, MOST_ARGUMENTS = 64 };
enum { INPUT, PARAMETER, TEMPORARY, VIEW, DERIVED }; /* derived: bytes of a parameter, transposed, plus first */
static const char MAGIC[9] = "QCPLAN02";

/* How the kernels are called: the layouts of tvm_ffi's TVMFFIAny and DLPack's DLTensor. */
typedef struct { int32_t type; uint32_t padding; union { int64_t number; void* pointer; } value; } argument_t;
typedef struct {
  void* data;
  int32_t device_type, device_id, rank;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
} tensor_t;
typedef int (*kernel_t)(void* self, const argument_t* arguments, int32_t count, argument_t* result);

typedef struct { const int64_t* codes; int64_t count; } expression_t;
typedef struct { int64_t place, source, code, bits, first, last, rank; const int64_t* dims; } slot_t;
typedef struct { int64_t kernel, count; const int64_t* arguments; } step_t;
typedef struct { char* name; int64_t slot, rows; } port_t; /* rows: of the table that its ids are of, 0 for none */
typedef struct { const unsigned char* data; size_t size; } file_t;

struct qc_program {
  void* library;
  file_t plan, parameters;
  int64_t variables_count, expressions_count, slots_count, kernels_count, steps_count, inputs_count, outputs_count;
  int64_t longest; /* tokens that there are positions for */
  const int64_t* variables; /* pairs: input, axis */
  expression_t* expressions;
  slot_t* slots;
  port_t *inputs, *outputs;
  kernel_t* kernels;
  step_t* steps;
  int64_t* values;  /* of the variables, then of the expressions, at the last run */
  size_t* offsets;  /* of temporaries and copied inputs in memory */
  int64_t* alive;   /* scratch for the layout */
  void** data;      /* of each slot */
  unsigned char** derived; /* of each slot that is */
  int64_t* extents; /* shapes and strides of each slot, 2 * QC_RANK */
  unsigned char* memory;
  size_t memory_size;
  int laid_out;
  char error[256];
};

static int failed(char* error, size_t size, const char* format, ...) {
  va_list list;
  va_start(list, format);
  if (size) vsnprintf(error, size, format, list);
  va_end(list);
  return -1;
}
#define FAIL(...) return failed(program->error, sizeof program->error, __VA_ARGS__)

/* ------------------------------------------------------------------ what kernels call back */

static void* workspace(int device, int number, uint64_t size, int code, int bits) {
  void* found = NULL;
  (void)device, (void)number, (void)code, (void)bits;
  return posix_memalign(&found, ALIGNMENT, size ? size : 1) ? NULL : found;
}

static int release(int device, int number, void* pointer) {
  (void)device, (void)number;
  free(pointer);
  return 0;
}

typedef struct { void* sync; int32_t tasks; } group_t;

static int launch(int (*task)(int, group_t*, void*), void* data, int tasks) {
  group_t group = {NULL, 1}; /* one task does the work of all */
  (void)tasks;
  return task(0, &group, data);
}

static int barrier(int task, group_t* group) {
  (void)task, (void)group;
  return 0;
}

static void set_pointer(void* library, const char* name, void (*function)(void)) {
  void (**place)(void) = NULL;
  *(void**)&place = dlsym(library, name);
  if (place) *place = function;
}

/* ------------------------------------------------------------------ reading the plan */

typedef struct { const int64_t *at, *end; int damaged; } reader_t;

static int64_t word(reader_t* reader) {
  if (reader->at >= reader->end) {
    reader->damaged = 1;
    return 0;
  }
  return *reader->at++;
}

/* A count of things that take at least ``words`` each. */
static int64_t count(reader_t* reader, int64_t words) {
  const int64_t found = word(reader);
  if (found >= 0 && found <= (reader->end - reader->at) / words) return found;
  reader->damaged = 1;
  return 0;
}

static const int64_t* words(reader_t* reader, int64_t number) {
  const int64_t* found = reader->at;
  if (number < 0 || number > reader->end - reader->at) {
    reader->damaged = 1;
    return reader->end;
  }
  reader->at += number;
  return found;
}

static int64_t below(reader_t* reader, int64_t number, int64_t limit) {
  if (number >= 0 && number < limit) return number;
  reader->damaged = 1;
  return 0;
}

static char* text(reader_t* reader) {
  const int64_t length = word(reader);
  const int64_t* data = words(reader, length < 0 ? -1 : length / 8 + (length % 8 != 0));
  char* found = calloc(1, reader->damaged ? 1 : (size_t)length + 1);
  if (found && !reader->damaged) memcpy(found, data, (size_t)length);
  return found;
}

static file_t map(const char* path) {
  file_t file = {NULL, 0};
  struct stat facts;
  const int opened = open(path, O_RDONLY);
  if (opened < 0) return file;
  if (fstat(opened, &facts) == 0 && facts.st_size > 0) {
    void* data = mmap(NULL, (size_t)facts.st_size, PROT_READ, MAP_PRIVATE, opened, 0);
    if (data != MAP_FAILED) file.data = data, file.size = (size_t)facts.st_size;
  }
  close(opened);
  return file;
}

static void read_expressions(qc_program* program, reader_t* reader) {
  program->variables_count = count(reader, 2);
  program->variables = words(reader, 2 * program->variables_count);
  program->expressions_count = count(reader, 3);
  program->expressions = calloc((size_t)program->expressions_count + 1, sizeof *program->expressions);
  for (int64_t i = 0; i < program->expressions_count && !reader->damaged; ++i) {
    expression_t* one = &program->expressions[i];
    int64_t depth = 0;
    one->count = count(reader, 2);
    one->codes = words(reader, 2 * one->count);
    for (int64_t c = 0; c < one->count && !reader->damaged; ++c) {
      const int64_t code = below(reader, one->codes[2 * c], 9);
      if (code == 1) below(reader, one->codes[2 * c + 1], program->variables_count);
      depth += code < 2 ? 1 : -1;
      if (depth < 1 || depth > DEPTH) reader->damaged = 1;
    }
    if (depth != 1) reader->damaged = 1;
  }
}

static void read_slots(qc_program* program, reader_t* reader) {
  program->slots_count = count(reader, 7);
  program->slots = calloc((size_t)program->slots_count + 1, sizeof *program->slots);
  for (int64_t i = 0; i < program->slots_count && !reader->damaged; ++i) {
    slot_t* slot = &program->slots[i];
    slot->place = below(reader, word(reader), 5);
    slot->source = word(reader);
    slot->code = word(reader);
    slot->bits = word(reader);
    slot->first = word(reader);
    slot->last = word(reader);
    slot->rank = below(reader, word(reader), QC_RANK + 1);
    slot->dims = words(reader, slot->rank);
    for (int64_t axis = 0; axis < slot->rank && !reader->damaged; ++axis)
      below(reader, slot->dims[axis], program->expressions_count);
    if (slot->place == VIEW) below(reader, slot->source, i); /* so that no view leads to itself */
    if (slot->place == DERIVED) below(reader, slot->source, program->slots_count);
    if (slot->place == PARAMETER) below(reader, slot->source, (int64_t)program->parameters.size + 1);
  }
}

static port_t* read_ports(qc_program* program, reader_t* reader, int64_t* number) {
  *number = count(reader, 3);
  port_t* ports = calloc((size_t)*number + 1, sizeof *ports);
  for (int64_t i = 0; i < *number && !reader->damaged; ++i) {
    ports[i].name = text(reader);
    ports[i].slot = below(reader, word(reader), program->slots_count);
    ports[i].rows = word(reader);
  }
  return ports;
}

static int read_kernels(qc_program* program, reader_t* reader) {
  program->kernels_count = count(reader, 1);
  program->kernels = calloc((size_t)program->kernels_count + 1, sizeof *program->kernels);
  for (int64_t i = 0; i < program->kernels_count && !reader->damaged; ++i) {
    char symbol[512], *name = text(reader);
    snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", name);
    *(void**)&program->kernels[i] = dlsym(program->library, symbol);
    free(name);
    if (!program->kernels[i]) FAIL("the library has no kernel '%s': it belongs to another plan", symbol + 10);
  }
  return 0;
}

static void read_steps(qc_program* program, reader_t* reader) {
  program->steps_count = count(reader, 2);
  program->steps = calloc((size_t)program->steps_count + 1, sizeof *program->steps);
  for (int64_t i = 0; i < program->steps_count && !reader->damaged; ++i) {
    step_t* step = &program->steps[i];
    step->kernel = below(reader, word(reader), program->kernels_count);
    step->count = below(reader, word(reader), MOST_ARGUMENTS + 1);
    step->arguments = words(reader, 2 * step->count);
    for (int64_t a = 0; a < step->count && !reader->damaged; ++a) {
      const int is_dim = step->arguments[2 * a] == 1;
      below(reader, step->arguments[2 * a + 1], is_dim ? program->expressions_count : program->slots_count);
    }
  }
}

/* Whether the plan is one, and for this processor; the reader stands behind what was read. */
static int read_head(qc_program* program, reader_t* reader, const char* path) {
  if (program->plan.size < 8 || memcmp(program->plan.data, MAGIC, 8)) FAIL("'%s' is no plan of this version", path);
  word(reader);
  char *target = text(reader), *digest = text(reader), arch[16] = "";
  if (target) sscanf(target, "%15[^-]", arch);
  const int fits = !strcmp(arch, ARCH) || (!strcmp(arch, "arm64") && !strcmp(ARCH, "aarch64"));
  if (!fits) failed(program->error, sizeof program->error, "'%s' is for %s, and this is %s", path, target, ARCH);
  free(target);
  free(digest);
  return fits ? 0 : -1;
}

static int read_plan(qc_program* program, reader_t* reader, const char* path) {
  const int64_t size = word(reader);
  if (size < 0 || (size_t)size > program->parameters.size) FAIL("the file of parameters is not the plan's: too short");
  program->longest = word(reader);
  read_expressions(program, reader);
  read_slots(program, reader);
  program->inputs = read_ports(program, reader, &program->inputs_count);
  program->outputs = read_ports(program, reader, &program->outputs_count);
  if (read_kernels(program, reader)) return -1;
  read_steps(program, reader);
  for (int64_t i = 0; i < program->variables_count && !reader->damaged; ++i) {
    const int64_t input = below(reader, program->variables[2 * i], program->inputs_count);
    if (!reader->damaged) below(reader, program->variables[2 * i + 1], program->slots[program->inputs[input].slot].rank);
  }
  if (reader->damaged) FAIL("'%s' is damaged", path);
  return 0;
}

static int64_t fixed(const qc_program* program, int64_t dim) { /* -1 for one that depends on the inputs */
  const expression_t one = program->expressions[dim];
  return one.count == 1 && one.codes[0] == 0 ? one.codes[1] : -1;
}

static int derive(qc_program* program) {
  enum { TILE = 64 };
  for (int64_t i = 0; i < program->slots_count; ++i) {
    const slot_t* slot = &program->slots[i];
    if (slot->place != DERIVED) continue;
    const slot_t* table = &program->slots[slot->source];
    const int64_t rows = table->rank == 2 ? fixed(program, table->dims[0]) : -1;
    const int64_t columns = table->rank == 2 ? fixed(program, table->dims[1]) : -1;
    const int64_t size = (int64_t)program->parameters.size;
    const int whole = table->place == PARAMETER && table->bits == 8 && slot->bits == 8 && slot->rank == 2 && rows > 0 &&
                      columns > 0 && rows <= size / columns && table->source <= size - rows * columns &&
                      fixed(program, slot->dims[0]) == columns && fixed(program, slot->dims[1]) == rows;
    if (!whole) FAIL("the plan is damaged");
    const unsigned char* from = program->parameters.data + table->source;
    unsigned char* to = program->derived[i] = workspace(1, 0, (uint64_t)(rows * columns), 1, 8);
    if (!to) FAIL("out of memory");
    for (int64_t r = 0; r < rows; r += TILE)
      for (int64_t c = 0; c < columns; c += TILE)
        for (int64_t y = r; y < rows && y < r + TILE; ++y)
          for (int64_t x = c; x < columns && x < c + TILE; ++x)
            to[x * rows + y] = (unsigned char)(from[y * columns + x] + slot->first);
  }
  return 0;
}

static int open_all(qc_program* program, const char* library, const char* plan, const char* parameters) {
  program->plan = map(plan);
  if (!program->plan.data) FAIL("cannot read '%s'", plan);
  program->parameters = map(parameters);
  if (!program->parameters.data) FAIL("cannot read '%s'", parameters);
  const int64_t* start = (const int64_t*)program->plan.data;
  reader_t reader = {start, start + program->plan.size / 8, 0};
  if (read_head(program, &reader, plan)) return -1;
  program->library = library ? dlopen(library, RTLD_NOW | RTLD_LOCAL) : RTLD_DEFAULT;
  if (library && !program->library) FAIL("%s", dlerror());
  set_pointer(program->library, "__TVMBackendAllocWorkspace", (void (*)(void))workspace);
  set_pointer(program->library, "__TVMBackendFreeWorkspace", (void (*)(void))release);
  set_pointer(program->library, "__TVMBackendParallelLaunch", (void (*)(void))launch);
  set_pointer(program->library, "__TVMBackendParallelBarrier", (void (*)(void))barrier);
  if (read_plan(program, &reader, plan)) return -1;
  const size_t slots = (size_t)program->slots_count + 1;
  program->values = calloc((size_t)(program->variables_count + program->expressions_count) + 1, sizeof(int64_t));
  program->offsets = calloc(slots, sizeof(size_t));
  program->alive = calloc(slots, sizeof(int64_t));
  program->data = calloc(slots, sizeof(void*));
  program->extents = calloc(slots * 2 * QC_RANK, sizeof(int64_t));
  program->derived = calloc(slots, sizeof(unsigned char*));
  if (!program->derived || !program->values || !program->offsets || !program->alive || !program->data || !program->extents)
    FAIL("out of memory");
  return derive(program);
}

qc_program* qc_open(const char* library, const char* plan, const char* parameters, char* error, size_t error_size) {
  qc_program* program = calloc(1, sizeof *program);
  if (program && open_all(program, library, plan, parameters) == 0) return program;
  failed(error, error_size, "%s", program ? program->error : "out of memory");
  qc_close(program);
  return NULL;
}

void qc_close(qc_program* program) {
  if (!program) return;
  for (int64_t i = 0; program->inputs && i < program->inputs_count; ++i) free(program->inputs[i].name);
  for (int64_t i = 0; program->outputs && i < program->outputs_count; ++i) free(program->outputs[i].name);
  for (int64_t i = 0; program->derived && i < program->slots_count; ++i) free(program->derived[i]);
  free(program->inputs), free(program->outputs), free(program->derived), free(program->expressions), free(program->slots);
  free(program->kernels), free(program->steps), free(program->values), free(program->offsets);
  free(program->alive), free(program->data), free(program->extents), free(program->memory);
  if (program->plan.data) munmap((void*)program->plan.data, program->plan.size);
  if (program->parameters.data) munmap((void*)program->parameters.data, program->parameters.size);
  if (program->library && program->library != RTLD_DEFAULT) dlclose(program->library);
  free(program);
}

/* ------------------------------------------------------------------ running */

static int64_t divided(int64_t a, int64_t b) { /* towards minus infinity */
  if (b == 0) return 0;
  const int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

static int64_t evaluate(expression_t expression, const int64_t* variables) {
  int64_t stack[DEPTH + 1];
  int top = 0;
  for (int64_t i = 0; i < expression.count; ++i) {
    const int64_t code = expression.codes[2 * i], operand = expression.codes[2 * i + 1];
    if (code < 2) {
      stack[top++] = code ? variables[operand] : operand;
      continue;
    }
    const int64_t b = stack[--top], a = stack[top - 1];
    switch (code) {
      case 2: stack[top - 1] = a + b; break;
      case 3: stack[top - 1] = a - b; break;
      case 4: stack[top - 1] = a * b; break;
      case 5: stack[top - 1] = divided(a, b); break;
      case 6: stack[top - 1] = a - divided(a, b) * b; break;
      case 7: stack[top - 1] = a > b ? a : b; break;
      default: stack[top - 1] = a < b ? a : b;
    }
  }
  return stack[0];
}

static const int64_t* shape_of(const qc_program* program, int64_t slot) { return program->extents + slot * 2 * QC_RANK; }

static size_t bytes_of(const qc_program* program, int64_t slot) {
  size_t size = (size_t)(program->slots[slot].bits + 7) / 8;
  for (int64_t axis = 0; axis < program->slots[slot].rank; ++axis) size *= (size_t)shape_of(program, slot)[axis];
  return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Place what lives at the same time at different offsets: the lowest gap that is wide enough. */
static void lay_out(qc_program* program, size_t* total) {
  int64_t alive = 0;
  *total = 0;
  for (int64_t i = 0; i < program->slots_count; ++i) {
    const slot_t* slot = &program->slots[i];
    if (slot->place != TEMPORARY && slot->place != INPUT) continue;
    const int64_t first = slot->place == INPUT ? -1 : slot->first;
    const size_t size = bytes_of(program, i);
    int64_t kept = 0;
    for (int64_t a = 0; a < alive; ++a) {
      const int64_t other = program->alive[a];
      if (program->slots[other].last >= first) program->alive[kept++] = other;
    }
    alive = kept;
    size_t offset = 0;
    int64_t place = 0;
    while (place < alive && program->offsets[program->alive[place]] < offset + size) {
      offset = program->offsets[program->alive[place]] + bytes_of(program, program->alive[place]);
      ++place;
    }
    memmove(program->alive + place + 1, program->alive + place, (size_t)(alive - place) * sizeof *program->alive);
    program->alive[place] = i;
    program->offsets[i] = offset;
    ++alive;
    if (offset + size > *total) *total = offset + size;
  }
}

static int set_shapes(qc_program* program, const qc_tensor* inputs) {
  int changed = !program->laid_out;
  for (int64_t i = 0; i < program->variables_count; ++i) {
    const int64_t value = inputs[program->variables[2 * i]].shape[program->variables[2 * i + 1]];
    changed |= program->values[i] != value;
    program->values[i] = value;
  }
  if (!changed) return 0;
  int64_t* values = program->values + program->variables_count;
  for (int64_t i = 0; i < program->expressions_count; ++i)
    values[i] = evaluate(program->expressions[i], program->values);
  for (int64_t i = 0; i < program->slots_count; ++i) {
    int64_t *shape = program->extents + i * 2 * QC_RANK, *strides = shape + QC_RANK, stride = 1;
    for (int64_t axis = program->slots[i].rank - 1; axis >= 0; --axis) {
      shape[axis] = values[program->slots[i].dims[axis]];
      if (shape[axis] < 0) FAIL("these inputs give a tensor a negative extent");
      strides[axis] = stride;
      stride *= shape[axis];
    }
  }
  return 1;
}

static int allocate(qc_program* program) {
  size_t total = 0;
  lay_out(program, &total);
  if (total > program->memory_size || !program->memory) {
    void* fresh = NULL;
    free(program->memory);
    program->memory = NULL;
    if (posix_memalign(&fresh, ALIGNMENT, total ? total : ALIGNMENT)) FAIL("out of memory: %zu bytes", total);
    program->memory = fresh;
  }
  program->memory_size = total;
  for (int64_t i = 0; i < program->slots_count; ++i) {
    const slot_t* slot = &program->slots[i];
    program->data[i] = slot->place == PARAMETER ? (void*)(program->parameters.data + slot->source)
                       : slot->place == VIEW    ? program->data[slot->source]
                       : slot->place == DERIVED ? program->derived[i]
                                                : program->memory + program->offsets[i];
    if (slot->place == PARAMETER && (size_t)slot->source + bytes_of(program, i) >= program->parameters.size + ALIGNMENT)
      FAIL("the file of parameters is not the plan's: too short");
  }
  program->laid_out = 1;
  return 0;
}

static int64_t element(const qc_tensor* tensor, int64_t number) {
  const int width = tensor->bits / 8, unused = 64 - tensor->bits;
  uint64_t found = 0;
  memcpy(&found, (const unsigned char*)tensor->data + number * width, (size_t)width);
  return tensor->code == QC_INT ? (int64_t)(found << unused) >> unused : (int64_t)found;
}

/* No kernel checks what it reads a table at. */
static int check_indices(qc_program* program, const port_t* port, const qc_tensor* given) {
  int64_t elements = 1;
  if (given->code == QC_INT && given->rank == 2 && given->shape[1] > program->longest)
    FAIL("input '%s' has %lld tokens, but the program has %lld positions", port->name, (long long)given->shape[1],
         (long long)program->longest);
  for (int axis = 0; axis < given->rank; ++axis) elements *= given->shape[axis];
  for (int64_t i = 0; port->rows && i < elements; ++i) {
    const int64_t id = element(given, i);
    if (id < 0 || id >= port->rows)
      FAIL("input '%s' has the id %lld, its table %lld rows", port->name, (long long)id, (long long)port->rows);
  }
  return 0;
}

static int check_inputs(qc_program* program, const qc_tensor* inputs) {
  for (int64_t i = 0; i < program->inputs_count; ++i) {
    const slot_t* slot = &program->slots[program->inputs[i].slot];
    if (inputs[i].rank != slot->rank || inputs[i].code != slot->code || inputs[i].bits != slot->bits)
      FAIL("input '%s' has another type or rank than the program's", program->inputs[i].name);
    if (check_indices(program, &program->inputs[i], &inputs[i])) return -1;
  }
  return 0;
}

static int copy_inputs(qc_program* program, const qc_tensor* inputs) {
  for (int64_t i = 0; i < program->inputs_count; ++i) {
    const int64_t slot = program->inputs[i].slot;
    size_t size = (size_t)(program->slots[slot].bits + 7) / 8;
    for (int64_t axis = 0; axis < program->slots[slot].rank; ++axis) {
      const int64_t expected = shape_of(program, slot)[axis], given = inputs[i].shape[axis];
      if (given != expected)
        FAIL("axis %d of input '%s' counts %lld, not %lld", (int)axis, program->inputs[i].name, (long long)given,
             (long long)expected);
      size *= (size_t)given;
    }
    if (size) memcpy(program->data[slot], inputs[i].data, size);
  }
  return 0;
}

static int call(qc_program* program, const step_t* step) {
  argument_t arguments[MOST_ARGUMENTS], result = {0, 0, {0}};
  tensor_t tensors[MOST_ARGUMENTS];
  const int64_t* values = program->values + program->variables_count;
  for (int64_t a = 0; a < step->count; ++a) {
    const int64_t number = step->arguments[2 * a + 1];
    arguments[a].padding = 0;
    if (step->arguments[2 * a] == 1) {
      arguments[a].type = 1; /* kTVMFFIInt */
      arguments[a].value.number = values[number];
      continue;
    }
    const slot_t* slot = &program->slots[number];
    int64_t* shape = program->extents + number * 2 * QC_RANK;
    const tensor_t tensor = {program->data[number], 1, 0, (int32_t)slot->rank, (uint8_t)slot->code, (uint8_t)slot->bits,
                             1, shape, shape + QC_RANK, 0};
    tensors[a] = tensor;
    arguments[a].type = 7; /* kTVMFFIDLTensorPtr */
    arguments[a].value.pointer = &tensors[a];
  }
  return program->kernels[step->kernel](NULL, arguments, (int32_t)step->count, &result);
}

int qc_run(qc_program* program, const qc_tensor* inputs, qc_tensor* outputs) {
  if (check_inputs(program, inputs)) return -1;
  const int changed = set_shapes(program, inputs);
  if (changed < 0) {
    program->laid_out = 0;
    return -1;
  }
  if (changed) program->laid_out = 0;
  if (!program->laid_out && allocate(program)) return -1;
  if (copy_inputs(program, inputs)) return -1;
  for (int64_t i = 0; i < program->steps_count; ++i)
    if (call(program, &program->steps[i])) FAIL("step %lld failed", (long long)i);
  for (int64_t i = 0; i < program->outputs_count; ++i) {
    const int64_t slot = program->outputs[i].slot;
    outputs[i].data = program->data[slot];
    outputs[i].rank = (int32_t)program->slots[slot].rank;
    outputs[i].code = (int32_t)program->slots[slot].code;
    outputs[i].bits = (int32_t)program->slots[slot].bits;
    memcpy(outputs[i].shape, shape_of(program, slot), sizeof outputs[i].shape);
  }
  return 0;
}

qc_tensor qc_input(const qc_program* program, size_t number) {
  const slot_t* slot = &program->slots[program->inputs[number].slot];
  qc_tensor found = {NULL, {0}, (int32_t)slot->rank, (int32_t)slot->code, (int32_t)slot->bits};
  for (int64_t axis = 0; axis < slot->rank; ++axis) found.shape[axis] = fixed(program, slot->dims[axis]);
  return found;
}

size_t qc_input_count(const qc_program* program) { return (size_t)program->inputs_count; }
size_t qc_output_count(const qc_program* program) { return (size_t)program->outputs_count; }
const char* qc_input_name(const qc_program* program, size_t number) { return program->inputs[number].name; }
const char* qc_output_name(const qc_program* program, size_t number) { return program->outputs[number].name; }
size_t qc_memory(const qc_program* program) { return program->memory_size; }
const char* qc_error(const qc_program* program) { return program->error; }
