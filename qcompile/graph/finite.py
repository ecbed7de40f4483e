"""Weights that hold NaN or an infinity: such a model is broken, whatever it is calibrated on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.graph.provenance import original_name

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "BatchNormalization")
_MULTIPLIED = ("MatMul", "Gemm", "Conv", "Mul", *_NORMS)
_PASS_THROUGH = ("Transpose", "Identity", "Cast", "Reshape", "Unsqueeze")
_BLOCK = 1 << 22  # values at a time, so that the check of a large weight costs no memory


def bad_weight(model: ir.Model) -> str:
    """The first weight that is not finite, such as ``'fc.weight' holds inf at [3, 5]``; empty where all are.

    Masks are no weights: minus infinity is refused only where it is multiplied, plus infinity also where it is
    added or looked up, NaN everywhere.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype in _FLOATS:
                array = tensor.numpy()
                place = next(_not_finite(array), None)
                if place is not None and _is_bad(array, set(_readers(value))):
                    where = [int(i) for i in np.unravel_index(place, array.shape)]
                    return f"'{original_name(value)}' holds {array.reshape(-1)[place]} at {where}"
    return ""


def _is_bad(array: np.ndarray, readers: set[str]) -> bool:
    if readers & {*_MULTIPLIED} or np.isnan(array).any():
        return True
    return bool(readers & {"Add", "Gather"} and np.isposinf(array).any())


def _not_finite(array: np.ndarray) -> Iterator[int]:
    """Where each value that is NaN or infinite stands in the flat array."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield from (start + int(i) for i in np.flatnonzero(~np.isfinite(flat[start : start + _BLOCK])))


def _readers(value: ir.Value) -> Iterator[str]:
    """The operators that ``value`` reaches, through those that only move it."""
    for node, _ in value.uses():
        if node.op_type in _PASS_THROUGH:
            yield from _readers(node.outputs[0])
        else:
            yield node.op_type
