/* Objective-C's runtime and Metal's classes for a loader on Linux, so that its every message is executed.
   Objects count their references. Kernels are functions of the library that the variable KERNELS names, launch_NAME;
   a source with the word "broken" does not compile. x86-64 alone: methods are jumped to with the arguments in place. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct object {
  const char* class;
  int references;
  void* held;          /* what it must release: another object */
  char* data;          /* bytes or a text */
  size_t index;        /* of buffers that were set */
  void (*kernel)(void** places, unsigned grid, unsigned block);
  struct { void* place; char copy[512]; } arguments[31];
  int ended, committed, waited;
} object;
typedef struct { size_t width, height, depth; } sizes;
typedef void (*method)(void);

static object* pool[4096];
static size_t pooled;
static object classes[8];

static void fault(const char* what, const char* which) {
  fprintf(stderr, "runtime: %s %s\n", what, which);
  abort();
}

static object* make(const char* class, const char* text) {
  object* made = calloc(1, sizeof *made);
  made->class = class, made->references = 1;
  if (text) made->data = strdup(text);
  return made;
}

static object* later(object* one) { /* autoreleased */
  if (pooled == sizeof pool / sizeof *pool) fault("full", "pool");
  return pool[pooled++] = one;
}

static void* release(object* one, const char* name) {
  (void)name;
  if (one->references <= 0) fault("released too often:", one->class);
  if (--one->references) return NULL;
  if (one->held) release(one->held, name);
  free(one->data);
  free(one);
  return NULL;
}

static void* retain(object* one, const char* name) { return (void)name, one->references++, one; }

void* objc_autoreleasePoolPush(void) { return (void*)(pooled + 1); }
void objc_autoreleasePoolPop(void* place) {
  while (pooled > (size_t)place - 1) {
    object* one = pool[--pooled];
    pool[pooled] = NULL; /* so that what is held too long is found */
    release(one, "release");
  }
}

void* objc_getClass(const char* name) {
  size_t i = 0;
  while (classes[i].class && strcmp(classes[i].class, name)) ++i;
  classes[i].class = name, classes[i].references = 1;
  return &classes[i];
}

const char* sel_registerName(const char* name) { return name; }
void* MTLCreateSystemDefaultDevice(void) { return getenv("NO_METAL") ? NULL : make("device", "a stand-in"); }

static void* text_of(object* one, const char* name) { return (void)name, later(make("string", one->data)); }
static void* characters(object* one, const char* name) { return (void)name, one->data; }
static void* string(object* one, const char* name, const char* text) { return (void)one, (void)name, later(make("string", text)); }
static void* alloc(object* class, const char* name) { return (void)name, make(class->class, NULL); }
static void* init(object* one, const char* name) { return (void)name, one; }
static void fast(object* options, const char* name, unsigned char on) {
  if (on) fault(name, "quick floats");
  options->committed = 1;
}

static void* compile(object* device, const char* name, object* source, object* options, object** error) {
  (void)device, (void)name;
  if (!options->committed) fault("no", "setFastMathEnabled:");
  if (!strstr(source->data, "broken")) return make("library", NULL);
  *error = later(make("error", "use of undeclared identifier"));
  return NULL;
}

static void* function(object* library, const char* name, object* wanted) {
  char symbol[512];
  (void)library, (void)name;
  snprintf(symbol, sizeof symbol, "launch_%s", wanted->data);
  void* kernels = dlopen(getenv("KERNELS"), RTLD_NOW);
  if (!kernels) fault("no", dlerror());
  void* found = dlsym(kernels, symbol);
  if (!found) return NULL;
  object* made = make("function", NULL);
  *(void**)&made->kernel = found;
  return made;
}

static void* pipeline(object* device, const char* name, object* from, object** error) {
  object* made = make("pipeline", NULL);
  (void)device, (void)name, (void)error;
  return made->kernel = from->kernel, made;
}

static size_t threads(object* one, const char* name) { return (void)one, (void)name, getenv("FEW") ? 8 : 1024; }
static void* queue(object* one, const char* name) { return (void)one, (void)name, make("queue", NULL); }
static void* command(object* one, const char* name) { return (void)one, (void)name, later(make("command", NULL)); }
static void* encoder(object* one, const char* name) {
  object* made = later(make("encoder", NULL));
  (void)name;
  made->held = retain(one, name);
  return made;
}
static void set_pipeline(object* one, const char* name, object* from) { (void)name, one->kernel = from->kernel; }
static void set_buffer(object* one, const char* name, object* buffer, size_t offset, size_t index) {
  (void)name, one->arguments[index].place = buffer->data + offset;
}
static void set_bytes(object* one, const char* name, const void* bytes, size_t length, size_t index) {
  (void)name, memcpy(one->arguments[index].copy, bytes, length);
  one->arguments[index].place = one->arguments[index].copy;
}
static void dispatch(object* one, const char* name, sizes blocks, sizes each) {
  void* places[31];
  (void)name;
  if (blocks.height != 1 || blocks.depth != 1 || each.height != 1 || each.depth != 1) fault("not flat:", "grid");
  for (int i = 0; i < 31; ++i) places[i] = one->arguments[i].place;
  one->kernel(places, (unsigned)blocks.width, (unsigned)each.width);
}
static void end(object* one, const char* name) { (void)name, one->ended = ((object*)one->held)->ended = 1; }
static void commit(object* one, const char* name) {
  if (!one->ended) fault(name, "before the end");
  one->committed = 1;
}
static void wait(object* one, const char* name) {
  if (!one->committed) fault(name, "before it is committed");
  one->waited = 1;
}
static size_t status(object* one, const char* name) {
  if (!one->waited) fault(name, "before the end");
  return getenv("FAILS") ? 5 : 4;
}
static void* error(object* one, const char* name) { return (void)one, (void)name, later(make("error", "it was lost")); }
static void* buffer(object* one, const char* name, size_t length, size_t options) {
  object* made = make("buffer", NULL);
  (void)one, (void)name;
  if (options) fault("options of", "a buffer");
  return made->data = malloc(length), made;
}

static const struct { const char *class, *name; method found; } METHODS[] = {
    {"", "release", (method)release},
    {"", "retain", (method)retain},
    {"NSString", "stringWithUTF8String:", (method)string},
    {"string", "UTF8String", (method)characters},
    {"error", "localizedDescription", (method)text_of},
    {"MTLCompileOptions", "alloc", (method)alloc},
    {"MTLCompileOptions", "init", (method)init},
    {"MTLCompileOptions", "setFastMathEnabled:", (method)fast},
    {"device", "name", (method)text_of},
    {"device", "newCommandQueue", (method)queue},
    {"device", "newLibraryWithSource:options:error:", (method)compile},
    {"device", "newComputePipelineStateWithFunction:error:", (method)pipeline},
    {"device", "newBufferWithLength:options:", (method)buffer},
    {"library", "newFunctionWithName:", (method)function},
    {"pipeline", "maxTotalThreadsPerThreadgroup", (method)threads},
    {"queue", "commandBuffer", (method)command},
    {"command", "computeCommandEncoder", (method)encoder},
    {"command", "commit", (method)commit},
    {"command", "waitUntilCompleted", (method)wait},
    {"command", "status", (method)status},
    {"command", "error", (method)error},
    {"encoder", "setComputePipelineState:", (method)set_pipeline},
    {"encoder", "setBuffer:offset:atIndex:", (method)set_buffer},
    {"encoder", "setBytes:length:atIndex:", (method)set_bytes},
    {"encoder", "dispatchThreadgroups:threadsPerThreadgroup:", (method)dispatch},
    {"encoder", "endEncoding", (method)end},
    {"buffer", "contents", (method)characters},
};

method find_method(object* one, const char* name) {
  for (size_t i = 0; i < sizeof METHODS / sizeof *METHODS; ++i)
    if ((!*METHODS[i].class || !strcmp(METHODS[i].class, one->class)) && !strcmp(METHODS[i].name, name))
      return METHODS[i].found;
  fault(one->class, name);
  return NULL;
}

__asm__(".globl objc_msgSend\n"
        "objc_msgSend:\n"
        "  push %rdi\n  push %rsi\n  push %rdx\n  push %rcx\n  push %r8\n  push %r9\n  sub $8, %rsp\n"
        "  call find_method\n"
        "  add $8, %rsp\n  pop %r9\n  pop %r8\n  pop %rcx\n  pop %rdx\n  pop %rsi\n  pop %rdi\n"
        "  jmp *%rax\n");
