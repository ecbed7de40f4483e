#include "qcompile_opencl.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "qcompile_plan.h"

enum { GPU = 1 << 2, NAME = 0x102B, SINGLE_FLOATS = 0x101B, EXACT_QUOTIENTS = 1 << 7, BUILD_LOG = 0x1183, MOST = 8 };
#define EVERY UINT64_C(0xFFFFFFFF)
#define VERSION "-cl-std=CL1.2"
#define FAIL(...) return qc_fail(error, size, __VA_ARGS__)

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
static int has_all(qc_cl* cl, void* library) {
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

static int find_library(qc_cl* cl, char* error, size_t size) {
  for (size_t i = 0; i < sizeof LIBRARIES / sizeof *LIBRARIES; ++i) {
    void* library = dlopen(LIBRARIES[i], RTLD_NOW | RTLD_LOCAL);
    if (library && has_all(cl, library)) return cl->library = library, 0;
    if (library) dlclose(library);
  }
  FAIL("this device lets an app have no OpenCL: take the folder for its processor");
}

static int find_device(qc_cl* cl, char* error, size_t size) {
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

static int build_failed(const qc_cl* cl, int32_t status, char* error, size_t size) {
  size_t length = 0;
  cl->clGetProgramBuildInfo(cl->program, cl->device, BUILD_LOG, 0, NULL, &length);
  char* log = calloc(1, length + 1);
  if (log) cl->clGetProgramBuildInfo(cl->program, cl->device, BUILD_LOG, length, log, NULL);
  const char* line = log ? strstr(log, "error") : NULL;
  while (line && line > log && line[-1] != '\n') --line;
  qc_fail(error, size, "%s cannot compile the kernels: %.*s (error %d)", cl->name,
          line ? (int)strcspn(line, "\n") : 0, line ? line : "", (int)status);
  free(log);
  return -1;
}

static int build(qc_cl* cl, const char* source, char* error, size_t size) {
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
  return status ? build_failed(cl, status, error, size) : 0;
}

int qc_cl_open(qc_cl* cl, const char* source, char* error, size_t size) {
  int32_t status = 0;
  if (find_library(cl, error, size) || find_device(cl, error, size)) return -1;
  cl->context = cl->clCreateContext(NULL, 1, &cl->device, NULL, NULL, &status);
  if (!cl->context) FAIL("%s gives no context: error %d", cl->name, (int)status);
  cl->queue = cl->clCreateCommandQueue(cl->context, cl->device, 0, &status); /* in order */
  if (!cl->queue) FAIL("%s gives no queue: error %d", cl->name, (int)status);
  return build(cl, source, error, size);
}

void qc_cl_close(qc_cl* cl) {
  if (cl->program) cl->clReleaseProgram(cl->program);
  if (cl->queue) cl->clReleaseCommandQueue(cl->queue);
  if (cl->context) cl->clReleaseContext(cl->context);
  if (cl->library) dlclose(cl->library);
}
