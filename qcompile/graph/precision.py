"""How near two computations of one function can be asked to come: rounding that no rewrite can be blamed for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.graph.workspace import Workspace

_STEPS = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
_LARGE = 1e30  # what stands for infinity in masks


def output_step(model: ir.Model) -> float:
    """How far equal outputs may lie apart, relative to the largest: a step of the narrowest type among them."""
    return max((_STEPS.get(value.dtype, 0.0) for value in model.graph.outputs), default=0.0)  # type: ignore[arg-type]


def nudged(model: ir.Model, workspace: Workspace) -> ir.Model:
    """A clone with every float32 weight but single numbers one step in its last place higher or lower, by a fixed seed.

    What that does to the outputs is the model's own sensitivity: a rewrite that rounds its weights anew does as much.
    """
    random, clone = np.random.default_rng(0), model.clone()
    for name, value in clone.graph.initializers.items():
        held = value.const_value
        if held is None or held.dtype != ir.DataType.FLOAT or held.size < 2:
            continue  # a single number may be an exponent, and (-1)^2.0000002 is NaN
        array = held.numpy()
        towards = np.where(random.integers(0, 2, array.shape, np.int8), np.float32(np.inf), np.float32(-np.inf))
        kept = (array == 0) | ~(np.abs(array) < _LARGE)
        value.const_value = workspace.tensor(np.where(kept, array, np.nextafter(array, towards)), name)
    return clone
