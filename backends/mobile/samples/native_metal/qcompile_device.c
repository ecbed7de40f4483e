/* Metal through the functions of Objective-C's runtime: the app links Metal and Foundation, no header is needed. */
#include "qcompile_device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcompile_plan.h"

extern void* objc_getClass(const char* name);
extern void* sel_registerName(const char* name);
extern void objc_msgSend(void);
extern void* objc_autoreleasePoolPush(void);
extern void objc_autoreleasePoolPop(void* pool);
extern void* MTLCreateSystemDefaultDevice(void);

enum { FAILED = 5 }; /* of a command buffer's status */
#define FAIL(...) return qc_fail(device->error, device->error_size, __VA_ARGS__)

typedef struct { size_t width, height, depth; } sizes_t; /* MTLSize */

static void (*message)(void) = objc_msgSend; /* called as the type of the method */

const char qc_device_kind[] = "metal";

struct qc_device {
  void *metal, *queue, *library;
  void *command, *encoder; /* of launches that were not committed; NULL where there are none */
  char name[128];
  char* error;
  size_t error_size;
};

/* ------------------------------------------------------------------ messages, by the types of their arguments */

static void* send(void* object, const char* name) {
  return ((void* (*)(void*, void*))message)(object, sel_registerName(name));
}

static size_t number(void* object, const char* name) {
  return ((size_t(*)(void*, void*))message)(object, sel_registerName(name));
}

static void* send_one(void* object, const char* name, const void* one) {
  return ((void* (*)(void*, void*, const void*))message)(object, sel_registerName(name), one);
}

static void send_place(void* object, const char* name, const void* one, size_t a, size_t b) {
  ((void (*)(void*, void*, const void*, size_t, size_t))message)(object, sel_registerName(name), one, a, b);
}

static void release(void* object) {
  if (object) send(object, "release");
}

static const char* words(void* error) {
  void* text = error ? send(error, "localizedDescription") : NULL;
  return text ? send(text, "UTF8String") : "no reason given";
}

/* ------------------------------------------------------------------ opening */

static void* string(const char* text) { return send_one(objc_getClass("NSString"), "stringWithUTF8String:", text); }

static int build(qc_device* device, const char* source) {
  const qc_file file = qc_map(source);
  if (!file.data) FAIL("cannot read '%s'", source);
  char* text = calloc(1, file.size + 1);
  if (text) memcpy(text, file.data, file.size);
  qc_unmap(file);
  if (!text) FAIL("out of memory");
  void *error = NULL, *held = string(text);
  void* options = send(send(objc_getClass("MTLCompileOptions"), "alloc"), "init");
  ((void (*)(void*, void*, unsigned char))message)(options, sel_registerName("setFastMathEnabled:"), 0);
  device->library = ((void* (*)(void*, void*, void*, void*, void**))message)(
      device->metal, sel_registerName("newLibraryWithSource:options:error:"), held, options, &error);
  release(options);
  free(text);
  if (!device->library) FAIL("%s cannot compile the kernels: %.180s", device->name, words(error));
  return 0;
}

static int open_all(qc_device* device, const char* source) {
  device->metal = MTLCreateSystemDefaultDevice();
  if (!device->metal) FAIL("Metal has no device here: take the folder for the processor");
  snprintf(device->name, sizeof device->name, "%s", (const char*)send(send(device->metal, "name"), "UTF8String"));
  device->queue = send(device->metal, "newCommandQueue");
  if (!device->queue) FAIL("%s gives no queue", device->name);
  return build(device, source);
}

qc_device* qc_device_open(const char* source, char* error, size_t size) {
  qc_device* device = calloc(1, sizeof *device);
  if (!device) return qc_fail(error, size, "out of memory"), NULL;
  device->error = error, device->error_size = size;
  void* pool = objc_autoreleasePoolPush();
  const int status = open_all(device, source);
  objc_autoreleasePoolPop(pool);
  if (status == 0) return device;
  qc_device_close(device);
  return NULL;
}

const char* qc_device_name(const qc_device* device) { return device->name; }

void* qc_device_kernel(qc_device* device, const char* name) {
  void *pool = objc_autoreleasePoolPush(), *error = NULL, *made = NULL;
  void* function = send_one(device->library, "newFunctionWithName:", string(name));
  if (function)
    made = ((void* (*)(void*, void*, void*, void**))message)(
        device->metal, sel_registerName("newComputePipelineStateWithFunction:error:"), function, &error);
  release(function);
  objc_autoreleasePoolPop(pool);
  return made;
}

void qc_device_drop(qc_device* device, void* kernel) {
  (void)device;
  release(kernel);
}

size_t qc_device_threads(qc_device* device, void* kernel) {
  (void)device;
  return number(kernel, "maxTotalThreadsPerThreadgroup");
}

/* ------------------------------------------------------------------ launches */

/* What was launched is waited for. */
static int finish(qc_device* device) {
  if (!device->encoder) return 0;
  void* pool = objc_autoreleasePoolPush();
  send(device->encoder, "endEncoding");
  send(device->command, "commit");
  send(device->command, "waitUntilCompleted");
  const int ran = number(device->command, "status") != FAILED;
  if (!ran) qc_fail(device->error, device->error_size, "Metal: %.180s", words(send(device->command, "error")));
  release(device->encoder);
  release(device->command);
  device->encoder = device->command = NULL;
  objc_autoreleasePoolPop(pool);
  return ran ? 0 : -1;
}

static int begin(qc_device* device) {
  if (device->encoder) return 0;
  void* command = send(device->queue, "commandBuffer");
  void* encoder = command ? send(command, "computeCommandEncoder") : NULL;
  if (!encoder) FAIL("Metal: %s takes no commands", device->name);
  device->command = send(command, "retain");
  device->encoder = send(encoder, "retain");
  return 0;
}

/* Tensors are buffers from 0 on, and behind them lie the numbers, 8 bytes each. */
static int encode(qc_device* device, void* kernel, const qc_value* values, size_t count, sizes_t blocks,
                  sizes_t threads) {
  int64_t numbers[QC_MOST_ARGUMENTS];
  size_t tensors = 0, others = 0;
  if (begin(device)) return -1;
  send_one(device->encoder, "setComputePipelineState:", kernel);
  for (size_t i = 0; i < count; ++i) {
    const qc_value* one = &values[i];
    if (one->kind == QC_TENSOR) send_place(device->encoder, "setBuffer:offset:atIndex:", one->buffer, 0, tensors++);
    else numbers[others++] = one->number;
  }
  if (others) send_place(device->encoder, "setBytes:length:atIndex:", numbers, others * sizeof *numbers, tensors);
  ((void (*)(void*, void*, sizes_t, sizes_t))message)(
      device->encoder, sel_registerName("dispatchThreadgroups:threadsPerThreadgroup:"), blocks, threads);
  return 0;
}

int qc_device_launch(qc_device* device, void* kernel, const qc_value* values, size_t count, size_t blocks,
                     size_t threads) {
  const sizes_t every = {blocks, 1, 1}, block = {threads, 1, 1};
  void* pool = objc_autoreleasePoolPush();
  const int status = encode(device, kernel, values, count, every, block);
  objc_autoreleasePoolPop(pool);
  return status;
}

void qc_device_close(qc_device* device) {
  if (!device) return;
  finish(device);
  release(device->library);
  release(device->queue);
  release(device->metal);
  free(device);
}

/* ------------------------------------------------------------------ memory, which processor and GPU share */

void* qc_device_allocate(qc_device* device, size_t size) {
  void* made = ((void* (*)(void*, void*, size_t, size_t))message)(
      device->metal, sel_registerName("newBufferWithLength:options:"), size ? size : 1, 0);
  if (!made)
    qc_fail(device->error, device->error_size, "Metal: %s has no %zu bytes, too little for these shapes",
            device->name, size);
  return made;
}

void qc_device_free(qc_device* device, void* buffer) {
  (void)device;
  release(buffer);
}

int qc_device_write(qc_device* device, void* buffer, const void* from, size_t size) {
  if (finish(device)) return -1;
  if (size) memcpy(send(buffer, "contents"), from, size);
  return 0;
}

int qc_device_read(qc_device* device, void* to, void* buffer, size_t size) {
  if (finish(device)) return -1;
  if (size) memcpy(to, send(buffer, "contents"), size);
  return 0;
}
