#include "qcompile_plan.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char MAGIC[9] = "QCPLAN02", SHORT[] = "the file of parameters is not the plan's: too short";

int qc_fail(char* error, size_t size, const char* format, ...) {
  va_list list;
  va_start(list, format);
  if (size) vsnprintf(error, size, format, list);
  va_end(list);
  return -1;
}
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

qc_file qc_map(const char* path) {
  qc_file file = {NULL, 0};
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

void qc_unmap(qc_file file) {
  if (file.data) munmap((void*)file.data, file.size);
}

static void read_expressions(qc_plan* plan, reader_t* reader) {
  plan->variables_count = count(reader, 2);
  plan->variables = words(reader, 2 * plan->variables_count);
  plan->expressions_count = count(reader, 3);
  plan->expressions = calloc((size_t)plan->expressions_count + 1, sizeof *plan->expressions);
  for (int64_t i = 0; i < plan->expressions_count && !reader->damaged; ++i) {
    qc_expression* one = &plan->expressions[i];
    int64_t depth = 0;
    one->count = count(reader, 2);
    one->codes = words(reader, 2 * one->count);
    for (int64_t c = 0; c < one->count && !reader->damaged; ++c) {
      const int64_t code = below(reader, one->codes[2 * c], 9);
      if (code == 1) below(reader, one->codes[2 * c + 1], plan->variables_count);
      depth += code < 2 ? 1 : -1;
      if (depth < 1 || depth > QC_DEPTH) reader->damaged = 1;
    }
    if (depth != 1) reader->damaged = 1;
  }
}

static void read_slots(qc_plan* plan, reader_t* reader) {
  plan->slots_count = count(reader, 7);
  plan->slots = calloc((size_t)plan->slots_count + 1, sizeof *plan->slots);
  for (int64_t i = 0; i < plan->slots_count && !reader->damaged; ++i) {
    qc_slot* slot = &plan->slots[i];
    slot->place = below(reader, word(reader), 5);
    slot->source = word(reader);
    slot->code = word(reader);
    slot->bits = below(reader, word(reader), 65);
    slot->first = word(reader);
    slot->last = word(reader);
    slot->rank = below(reader, word(reader), QC_RANK + 1);
    slot->dims = words(reader, slot->rank);
    for (int64_t axis = 0; axis < slot->rank && !reader->damaged; ++axis)
      below(reader, slot->dims[axis], plan->expressions_count);
    if (slot->place == QC_VIEW) below(reader, slot->source, i); /* so that no view leads to itself */
    if (slot->place == QC_DERIVED) below(reader, slot->source, plan->slots_count);
    if (slot->place == QC_PARAMETER) below(reader, slot->source, (int64_t)plan->parameters.size + 1);
  }
}

static qc_port* read_ports(qc_plan* plan, reader_t* reader, int64_t* number) {
  *number = count(reader, 3);
  qc_port* ports = calloc((size_t)*number + 1, sizeof *ports);
  for (int64_t i = 0; i < *number && !reader->damaged; ++i) {
    ports[i].name = text(reader);
    ports[i].slot = below(reader, word(reader), plan->slots_count);
    ports[i].rows = word(reader);
    if (ports[i].rows && !reader->damaged && plan->slots[ports[i].slot].bits < 8) reader->damaged = 1;
  }
  return ports;
}

static void read_kernels(qc_plan* plan, reader_t* reader) {
  plan->kernels_count = count(reader, 1);
  plan->kernels = calloc((size_t)plan->kernels_count + 1, sizeof *plan->kernels);
  for (int64_t i = 0; i < plan->kernels_count && !reader->damaged; ++i) plan->kernels[i] = text(reader);
}

static void read_steps(qc_plan* plan, reader_t* reader) {
  plan->steps_count = count(reader, 4);
  plan->steps = calloc((size_t)plan->steps_count + 1, sizeof *plan->steps);
  for (int64_t i = 0; i < plan->steps_count && !reader->damaged; ++i) {
    qc_step* step = &plan->steps[i];
    step->kernel = below(reader, word(reader), plan->kernels_count);
    step->grid = word(reader);
    step->block = word(reader);
    if (step->block) below(reader, step->grid, plan->expressions_count);
    step->count = below(reader, word(reader), QC_MOST_ARGUMENTS + 1);
    step->arguments = words(reader, 2 * step->count);
    for (int64_t a = 0; a < step->count && !reader->damaged; ++a) {
      const int64_t kind = below(reader, step->arguments[2 * a], QC_UINT64 + 1);
      below(reader, step->arguments[2 * a + 1], kind == QC_TENSOR ? plan->slots_count : plan->expressions_count);
    }
  }
}

/* Whether the plan is one, and for this device; the reader stands behind what was read. */
static int read_head(qc_plan* plan, reader_t* reader, const char* path, const char* device) {
  if (plan->file.size < 8 || memcmp(plan->file.data, MAGIC, 8)) QC_FAIL(plan, "'%s' is no plan of this version", path);
  word(reader);
  char *target = text(reader), *digest = text(reader), first[16] = "";
  if (target) sscanf(target, "%15[^-]", first);
  const int fits = !strcmp(first, device) || (!strcmp(first, "arm64") && !strcmp(device, "aarch64"));
  if (!fits) qc_fail(plan->error, sizeof plan->error, "'%s' is for %s, and this is %s", path, target, device);
  free(target);
  free(digest);
  return fits ? 0 : -1;
}

static int read_plan(qc_plan* plan, reader_t* reader, const char* path) {
  const int64_t size = word(reader);
  if (size < 0 || (size_t)size > plan->parameters.size) QC_FAIL(plan, SHORT);
  plan->longest = word(reader);
  read_expressions(plan, reader);
  read_slots(plan, reader);
  plan->inputs = read_ports(plan, reader, &plan->inputs_count);
  plan->outputs = read_ports(plan, reader, &plan->outputs_count);
  read_kernels(plan, reader);
  read_steps(plan, reader);
  for (int64_t i = 0; i < plan->variables_count && !reader->damaged; ++i) {
    const int64_t input = below(reader, plan->variables[2 * i], plan->inputs_count);
    if (!reader->damaged) below(reader, plan->variables[2 * i + 1], plan->slots[plan->inputs[input].slot].rank);
  }
  if (reader->damaged) QC_FAIL(plan, "'%s' is damaged", path);
  return 0;
}

int64_t qc_plan_fixed(const qc_plan* plan, int64_t dim) {
  const qc_expression one = plan->expressions[dim];
  return one.count == 1 && one.codes[0] == 0 ? one.codes[1] : -1;
}

int64_t qc_plan_constant(const qc_plan* plan, int64_t number) {
  const qc_slot* slot = &plan->slots[number];
  const int64_t most = (int64_t)plan->parameters.size;
  int64_t size = (slot->bits + 7) / 8;
  for (int64_t axis = 0; axis < slot->rank; ++axis) {
    const int64_t extent = qc_plan_fixed(plan, slot->dims[axis]);
    if (extent < 0 || (extent && size > most / extent)) return -1;
    size *= extent;
  }
  return size > most ? -1 : size;
}

static int is_turned(const qc_plan* plan, const qc_slot* slot, const qc_slot* table) {
  return table->place == QC_PARAMETER && table->rank == 2 && slot->rank == 2 && table->bits == 8 && slot->bits == 8 &&
         qc_plan_fixed(plan, slot->dims[0]) == qc_plan_fixed(plan, table->dims[1]) &&
         qc_plan_fixed(plan, slot->dims[1]) == qc_plan_fixed(plan, table->dims[0]);
}

static int check_constants(qc_plan* plan) {
  for (int64_t i = 0; i < plan->slots_count; ++i) {
    const qc_slot* slot = &plan->slots[i];
    if (slot->place != QC_PARAMETER && slot->place != QC_DERIVED) continue;
    const int64_t size = qc_plan_constant(plan, i), begin = slot->place == QC_PARAMETER ? slot->source : 0;
    if (size < 0 || begin > (int64_t)plan->parameters.size - size) QC_FAIL(plan, SHORT);
    if (slot->place == QC_DERIVED && !is_turned(plan, slot, &plan->slots[slot->source]))
      QC_FAIL(plan, "the plan is damaged");
  }
  return 0;
}

void qc_plan_derive(const qc_plan* plan, int64_t slot, unsigned char* place) {
  enum { TILE = 64 };
  const qc_slot *made = &plan->slots[slot], *table = &plan->slots[made->source];
  const int64_t rows = qc_plan_fixed(plan, table->dims[0]), columns = qc_plan_fixed(plan, table->dims[1]);
  const unsigned char* from = plan->parameters.data + table->source;
  for (int64_t r = 0; r < rows; r += TILE)
    for (int64_t c = 0; c < columns; c += TILE)
      for (int64_t y = r; y < rows && y < r + TILE; ++y)
        for (int64_t x = c; x < columns && x < c + TILE; ++x)
          place[x * rows + y] = (unsigned char)(from[y * columns + x] + made->first);
}

int qc_plan_open(qc_plan* plan, const char* path, const char* parameters, const char* device) {
  plan->file = qc_map(path);
  if (!plan->file.data) QC_FAIL(plan, "cannot read '%s'", path);
  plan->parameters = qc_map(parameters);
  if (!plan->parameters.data) QC_FAIL(plan, "cannot read '%s'", parameters);
  const int64_t* start = (const int64_t*)plan->file.data;
  reader_t reader = {start, start + plan->file.size / 8, 0};
  if (read_head(plan, &reader, path, device) || read_plan(plan, &reader, path) || check_constants(plan)) return -1;
  plan->values = calloc((size_t)(plan->variables_count + plan->expressions_count) + 1, sizeof *plan->values);
  plan->extents = calloc(((size_t)plan->slots_count + 1) * 2 * QC_RANK, sizeof *plan->extents);
  if (!plan->values || !plan->extents) QC_FAIL(plan, "out of memory");
  return 0;
}

void qc_plan_close(qc_plan* plan) {
  for (int64_t i = 0; plan->inputs && i < plan->inputs_count; ++i) free(plan->inputs[i].name);
  for (int64_t i = 0; plan->outputs && i < plan->outputs_count; ++i) free(plan->outputs[i].name);
  for (int64_t i = 0; plan->kernels && i < plan->kernels_count; ++i) free(plan->kernels[i]);
  free(plan->inputs), free(plan->outputs), free(plan->kernels), free(plan->expressions), free(plan->slots);
  free(plan->steps), free(plan->values), free(plan->extents);
  qc_unmap(plan->file), qc_unmap(plan->parameters);
}
