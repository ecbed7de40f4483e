/* Calls one compiled kernel as TVM would: runner FILE. FILE has the tensors, the last is overwritten with the result.

   A tensor in FILE: int64 type code, bits, rank, the dimensions, then its data. Both structures are the public ABI of
   DLPack and of TVM's foreign functions. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { int32_t type, device; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } Type;
typedef struct {
    void *data; Device device; int32_t rank; Type type; int64_t *shape, *strides; uint64_t offset;
} Tensor;
typedef struct { int32_t index; uint32_t filling; union { int64_t number; void *pointer; } value; } Any;

enum { MOST = 8, TENSOR = 7, PROCESSOR = 1 };

int KERNEL(void *self, const Any *arguments, int32_t count, Any *result);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    fprintf(stderr, "%s: ", kind);
    for (int i = 0; i < count; i++) fputs(parts[i], stderr);
    fputc('\n', stderr);
}

/* What TVM's runtime sets when it loads a kernel that wants memory of more than 1 KiB; absent where none does. */
extern void *(*__TVMBackendAllocWorkspace)(int32_t, int32_t, uint64_t, int32_t, int32_t) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int32_t, int32_t, void *) __attribute__((weak));

static void *set_aside(int32_t type, int32_t number, uint64_t size, int32_t code, int32_t bits) {
    (void)type, (void)number, (void)code, (void)bits;
    return aligned_alloc(64, (size_t)(size + 63) / 64 * 64);
}

static int give_back(int32_t type, int32_t number, void *place) {
    (void)type, (void)number;
    free(place);
    return 0;
}

int main(int count, char **names) {
    static Tensor tensors[MOST];
    static int64_t shapes[MOST][4], strides[MOST][4];
    Any arguments[MOST] = {{0}}, result = {0};
    FILE *file = count > 1 ? fopen(names[1], "rb") : NULL;
    int64_t head[3], size = 0;
    int n = 0;
    if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = set_aside;
    if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = give_back;
    if (!file) return 2;
    for (; n < MOST && fread(head, sizeof head, 1, file) == 1; n++) {
        Tensor *t = &tensors[n];
        t->device.type = PROCESSOR;
        t->type = (Type){(uint8_t)head[0], (uint8_t)head[1], 1};
        t->rank = (int32_t)head[2];
        t->shape = shapes[n], t->strides = strides[n];
        if (fread(shapes[n], 8, (size_t)t->rank, file) != (size_t)t->rank) return 2;
        size = head[1] / 8;
        for (int d = t->rank - 1, step = 1; d >= 0; d--) strides[n][d] = step, step *= shapes[n][d], size *= shapes[n][d];
        t->data = aligned_alloc(64, (size_t)(size + 127) / 64 * 64);
        if (fread(t->data, 1, (size_t)size, file) != (size_t)size) return 2;
        arguments[n] = (Any){TENSOR, 0, {.pointer = t}};
    }
    fclose(file);
    if (KERNEL(NULL, arguments, n, &result)) return 1;
    return fwrite(tensors[n - 1].data, 1, (size_t)size, stdout) != (size_t)size;
}
