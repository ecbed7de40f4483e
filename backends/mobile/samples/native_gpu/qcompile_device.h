/* A GPU as qcompile_program.c uses it. Each int is 0, or -1 with the reason in the error of qc_device_open. */
#ifndef QCOMPILE_DEVICE_H
#define QCOMPILE_DEVICE_H

#include <stddef.h>
#include <stdint.h>

typedef struct qc_device qc_device;
typedef struct { int64_t kind, number; void* buffer; } qc_value; /* an argument: kind as in a plan, number or buffer */

extern const char qc_device_kind[]; /* whom its plans are for */

/* The GPU, with the kernels of the file ``source`` compiled; NULL where that fails. ``error`` lives as long. */
qc_device* qc_device_open(const char* source, char* error, size_t size);
void qc_device_close(qc_device* device);
const char* qc_device_name(const qc_device* device);

void* qc_device_allocate(qc_device* device, size_t size); /* NULL where that fails */
void qc_device_free(qc_device* device, void* buffer);
int qc_device_write(qc_device* device, void* buffer, const void* from, size_t size);
int qc_device_read(qc_device* device, void* to, void* buffer, size_t size); /* waits for all launches */

void* qc_device_kernel(qc_device* device, const char* name); /* NULL where the source has none */
void qc_device_drop(qc_device* device, void* kernel);
size_t qc_device_threads(qc_device* device, void* kernel); /* the most of a block */

/* After all that was launched before. */
int qc_device_launch(qc_device* device, void* kernel, const qc_value* values, size_t count, size_t blocks,
                     size_t threads);

#endif
