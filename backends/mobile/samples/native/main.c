/* Runs a package once:  run FOLDER LIBRARY [INPUT.raw ...]  prints each output's name, shape and a digest of its bytes.

   A raw file holds the rank, the extents (8-byte integers) and then the elements; without files every input is ones,
   1 x {{length}} where its axes are free, and empty where it is a past. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcompile_program.h"

static size_t bytes_of(const qc_tensor* tensor) {
  size_t size = (size_t)(tensor->bits + 7) / 8;
  for (int axis = 0; axis < tensor->rank; ++axis) size *= (size_t)tensor->shape[axis];
  return size;
}

static void ones(qc_tensor* tensor, const char* name) {
  const int past = !strncmp(name, "past", 4);
  for (int axis = 0; axis < tensor->rank; ++axis)
    if (tensor->shape[axis] < 0) tensor->shape[axis] = axis == 0 ? 1 : past ? 0 : {{length}};
  const size_t width = (size_t)(tensor->bits + 7) / 8, size = bytes_of(tensor);
  unsigned char* data = calloc(1, size + 1);
  const float one = 1;
  for (size_t at = 0; at + width <= size; at += width) {
    if (tensor->code == QC_FLOAT && tensor->bits == 32) memcpy(data + at, &one, 4);
    else data[at] = 1;
  }
  tensor->data = data;
}

static int from_file(qc_tensor* tensor, const char* path) {
  int64_t rank = 0;
  FILE* file = fopen(path, "rb");
  if (!file || fread(&rank, 8, 1, file) != 1 || rank != tensor->rank ||
      fread(tensor->shape, 8, (size_t)rank, file) != (size_t)rank) {
    fprintf(stderr, "error: cannot read '%s'\n", path);
    return -1;
  }
  const size_t size = bytes_of(tensor);
  tensor->data = malloc(size + 1);
  const size_t read = fread(tensor->data, 1, size, file);
  fclose(file);
  return read == size ? 0 : -1;
}

static unsigned long long digest(const qc_tensor* tensor) { /* FNV-1a, 64 bits */
  unsigned long long found = 14695981039346656037ULL;
  const unsigned char* data = tensor->data;
  for (size_t i = 0, size = bytes_of(tensor); i < size; ++i) found = (found ^ data[i]) * 1099511628211ULL;
  return found;
}

int main(int count, char** arguments) {
  char plan[4096], parameters[4096], error[256];
  if (count < 3) {
    fprintf(stderr, "usage: %s FOLDER LIBRARY [INPUT.raw ...]\n", arguments[0]);
    return 2;
  }
  snprintf(plan, sizeof plan, "%s/program.plan", arguments[1]);
  snprintf(parameters, sizeof parameters, "%s/program.parameters", arguments[1]);
  qc_program* program = qc_open(arguments[2], plan, parameters, error, sizeof error);
  if (!program) {
    fprintf(stderr, "error: %s\n", error);
    return 1;
  }
  const size_t inputs = qc_input_count(program), outputs = qc_output_count(program);
  qc_tensor *given = calloc(inputs + 1, sizeof *given), *made = calloc(outputs + 1, sizeof *made);
  for (size_t i = 0; i < inputs; ++i) {
    given[i] = qc_input(program, i);
    if (count == 3) ones(&given[i], qc_input_name(program, i));
    else if ((size_t)count < 3 + inputs || from_file(&given[i], arguments[3 + i])) return 2;
  }
  if (qc_run(program, given, made)) {
    fprintf(stderr, "error: %s\n", qc_error(program));
    return 1;
  }
  for (size_t i = 0; i < outputs; ++i) {
    printf("%s [", qc_output_name(program, i));
    for (int axis = 0; axis < made[i].rank; ++axis) printf(axis ? ", %lld" : "%lld", (long long)made[i].shape[axis]);
    printf("] %016llx\n", digest(&made[i]));
  }
  for (size_t i = 0; i < inputs; ++i) free(given[i].data);
  free(given), free(made);
  qc_close(program);
  return 0;
}
