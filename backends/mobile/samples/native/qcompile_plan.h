/* What loaders share: a plan that was read and checked, and the shapes that inputs give its tensors.
   Apps need qcompile_program.h alone. */
#ifndef QCOMPILE_PLAN_H
#define QCOMPILE_PLAN_H

#include "qcompile_program.h"

enum { QC_ALIGNMENT = 64, QC_MOST_ARGUMENTS = 64, QC_DEPTH = 64 }; /* depth: of expressions */
enum { QC_INPUT, QC_PARAMETER, QC_TEMPORARY, QC_VIEW, QC_DERIVED }; /* derived: a parameter turned, plus first */
enum { QC_TENSOR, QC_INT64, QC_INT32, QC_UINT32, QC_UINT64 };       /* arguments of a step */

typedef struct { const unsigned char* data; size_t size; } qc_file;
typedef struct { const int64_t* codes; int64_t count; } qc_expression;
typedef struct { int64_t place, source, code, bits, first, last, rank; const int64_t* dims; } qc_slot;
typedef struct { char* name; int64_t slot, rows; } qc_port; /* rows: of the table that its ids are of, 0 for none */
/* grid: an expression, block: threads; both of a launch. arguments: pairs of a kind and a slot or an expression */
typedef struct { int64_t kernel, grid, block, count; const int64_t* arguments; } qc_step;

typedef struct {
  qc_file file, parameters;
  int64_t variables_count, expressions_count, slots_count, kernels_count, steps_count, inputs_count, outputs_count;
  int64_t longest; /* tokens that there are positions for */
  const int64_t* variables; /* pairs: input, axis */
  qc_expression* expressions;
  qc_slot* slots;
  qc_port *inputs, *outputs;
  char** kernels;
  qc_step* steps;
  int64_t* values;  /* of the variables, then of the expressions, at the last run */
  int64_t* extents; /* shapes and strides of each slot, 2 * QC_RANK */
  int known;        /* whether values and extents are */
  char error[256];
} qc_plan;

/* Every loader's program begins with its plan: the interface counts on that. */
#define QC_FAIL(plan, ...) return qc_fail((plan)->error, sizeof(plan)->error, __VA_ARGS__)

int qc_fail(char* error, size_t size, const char* format, ...); /* -1 */
qc_file qc_map(const char* path);                               /* no data where it cannot be read */
void qc_unmap(qc_file file);

/* device: the first word of whom the plan must be for. All of these: 0, or -1 and the plan's error. */
int qc_plan_open(qc_plan* plan, const char* path, const char* parameters, const char* device);
void qc_plan_close(qc_plan* plan);

/* Checks the inputs and computes what follows from their shapes: 1 where it differs from the last run, 0, or -1. */
int qc_plan_shapes(qc_plan* plan, const qc_tensor* inputs);

int64_t* qc_plan_shape(const qc_plan* plan, int64_t slot);  /* then its strides */
size_t qc_plan_bytes(const qc_plan* plan, int64_t slot);    /* for shapes that are known */
/* Bytes of a parameter or a derived tensor; -1 where they are not known, or more than the file of parameters. */
int64_t qc_plan_constant(const qc_plan* plan, int64_t slot);
int64_t qc_plan_fixed(const qc_plan* plan, int64_t expression); /* -1 for one that depends on the inputs */
int64_t qc_plan_value(const qc_plan* plan, int64_t expression);
void qc_plan_derive(const qc_plan* plan, int64_t slot, unsigned char* place);
void qc_plan_describe(const qc_plan* plan, qc_tensor* outputs); /* all but their data */

#endif
