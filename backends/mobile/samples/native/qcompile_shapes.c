#include "qcompile_plan.h"

#include <string.h>

static int64_t divided(int64_t a, int64_t b) { /* towards minus infinity */
  if (b == 0) return 0;
  const int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

static int64_t evaluate(qc_expression expression, const int64_t* variables) {
  int64_t stack[QC_DEPTH + 1];
  int top = 0;
  for (int64_t i = 0; i < expression.count; ++i) {
    const int64_t code = expression.codes[2 * i], operand = expression.codes[2 * i + 1];
    if (code < 2) {
      stack[top++] = code ? variables[operand] : operand;
      continue;
    }
    const int64_t b = stack[--top], a = stack[top - 1];
    switch (code) {
      case 2: stack[top - 1] = a + b; break;
      case 3: stack[top - 1] = a - b; break;
      case 4: stack[top - 1] = a * b; break;
      case 5: stack[top - 1] = divided(a, b); break;
      case 6: stack[top - 1] = a - divided(a, b) * b; break;
      case 7: stack[top - 1] = a > b ? a : b; break;
      default: stack[top - 1] = a < b ? a : b;
    }
  }
  return stack[0];
}

static int64_t element(const qc_tensor* tensor, int64_t number) {
  const int width = tensor->bits / 8, unused = 64 - tensor->bits;
  uint64_t found = 0;
  memcpy(&found, (const unsigned char*)tensor->data + number * width, (size_t)width);
  return tensor->code == QC_INT ? (int64_t)(found << unused) >> unused : (int64_t)found;
}

/* No kernel checks what it reads a table at. */
static int check_indices(qc_plan* plan, const qc_port* port, const qc_tensor* given) {
  int64_t elements = 1;
  if (given->code == QC_INT && given->rank == 2 && given->shape[1] > plan->longest)
    QC_FAIL(plan, "input '%s' has %lld tokens, but the program has %lld positions", port->name,
            (long long)given->shape[1], (long long)plan->longest);
  for (int axis = 0; axis < given->rank; ++axis) elements *= given->shape[axis];
  for (int64_t i = 0; port->rows && i < elements; ++i) {
    const int64_t id = element(given, i);
    if (id < 0 || id >= port->rows)
      QC_FAIL(plan, "input '%s' has the id %lld, its table %lld rows", port->name, (long long)id,
              (long long)port->rows);
  }
  return 0;
}

static int check_inputs(qc_plan* plan, const qc_tensor* inputs) {
  for (int64_t i = 0; i < plan->inputs_count; ++i) {
    const qc_slot* slot = &plan->slots[plan->inputs[i].slot];
    if (inputs[i].rank != slot->rank || inputs[i].code != slot->code || inputs[i].bits != slot->bits)
      QC_FAIL(plan, "input '%s' has another type or rank than the program's", plan->inputs[i].name);
    if (check_indices(plan, &plan->inputs[i], &inputs[i])) return -1;
  }
  return 0;
}

static int set_shapes(qc_plan* plan, const qc_tensor* inputs) {
  int changed = !plan->known;
  for (int64_t i = 0; i < plan->variables_count; ++i) {
    const int64_t value = inputs[plan->variables[2 * i]].shape[plan->variables[2 * i + 1]];
    changed |= plan->values[i] != value;
    plan->values[i] = value;
  }
  if (!changed) return 0;
  int64_t* values = plan->values + plan->variables_count;
  for (int64_t i = 0; i < plan->expressions_count; ++i)
    values[i] = evaluate(plan->expressions[i], plan->values);
  for (int64_t i = 0; i < plan->slots_count; ++i) {
    int64_t *shape = plan->extents + i * 2 * QC_RANK, *strides = shape + QC_RANK, stride = 1;
    for (int64_t axis = plan->slots[i].rank - 1; axis >= 0; --axis) {
      shape[axis] = values[plan->slots[i].dims[axis]];
      if (shape[axis] < 0) QC_FAIL(plan, "these inputs give a tensor a negative extent");
      strides[axis] = stride;
      stride *= shape[axis];
    }
  }
  return 1;
}

int qc_plan_shapes(qc_plan* plan, const qc_tensor* inputs) {
  if (check_inputs(plan, inputs)) return -1;
  const int changed = set_shapes(plan, inputs);
  plan->known = 0;
  for (int64_t i = 0; i < plan->inputs_count && changed >= 0; ++i) {
    const int64_t slot = plan->inputs[i].slot;
    for (int64_t axis = 0; axis < plan->slots[slot].rank; ++axis) {
      const int64_t expected = qc_plan_shape(plan, slot)[axis], given = inputs[i].shape[axis];
      if (given != expected)
        QC_FAIL(plan, "axis %d of input '%s' counts %lld, not %lld", (int)axis, plan->inputs[i].name, (long long)given,
                (long long)expected);
    }
  }
  plan->known = changed >= 0;
  return changed;
}

int64_t* qc_plan_shape(const qc_plan* plan, int64_t slot) { return plan->extents + slot * 2 * QC_RANK; }

size_t qc_plan_bytes(const qc_plan* plan, int64_t slot) {
  size_t size = (size_t)(plan->slots[slot].bits + 7) / 8;
  for (int64_t axis = 0; axis < plan->slots[slot].rank; ++axis) size *= (size_t)qc_plan_shape(plan, slot)[axis];
  return size;
}

int64_t qc_plan_value(const qc_plan* plan, int64_t expression) {
  return plan->values[plan->variables_count + expression];
}

void qc_plan_describe(const qc_plan* plan, qc_tensor* outputs) {
  for (int64_t i = 0; i < plan->outputs_count; ++i) {
    const qc_slot* slot = &plan->slots[plan->outputs[i].slot];
    outputs[i].rank = (int32_t)slot->rank;
    outputs[i].code = (int32_t)slot->code;
    outputs[i].bits = (int32_t)slot->bits;
    memcpy(outputs[i].shape, qc_plan_shape(plan, plan->outputs[i].slot), sizeof outputs[i].shape);
  }
}

/* ------------------------------------------------------------------ the interface, but for opening and running */

static const qc_plan* plan_of(const qc_program* program) { return (const qc_plan*)(const void*)program; }

qc_tensor qc_input(const qc_program* program, size_t number) {
  const qc_plan* plan = plan_of(program);
  const qc_slot* slot = &plan->slots[plan->inputs[number].slot];
  qc_tensor found = {NULL, {0}, (int32_t)slot->rank, (int32_t)slot->code, (int32_t)slot->bits};
  for (int64_t axis = 0; axis < slot->rank; ++axis) found.shape[axis] = qc_plan_fixed(plan, slot->dims[axis]);
  return found;
}

size_t qc_input_count(const qc_program* program) { return (size_t)plan_of(program)->inputs_count; }
size_t qc_output_count(const qc_program* program) { return (size_t)plan_of(program)->outputs_count; }
const char* qc_input_name(const qc_program* program, size_t number) { return plan_of(program)->inputs[number].name; }
const char* qc_output_name(const qc_program* program, size_t number) { return plan_of(program)->outputs[number].name; }
const char* qc_error(const qc_program* program) { return plan_of(program)->error; }
