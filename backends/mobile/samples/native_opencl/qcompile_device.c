/* OpenCL as phones have it: a library of the vendor's, found when the program runs. No header of OpenCL is needed. */
#include "qcompile_device.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "qcompile_opencl.h"
#include "qcompile_plan.h"

enum { GPU = 1 << 2, NAME = 0x102B, SINGLE_FLOATS = 0x101B, EXACT_QUOTIENTS = 1 << 7, BUILD_LOG = 0x1183, MOST = 8 };
enum { READ_WRITE = 1, BLOCKING = 1, GROUP_SIZE = 0x11B0 };
#define EVERY UINT64_C(0xFFFFFFFF)
#define VERSION "-cl-std=CL1.2"
#define FAIL(...) return qc_fail(cl->error, cl->error_size, __VA_ARGS__)
#define POINTER(result, name, arguments) result(*name) arguments;

const char qc_device_kind[] = "opencl";

struct qc_device {
  QC_CL(POINTER)
  void *library, *device, *context, *queue, *program;
  char name[128];
  char* error;
  size_t error_size;
};

/* Where vendors put it: by the name that an app's manifest asks for, as Pixels do, and in older systems by path. */
static const char* const LIBRARIES[] = {
    "libOpenCL.so",
    "libOpenCL.so.1",
    "libOpenCL-pixel.so",
    "libOpenCL-car.so",
    "libGLES_mali.so",
    "libPVROCL.so",
    "/vendor/lib64/libOpenCL.so",
    "/system/vendor/lib64/libOpenCL.so",
    "/vendor/lib64/egl/libGLES_mali.so",
    "/system/vendor/lib64/egl/libGLES_mali.so",
    "/vendor/lib64/libPVROCL.so",
    "/system/vendor/lib64/libPVROCL.so",
};

typedef void* (*finder_t)(const char* name);

static void* pointer_in(void* library, finder_t finder, const char* name) {
  return finder ? finder(name) : dlsym(library, name);
}

/* Whether ``library`` has all entry points. Those of Pixels are handed out by a function, once another has run. */
static int has_all(qc_device* cl, void* library) {
  void (*enable)(void) = NULL;
  finder_t finder = NULL;
  *(void**)&enable = dlsym(library, "enableOpenCL");
  if (enable) {
    enable();
    *(void**)&finder = dlsym(library, "loadOpenCLPointer");
  }
#define SET(result, name, arguments) \
  if (!(*(void**)&cl->name = pointer_in(library, finder, #name))) return 0;
  QC_CL(SET)
  return 1;
}

static int find_library(qc_device* cl) {
  for (size_t i = 0; i < sizeof LIBRARIES / sizeof *LIBRARIES; ++i) {
    void* library = dlopen(LIBRARIES[i], RTLD_NOW | RTLD_LOCAL);
    if (library && has_all(cl, library)) return cl->library = library, 0;
    if (library) dlclose(library);
  }
  FAIL("this device lets an app have no OpenCL: take the folder for its processor");
}

static int find_device(qc_device* cl) {
  const uint64_t kinds[] = {GPU, EVERY};
  void *platforms[MOST] = {NULL}, *found = NULL;
  uint32_t count = 0;
  if (cl->clGetPlatformIDs(MOST, platforms, &count)) count = 0;
  for (int kind = 0; kind < 2 && !found; ++kind)
    for (uint32_t i = 0; i < count && i < MOST && !found; ++i)
      if (cl->clGetDeviceIDs(platforms[i], kinds[kind], 1, &found, NULL)) found = NULL;
  if (!found) FAIL("OpenCL has no device here: take the folder for the processor");
  cl->device = found;
  cl->clGetDeviceInfo(found, NAME, sizeof cl->name - 1, cl->name, NULL);
  return 0;
}

static int build_failed(const qc_device* cl, int32_t status) {
  size_t length = 0;
  cl->clGetProgramBuildInfo(cl->program, cl->device, BUILD_LOG, 0, NULL, &length);
  char* log = calloc(1, length + 1);
  if (log) cl->clGetProgramBuildInfo(cl->program, cl->device, BUILD_LOG, length, log, NULL);
  const char* line = log ? strstr(log, "error") : NULL;
  while (line && line > log && line[-1] != '\n') --line;
  qc_fail(cl->error, cl->error_size, "%s cannot compile the kernels: %.*s (error %d)", cl->name,
          line ? (int)strcspn(line, "\n") : 0, line ? line : "", (int)status);
  free(log);
  return -1;
}

static int build(qc_device* cl, const char* source) {
  const qc_file file = qc_map(source);
  const char* text = (const char*)file.data;
  int32_t status = 0;
  uint64_t floats = 0;
  if (!text) FAIL("cannot read '%s'", source);
  cl->program = cl->clCreateProgramWithSource(cl->context, 1, &text, &file.size, &status);
  qc_unmap(file);
  if (!cl->program) FAIL("%s takes no source: error %d", cl->name, (int)status);
  cl->clGetDeviceInfo(cl->device, SINGLE_FLOATS, sizeof floats, &floats, NULL);
  const char* options = floats & EXACT_QUOTIENTS ? VERSION " -cl-fp32-correctly-rounded-divide-sqrt" : VERSION;
  status = cl->clBuildProgram(cl->program, 1, &cl->device, options, NULL, NULL);
  return status ? build_failed(cl, status) : 0;
}

static int open_all(qc_device* cl, const char* source) {
  int32_t status = 0;
  if (find_library(cl) || find_device(cl)) return -1;
  cl->context = cl->clCreateContext(NULL, 1, &cl->device, NULL, NULL, &status);
  if (!cl->context) FAIL("%s gives no context: error %d", cl->name, (int)status);
  cl->queue = cl->clCreateCommandQueue(cl->context, cl->device, 0, &status); /* in order */
  if (!cl->queue) FAIL("%s gives no queue: error %d", cl->name, (int)status);
  return build(cl, source);
}

qc_device* qc_device_open(const char* source, char* error, size_t size) {
  qc_device* cl = calloc(1, sizeof *cl);
  if (!cl) return qc_fail(error, size, "out of memory"), NULL;
  cl->error = error, cl->error_size = size;
  if (open_all(cl, source) == 0) return cl;
  qc_device_close(cl);
  return NULL;
}

void qc_device_close(qc_device* cl) {
  if (!cl) return;
  if (cl->program) cl->clReleaseProgram(cl->program);
  if (cl->queue) cl->clReleaseCommandQueue(cl->queue);
  if (cl->context) cl->clReleaseContext(cl->context);
  free(cl); /* the library stays loaded: a driver may have threads of its own */
}

const char* qc_device_name(const qc_device* cl) { return cl->name; }

/* ------------------------------------------------------------------ memory and launches */

static int checked(qc_device* cl, const char* what, int32_t status) {
  const char* hint = status == -4 || status == -5 || status == -61 ? ", too little memory for these shapes" : "";
  if (status) FAIL("OpenCL: %s on %s: error %d%s", what, cl->name, (int)status, hint);
  return 0;
}

void* qc_device_allocate(qc_device* cl, size_t size) {
  int32_t status = 0;
  void* made = cl->clCreateBuffer(cl->context, READ_WRITE, size ? size : 1, NULL, &status);
  if (!made) checked(cl, "clCreateBuffer", status);
  return made;
}

void qc_device_free(qc_device* cl, void* buffer) { cl->clReleaseMemObject(buffer); }

int qc_device_write(qc_device* cl, void* buffer, const void* from, size_t size) {
  if (!size) return 0;
  return checked(cl, "clEnqueueWriteBuffer",
                 cl->clEnqueueWriteBuffer(cl->queue, buffer, BLOCKING, 0, size, from, 0, NULL, NULL));
}

int qc_device_read(qc_device* cl, void* to, void* buffer, size_t size) {
  if (!size) return 0;
  return checked(cl, "clEnqueueReadBuffer",
                 cl->clEnqueueReadBuffer(cl->queue, buffer, BLOCKING, 0, size, to, 0, NULL, NULL));
}

void* qc_device_kernel(qc_device* cl, const char* name) {
  int32_t status = 0;
  return cl->clCreateKernel(cl->program, name, &status);
}

void qc_device_drop(qc_device* cl, void* kernel) { cl->clReleaseKernel(kernel); }

size_t qc_device_threads(qc_device* cl, void* kernel) {
  size_t most = 0;
  return cl->clGetKernelWorkGroupInfo(kernel, cl->device, GROUP_SIZE, sizeof most, &most, NULL) ? SIZE_MAX : most;
}

int qc_device_launch(qc_device* cl, void* kernel, const qc_value* values, size_t count, size_t blocks, size_t threads) {
  const size_t every = blocks * threads;
  for (size_t i = 0; i < count; ++i) {
    const qc_value* one = &values[i];
    const int is_narrow = one->kind == QC_INT32 || one->kind == QC_UINT32;
    const int32_t narrow = (int32_t)one->number;
    const void* from = one->kind == QC_TENSOR ? (const void*)&one->buffer
                       : is_narrow            ? (const void*)&narrow
                                              : (const void*)&one->number;
    const size_t size = one->kind == QC_TENSOR ? sizeof one->buffer : is_narrow ? sizeof narrow : sizeof one->number;
    if (checked(cl, "clSetKernelArg", cl->clSetKernelArg(kernel, (uint32_t)i, size, from))) return -1;
  }
  return checked(cl, "clEnqueueNDRangeKernel",
                 cl->clEnqueueNDRangeKernel(cl->queue, kernel, 1, NULL, &every, &threads, 0, NULL, NULL));
}
