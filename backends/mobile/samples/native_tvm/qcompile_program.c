#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* RTLD_DEFAULT */
#endif
#include "qcompile_plan.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__)
#define ARCH "aarch64"
#elif defined(__x86_64__)
#define ARCH "x86_64"
#else
#error "programs are compiled for aarch64 and x86_64"
#endif

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

struct qc_program {
  qc_plan plan;
  void* library;
  kernel_t* kernels;
  size_t* offsets; /* of temporaries and copied inputs in memory */
  int64_t* alive;  /* scratch for the layout */
  void** data;     /* of each slot */
  unsigned char** derived; /* of each slot that is */
  unsigned char* memory;
  size_t memory_size;
  int laid_out;
};

/* ------------------------------------------------------------------ what kernels call back */

static void* workspace(int device, int number, uint64_t size, int code, int bits) {
  void* found = NULL;
  (void)device, (void)number, (void)code, (void)bits;
  return posix_memalign(&found, QC_ALIGNMENT, size ? size : 1) ? NULL : found;
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

/* ------------------------------------------------------------------ opening */

static int find_kernels(qc_program* program) {
  qc_plan* plan = &program->plan;
  for (int64_t i = 0; i < plan->kernels_count; ++i) {
    char symbol[512];
    snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", plan->kernels[i]);
    *(void**)&program->kernels[i] = dlsym(program->library, symbol);
    if (!program->kernels[i])
      QC_FAIL(plan, "the library has no kernel '%s': it belongs to another plan", plan->kernels[i]);
  }
  return 0;
}

static int open_all(qc_program* program, const char* library, const char* path, const char* parameters) {
  qc_plan* plan = &program->plan;
  if (qc_plan_open(plan, path, parameters, ARCH)) return -1;
  program->library = library ? dlopen(library, RTLD_NOW | RTLD_LOCAL) : RTLD_DEFAULT;
  if (library && !program->library) QC_FAIL(plan, "%s", dlerror());
  set_pointer(program->library, "__TVMBackendAllocWorkspace", (void (*)(void))workspace);
  set_pointer(program->library, "__TVMBackendFreeWorkspace", (void (*)(void))release);
  set_pointer(program->library, "__TVMBackendParallelLaunch", (void (*)(void))launch);
  set_pointer(program->library, "__TVMBackendParallelBarrier", (void (*)(void))barrier);
  const size_t slots = (size_t)plan->slots_count + 1;
  program->kernels = calloc((size_t)plan->kernels_count + 1, sizeof *program->kernels);
  program->offsets = calloc(slots, sizeof *program->offsets);
  program->alive = calloc(slots, sizeof *program->alive);
  program->data = calloc(slots, sizeof *program->data);
  program->derived = calloc(slots, sizeof *program->derived);
  if (!program->kernels || !program->offsets || !program->alive || !program->data || !program->derived)
    QC_FAIL(plan, "out of memory");
  for (int64_t i = 0; i < plan->slots_count; ++i) {
    if (plan->slots[i].place != QC_DERIVED) continue;
    program->derived[i] = workspace(1, 0, (uint64_t)qc_plan_constant(plan, i), 1, 8);
    if (!program->derived[i]) QC_FAIL(plan, "out of memory");
    qc_plan_derive(plan, i, program->derived[i]);
  }
  return find_kernels(program);
}

qc_program* qc_open(const char* library, const char* plan, const char* parameters, char* error, size_t error_size) {
  qc_program* program = calloc(1, sizeof *program);
  if (program && open_all(program, library, plan, parameters) == 0) return program;
  qc_fail(error, error_size, "%s", program ? program->plan.error : "out of memory");
  qc_close(program);
  return NULL;
}

void qc_close(qc_program* program) {
  if (!program) return;
  for (int64_t i = 0; program->derived && i < program->plan.slots_count; ++i) free(program->derived[i]);
  free(program->kernels), free(program->offsets), free(program->alive), free(program->data), free(program->derived);
  free(program->memory);
  qc_plan_close(&program->plan);
  if (program->library && program->library != RTLD_DEFAULT) dlclose(program->library);
  free(program);
}

/* ------------------------------------------------------------------ running */

/* What a tensor takes in memory. */
static size_t room(const qc_plan* plan, int64_t slot) {
  return (qc_plan_bytes(plan, slot) + QC_ALIGNMENT - 1) / QC_ALIGNMENT * QC_ALIGNMENT;
}

/* Place what lives at the same time at different offsets: the lowest gap that is wide enough. */
static void lay_out(qc_program* program, size_t* total) {
  const qc_plan* plan = &program->plan;
  int64_t alive = 0;
  *total = 0;
  for (int64_t i = 0; i < plan->slots_count; ++i) {
    const qc_slot* slot = &plan->slots[i];
    if (slot->place != QC_TEMPORARY && slot->place != QC_INPUT) continue;
    const int64_t first = slot->place == QC_INPUT ? -1 : slot->first;
    const size_t size = room(plan, i);
    int64_t kept = 0;
    for (int64_t a = 0; a < alive; ++a) {
      const int64_t other = program->alive[a];
      if (plan->slots[other].last >= first) program->alive[kept++] = other;
    }
    alive = kept;
    size_t offset = 0;
    int64_t place = 0;
    while (place < alive && program->offsets[program->alive[place]] < offset + size) {
      offset = program->offsets[program->alive[place]] + room(plan, program->alive[place]);
      ++place;
    }
    memmove(program->alive + place + 1, program->alive + place, (size_t)(alive - place) * sizeof *program->alive);
    program->alive[place] = i;
    program->offsets[i] = offset;
    ++alive;
    if (offset + size > *total) *total = offset + size;
  }
}

static int allocate(qc_program* program) {
  qc_plan* plan = &program->plan;
  size_t total = 0;
  lay_out(program, &total);
  if (total > program->memory_size || !program->memory) {
    void* fresh = NULL;
    free(program->memory);
    program->memory = NULL;
    if (posix_memalign(&fresh, QC_ALIGNMENT, total + QC_ALIGNMENT)) QC_FAIL(plan, "out of memory: %zu bytes", total);
    program->memory = fresh;
  }
  program->memory_size = total;
  for (int64_t i = 0; i < plan->slots_count; ++i) {
    const qc_slot* slot = &plan->slots[i];
    program->data[i] = slot->place == QC_PARAMETER ? (void*)(plan->parameters.data + slot->source)
                       : slot->place == QC_VIEW    ? program->data[slot->source]
                       : slot->place == QC_DERIVED ? program->derived[i]
                                                   : program->memory + program->offsets[i];
  }
  program->laid_out = 1;
  return 0;
}

static int call(qc_program* program, const qc_step* step) {
  const qc_plan* plan = &program->plan;
  argument_t arguments[QC_MOST_ARGUMENTS], result = {0, 0, {0}};
  tensor_t tensors[QC_MOST_ARGUMENTS];
  for (int64_t a = 0; a < step->count; ++a) {
    const int64_t number = step->arguments[2 * a + 1];
    arguments[a].padding = 0;
    if (step->arguments[2 * a] != QC_TENSOR) {
      arguments[a].type = 1; /* kTVMFFIInt */
      arguments[a].value.number = qc_plan_value(plan, number);
      continue;
    }
    const qc_slot* slot = &plan->slots[number];
    int64_t* shape = qc_plan_shape(plan, number);
    const tensor_t tensor = {program->data[number], 1, 0, (int32_t)slot->rank, (uint8_t)slot->code, (uint8_t)slot->bits,
                             1, shape, shape + QC_RANK, 0};
    tensors[a] = tensor;
    arguments[a].type = 7; /* kTVMFFIDLTensorPtr */
    arguments[a].value.pointer = &tensors[a];
  }
  return program->kernels[step->kernel](NULL, arguments, (int32_t)step->count, &result);
}

int qc_run(qc_program* program, const qc_tensor* inputs, qc_tensor* outputs) {
  qc_plan* plan = &program->plan;
  const int changed = qc_plan_shapes(plan, inputs);
  if (changed) program->laid_out = 0;
  if (changed < 0 || (!program->laid_out && allocate(program))) return -1;
  for (int64_t i = 0; i < plan->inputs_count; ++i) {
    const int64_t slot = plan->inputs[i].slot;
    const size_t size = qc_plan_bytes(plan, slot);
    if (size) memcpy(program->data[slot], inputs[i].data, size);
  }
  for (int64_t i = 0; i < plan->steps_count; ++i)
    if (call(program, &plan->steps[i])) QC_FAIL(plan, "step %lld failed", (long long)i);
  qc_plan_describe(plan, outputs);
  for (int64_t i = 0; i < plan->outputs_count; ++i) outputs[i].data = program->data[plan->outputs[i].slot];
  return 0;
}

size_t qc_memory(const qc_program* program) { return program->memory_size; }
