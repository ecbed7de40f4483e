#include "qcompile_program.h"

#include <stdlib.h>
#include <string.h>

#include "qcompile_device.h"
#include "qcompile_plan.h"

/* Memory on the device that tensors take one after the other: last, the step that reads it last. */
typedef struct { void* buffer; size_t size, needed; int64_t last; } piece_t;

struct qc_program {
  qc_plan plan;
  qc_device* device;
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

static int allocate(qc_program* program, size_t size, void** buffer) {
  *buffer = qc_device_allocate(program->device, size);
  return *buffer ? 0 : -1;
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
    const int status = allocate(program, size, place) || qc_device_write(program->device, *place, from, size);
    free(made);
    if (status) return -1;
  }
  return 0;
}

static int make_kernels(qc_program* program) {
  qc_plan* plan = &program->plan;
  for (int64_t i = 0; i < plan->kernels_count; ++i) {
    program->kernels[i] = qc_device_kernel(program->device, plan->kernels[i]);
    if (!program->kernels[i])
      QC_FAIL(plan, "the source has no kernel '%s': it belongs to another plan", plan->kernels[i]);
  }
  for (int64_t i = 0; i < plan->steps_count; ++i) {
    const qc_step* step = &plan->steps[i];
    const size_t most = qc_device_threads(program->device, program->kernels[step->kernel]);
    if ((size_t)step->block > most)
      QC_FAIL(plan, "%s runs kernel '%s' in blocks of %d threads at most, not %d", qc_device_name(program->device),
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
  if (qc_plan_open(plan, path, parameters, qc_device_kind)) return -1;
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
  program->device = qc_device_open(source, plan->error, sizeof plan->error);
  if (!program->device) return -1;
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
  qc_device* device = program->device;
  for (int64_t i = 0; program->kernels && i < plan->kernels_count; ++i)
    if (program->kernels[i]) qc_device_drop(device, program->kernels[i]);
  for (int64_t i = 0; program->constants && i < plan->slots_count; ++i)
    if (program->constants[i] && twin(plan, i) == i) qc_device_free(device, program->constants[i]);
  for (int64_t i = 0; i < program->pieces_count; ++i)
    if (program->pieces[i].buffer) qc_device_free(device, program->pieces[i].buffer);
  for (int64_t i = 0; program->results && i < plan->outputs_count; ++i) free(program->results[i]);
  free(program->kernels), free(program->constants), free(program->order), free(program->pieces);
  free(program->held), free(program->results);
  qc_device_close(device);
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
      qc_device_free(program->device, piece->buffer);
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

static void* buffer_of(qc_program* program, int64_t slot) {
  while (program->plan.slots[slot].place == QC_VIEW) slot = program->plan.slots[slot].source;
  return program->constants[slot] ? program->constants[slot] : program->pieces[program->held[slot]].buffer;
}

/* ------------------------------------------------------------------ running */

static int launch(qc_program* program, const qc_step* step) {
  const qc_plan* plan = &program->plan;
  const int64_t blocks = qc_plan_value(plan, step->grid);
  qc_value values[QC_MOST_ARGUMENTS];
  if (blocks <= 0) return 0;
  for (int64_t a = 0; a < step->count; ++a) {
    const int64_t kind = step->arguments[2 * a], number = step->arguments[2 * a + 1];
    values[a].kind = kind;
    values[a].number = kind == QC_TENSOR ? 0 : qc_plan_value(plan, number);
    values[a].buffer = kind == QC_TENSOR ? buffer_of(program, number) : NULL;
  }
  return qc_device_launch(program->device, program->kernels[step->kernel], values, (size_t)step->count, (size_t)blocks,
                          (size_t)step->block);
}

int qc_run(qc_program* program, const qc_tensor* inputs, qc_tensor* outputs) {
  qc_plan* plan = &program->plan;
  const int changed = qc_plan_shapes(plan, inputs);
  if (changed) program->laid_out = 0;
  if (changed < 0 || (!program->laid_out && lay_out(program))) return -1;
  for (int64_t i = 0; i < plan->inputs_count; ++i) {
    const int64_t slot = plan->inputs[i].slot;
    const size_t size = qc_plan_bytes(plan, slot);
    if (qc_device_write(program->device, buffer_of(program, slot), inputs[i].data, size)) return -1;
  }
  for (int64_t i = 0; i < plan->steps_count; ++i)
    if (launch(program, &plan->steps[i])) return -1;
  qc_plan_describe(plan, outputs);
  for (int64_t i = 0; i < plan->outputs_count; ++i) {
    const int64_t slot = plan->outputs[i].slot;
    void* to = outputs[i].data = program->results[i];
    if (qc_device_read(program->device, to, buffer_of(program, slot), qc_plan_bytes(plan, slot))) return -1;
  }
  return 0;
}

size_t qc_memory(const qc_program* program) { return program->memory_size; }
