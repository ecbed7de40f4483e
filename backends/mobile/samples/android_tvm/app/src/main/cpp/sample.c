/* MainActivity.run: the program on a batch of one, as long as wanted, filled with ones. */
#include <jni.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcompile_program.h"

static size_t fill(qc_tensor* tensor, const char* name, int64_t length) {
  size_t count = 1;
  for (int axis = 0; axis < tensor->rank; ++axis) {
    if (tensor->shape[axis] < 0) tensor->shape[axis] = axis == 0 ? 1 : strncmp(name, "past", 4) ? length : 0;
    count *= (size_t)tensor->shape[axis];
  }
  const size_t width = (size_t)tensor->bits / 8;
  const float one = 1;
  unsigned char* data = calloc(count + 1, width);
  for (size_t i = 0; i < count; ++i) {
    if (tensor->code == QC_FLOAT && tensor->bits == 32) memcpy(data + i * width, &one, width);
    else data[i * width] = 1;
  }
  tensor->data = data;
  return count;
}

JNIEXPORT jstring JNICALL Java_nn_qcompile_sample_MainActivity_run(JNIEnv* java, jobject self, jstring library,
                                                                   jstring folder, jint length) {
  char plan[1024], parameters[1024], error[256], text[4096] = "";
  const char* place = (*java)->GetStringUTFChars(java, folder, NULL);
  const char* path = (*java)->GetStringUTFChars(java, library, NULL);
  snprintf(plan, sizeof plan, "%s/program.plan", place);
  snprintf(parameters, sizeof parameters, "%s/program.parameters", place);
  qc_program* program = qc_open(path, plan, parameters, error, sizeof error);
  (*java)->ReleaseStringUTFChars(java, folder, place);
  (*java)->ReleaseStringUTFChars(java, library, path);
  (void)self;
  if (!program) return (*java)->NewStringUTF(java, error);
  const size_t inputs = qc_input_count(program), outputs = qc_output_count(program);
  qc_tensor *given = calloc(inputs + 1, sizeof *given), *made = calloc(outputs + 1, sizeof *made);
  for (size_t i = 0; i < inputs; ++i) {
    given[i] = qc_input(program, i);
    fill(&given[i], qc_input_name(program, i), length);
  }
  if (qc_run(program, given, made)) snprintf(text, sizeof text, "%s", qc_error(program));
  else
    for (size_t i = 0; i < outputs && strlen(text) < sizeof text - 128; ++i)
      snprintf(text + strlen(text), 128, "%.100s: %d axes\n", qc_output_name(program, i), (int)made[i].rank);
  for (size_t i = 0; i < inputs; ++i) free(given[i].data);
  free(given), free(made);
  qc_close(program);
  return (*java)->NewStringUTF(java, text);
}
