/* A compiled program: a library of kernels, a plan of which runs when, and parameters. Needs libc and dlopen alone. */
#ifndef QCOMPILE_PROGRAM_H
#define QCOMPILE_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QC_RANK 8 /* the most axes of a tensor */

enum { QC_INT = 0, QC_UINT = 1, QC_FLOAT = 2, QC_BOOL = 6 }; /* what the bits of an element mean, as DLPack counts */

typedef struct {
  void* data;  /* compact, the last axis fastest */
  int64_t shape[QC_RANK];
  int32_t rank;
  int32_t code; /* QC_INT ... */
  int32_t bits; /* of one element */
} qc_tensor;

typedef struct qc_program qc_program;

/* Opens the three files of a package; NULL, and the reason in error, where that fails.
   library: NULL where the kernels are linked into the process. */
qc_program* qc_open(const char* library, const char* plan, const char* parameters, char* error, size_t error_size);

size_t qc_input_count(const qc_program* program);
size_t qc_output_count(const qc_program* program);
const char* qc_input_name(const qc_program* program, size_t number);
const char* qc_output_name(const qc_program* program, size_t number);

/* Type and rank of an input; a free axis has the extent -1. */
qc_tensor qc_input(const qc_program* program, size_t number);

/* Runs the program on all inputs, in order, and describes all outputs. Their data stays until the next run; inputs
   need no alignment. 0, or -1 and qc_error tells why. One program runs in one thread at a time. */
int qc_run(qc_program* program, const qc_tensor* inputs, qc_tensor* outputs);

/* Bytes of memory that the last run took beside the parameters. */
size_t qc_memory(const qc_program* program);

const char* qc_error(const qc_program* program);
void qc_close(qc_program* program);

#ifdef __cplusplus
}
#endif
#endif
