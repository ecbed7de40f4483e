#include "qcompile_program.h"

#include <stdlib.h>
#include <string.h>

#include "qcompile_opencl.h"
#include "qcompile_plan.h"

enum { READ_WRITE = 1, BLOCKING = 1, GROUP_SIZE = 0x11B0 };

/* Memory on the device that tensors take one after the other: last, the step that reads it last. */
typedef struct { void* buffer; size_t size, needed; int64_t last; } piece_t;

struct qc_program {
  qc_plan plan;
  qc_cl cl;
  void** kernels;
  void** constants; /* of each slot that is a parameter or derived */
  int64_t* order;   /* inputs and temporaries by their first steps */
  int64_t order_count;
  piece_t* pieces;
  int64_t pieces_count;
  int64_t* held; /* the piece of each of them */
  void** results; /* of each output, on the host */
  size_t memory_size;
  int laid_out;
};

static int64_t first_of(const qc_slot* slot) { return slot->place == QC_INPUT ? -1 : slot->first; }

/* ------------------------------------------------------------------ opening */

static int refused(qc_program* program, const char* what, int32_t status) {
  const char* hint = status == -4 || status == -5 || status == -61 ? ", too little memory for these shapes" : "";
  QC_FAIL(&program->plan, "OpenCL: %s on %s: error %d%s", what, program->cl.name, (int)status, hint);
}

static int allocate(qc_program* program, size_t size, void** buffer) {
  int32_t status = 0;
  *buffer = program->cl.clCreateBuffer(program->cl.context, READ_WRITE, size ? size : 1, NULL, &status);
  return *buffer ? 0 : refused(program, "clCreateBuffer", status);
}

static int write(qc_program* program, void* buffer, const void* from, size_t size) {
  qc_cl* cl = &program->cl;
  if (!size) return 0;
  const int32_t status = cl->clEnqueueWriteBuffer(cl->queue, buffer, BLOCKING, 0, size, from, 0, NULL, NULL);
  return status ? refused(program, "clEnqueueWriteBuffer", status) : 0;
}

/* The earlier slot that is the same part of the file; ``slot`` itself where there is none. */
static int64_t twin(const qc_plan* plan, int64_t slot) {
  for (int64_t i = 0; i < slot; ++i)
    if (plan->slots[i].place == QC_PARAMETER && plan->slots[slot].place == QC_PARAMETER &&
        plan->slots[i].source == plan->slots[slot].source && qc_plan_constant(plan, i) == qc_plan_constant(plan, slot))
      return i;
  return slot;
}

static int upload(qc_program* program) {
  qc_plan* plan = &program->plan;
  for (int64_t i = 0; i < plan->slots_count; ++i) {
    const qc_slot* slot = &plan->slots[i];
    if (slot->place != QC_PARAMETER && slot->place != QC_DERIVED) continue;
    const int64_t other = twin(plan, i);
    if (other < i) {
      program->constants[i] = program->constants[other];
      continue;
    }
    const size_t size = (size_t)qc_plan_constant(plan, i);
    unsigned char* made = slot->place == QC_DERIVED ? malloc(size + 1) : NULL;
    if (slot->place == QC_DERIVED && !made) QC_FAIL(plan, "out of memory");
    if (made) qc_plan_derive(plan, i, made);
    const void* from = made ? made : plan->parameters.data + slot->source;
    void** place = &program->constants[i];
    const int status = allocate(program, size, place) || write(program, *place, from, size);
    free(made);
    if (status) return -1;
  }
  return 0;
}

static int make_kernels(qc_program* program) {
  qc_plan* plan = &program->plan;
  qc_cl* cl = &program->cl;
  for (int64_t i = 0; i < plan->kernels_count; ++i) {
    int32_t status = 0;
    program->kernels[i] = cl->clCreateKernel(cl->program, plan->kernels[i], &status);
    if (!program->kernels[i])
      QC_FAIL(plan, "the source has no kernel '%s': it belongs to another plan", plan->kernels[i]);
  }
  for (int64_t i = 0; i < plan->steps_count; ++i) {
    const qc_step* step = &plan->steps[i];
    size_t most = 0;
    if (cl->clGetKernelWorkGroupInfo(program->kernels[step->kernel], cl->device, GROUP_SIZE, sizeof most, &most, NULL))
      continue;
    if ((size_t)step->block > most)
      QC_FAIL(plan, "%s runs kernel '%s' in groups of %d threads at most, not %d", cl->name,
              plan->kernels[step->kernel], (int)most, (int)step->block);
  }
  return 0;
}

static void set_order(qc_program* program) {
  const qc_plan* plan = &program->plan;
  for (int64_t i = 0; i < plan->slots_count; ++i) {
    if (plan->slots[i].place != QC_TEMPORARY && plan->slots[i].place != QC_INPUT) continue;
    int64_t place = program->order_count++;
    for (; place > 0 && first_of(&plan->slots[program->order[place - 1]]) > first_of(&plan->slots[i]); --place)
      program->order[place] = program->order[place - 1];
    program->order[place] = i;
  }
}

static int open_all(qc_program* program, const char* source, const char* path, const char* parameters) {
  qc_plan* plan = &program->plan;
  if (qc_plan_open(plan, path, parameters, "opencl")) return -1;
  const size_t slots = (size_t)plan->slots_count + 1;
  program->kernels = calloc((size_t)plan->kernels_count + 1, sizeof *program->kernels);
  program->constants = calloc(slots, sizeof *program->constants);
  program->order = calloc(slots, sizeof *program->order);
  program->pieces = calloc(slots, sizeof *program->pieces);
  program->held = calloc(slots, sizeof *program->held);
  program->results = calloc((size_t)plan->outputs_count + 1, sizeof *program->results);
  if (!program->kernels || !program->constants || !program->order || !program->pieces || !program->held ||
      !program->results)
    QC_FAIL(plan, "out of memory");
  set_order(program);
  if (!source) QC_FAIL(plan, "the file of the kernels' source is missing");
  if (qc_cl_open(&program->cl, source, plan->error, sizeof plan->error)) return -1;
  return make_kernels(program) || upload(program) ? -1 : 0;
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
  const qc_plan* plan = &program->plan;
  qc_cl* cl = &program->cl;
  for (int64_t i = 0; program->kernels && i < plan->kernels_count; ++i)
    if (program->kernels[i]) cl->clReleaseKernel(program->kernels[i]);
  for (int64_t i = 0; program->constants && i < plan->slots_count; ++i)
    if (program->constants[i] && twin(plan, i) == i) cl->clReleaseMemObject(program->constants[i]);
  for (int64_t i = 0; i < program->pieces_count; ++i)
    if (program->pieces[i].buffer) cl->clReleaseMemObject(program->pieces[i].buffer);
  for (int64_t i = 0; program->results && i < plan->outputs_count; ++i) free(program->results[i]);
  free(program->kernels), free(program->constants), free(program->order), free(program->pieces);
  free(program->held), free(program->results);
  qc_cl_close(cl);
  qc_plan_close(&program->plan);
  free(program);
}

/* ------------------------------------------------------------------ memory */

/* A piece that nothing holds at step ``first``: the least that is wide enough, else the widest, else a new one. */
static piece_t* take(qc_program* program, size_t size, int64_t first) {
  piece_t* best = NULL;
  for (int64_t i = 0; i < program->pieces_count; ++i) {
    piece_t* one = &program->pieces[i];
    if (one->last >= first) continue;
    const int fits = one->needed >= size, better = best && best->needed >= size;
    if (!best || (fits && !better) || (fits == better && (one->needed < best->needed) == fits)) best = one;
  }
  return best ? best : &program->pieces[program->pieces_count++];
}

static int lay_out(qc_program* program) {
  qc_plan* plan = &program->plan;
  for (int64_t i = 0; i < program->pieces_count; ++i) program->pieces[i].needed = 0, program->pieces[i].last = -2;
  for (int64_t i = 0; i < program->order_count; ++i) {
    const int64_t slot = program->order[i];
    const size_t size = qc_plan_bytes(plan, slot);
    piece_t* piece = take(program, size, first_of(&plan->slots[slot]));
    if (piece->needed < size) piece->needed = size;
    piece->last = plan->slots[slot].last;
    program->held[slot] = piece - program->pieces;
  }
  program->memory_size = 0;
  for (int64_t i = 0; i < program->pieces_count; ++i) {
    piece_t* piece = &program->pieces[i];
    if (piece->buffer && piece->size < piece->needed) {
      program->cl.clReleaseMemObject(piece->buffer);
      piece->buffer = NULL;
    }
    if (!piece->buffer) {
      if (allocate(program, piece->needed, &piece->buffer)) return -1;
      piece->size = piece->needed;
    }
    program->memory_size += piece->size;
  }
  for (int64_t i = 0; i < plan->outputs_count; ++i) {
    free(program->results[i]);
    program->results[i] = malloc(qc_plan_bytes(plan, plan->outputs[i].slot) + 1);
    if (!program->results[i]) QC_FAIL(plan, "out of memory");
  }
  program->laid_out = 1;
  return 0;
}

static void** buffer_of(qc_program* program, int64_t slot) {
  while (program->plan.slots[slot].place == QC_VIEW) slot = program->plan.slots[slot].source;
  return program->constants[slot] ? &program->constants[slot] : &program->pieces[program->held[slot]].buffer;
}

/* ------------------------------------------------------------------ running */

static int set_arguments(qc_program* program, const qc_step* step) {
  for (int64_t a = 0; a < step->count; ++a) {
    const int64_t kind = step->arguments[2 * a], number = step->arguments[2 * a + 1];
    const int64_t value = kind == QC_TENSOR ? 0 : qc_plan_value(&program->plan, number);
    const int32_t narrow = (int32_t)value;
    const int is_narrow = kind == QC_INT32 || kind == QC_UINT32;
    const void* from = kind == QC_TENSOR ? (const void*)buffer_of(program, number)
                       : is_narrow       ? (const void*)&narrow
                                         : (const void*)&value;
    const size_t size = kind == QC_TENSOR ? sizeof(void*) : is_narrow ? sizeof narrow : sizeof value;
    const int32_t status = program->cl.clSetKernelArg(program->kernels[step->kernel], (uint32_t)a, size, from);
    if (status) return refused(program, program->plan.kernels[step->kernel], status);
  }
  return 0;
}

static int launch(qc_program* program, const qc_step* step) {
  qc_cl* cl = &program->cl;
  const int64_t blocks = qc_plan_value(&program->plan, step->grid);
  const size_t every = (size_t)(blocks * step->block), group = (size_t)step->block;
  if (blocks <= 0) return 0;
  if (set_arguments(program, step)) return -1;
  void* kernel = program->kernels[step->kernel];
  const int32_t status = cl->clEnqueueNDRangeKernel(cl->queue, kernel, 1, NULL, &every, &group, 0, NULL, NULL);
  return status ? refused(program, program->plan.kernels[step->kernel], status) : 0;
}

int qc_run(qc_program* program, const qc_tensor* inputs, qc_tensor* outputs) {
  qc_plan* plan = &program->plan;
  qc_cl* cl = &program->cl;
  const int changed = qc_plan_shapes(plan, inputs);
  if (changed) program->laid_out = 0;
  if (changed < 0 || (!program->laid_out && lay_out(program))) return -1;
  for (int64_t i = 0; i < plan->inputs_count; ++i) {
    const int64_t slot = plan->inputs[i].slot;
    if (write(program, *buffer_of(program, slot), inputs[i].data, qc_plan_bytes(plan, slot))) return -1;
  }
  for (int64_t i = 0; i < plan->steps_count; ++i)
    if (launch(program, &plan->steps[i])) return -1;
  qc_plan_describe(plan, outputs);
  for (int64_t i = 0; i < plan->outputs_count; ++i) {
    const int64_t slot = plan->outputs[i].slot;
    const size_t size = qc_plan_bytes(plan, slot);
    void *from = *buffer_of(program, slot), *to = outputs[i].data = program->results[i];
    const int32_t status = size ? cl->clEnqueueReadBuffer(cl->queue, from, BLOCKING, 0, size, to, 0, NULL, NULL) : 0;
    if (status) return refused(program, "clEnqueueReadBuffer", status);
  }
  return 0;
}

size_t qc_memory(const qc_program* program) { return program->memory_size; }
