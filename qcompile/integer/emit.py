"""Writes integer nodes in front of the node that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from qcompile.errors import ContractError
from qcompile.graph.edits import Constants
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.integer import BODIES
from qcompile.graph.provenance import inherit
from qcompile.graph.workspace import Workspace
from qcompile.integer.values import Codes, Wide
from qcompile.quant.integer import fit

LIMIT = 2**30  # what the operators take is below it


class Emitter:
    """New nodes carry the names of ``node``, and stand in front of it."""

    def __init__(self, model: ir.Model, workspace: Workspace) -> None:
        self.model, self.workspace = model, workspace
        self.node: ir.Node | None = None
        self._constants = Constants(model, workspace)
        self._number = 0

    def constant(self, array: np.ndarray, hint: str = "c") -> ir.Value:
        """An initializer; equal ones are shared."""
        return self._constants.get(array, hint)

    def int32(self, value: int | np.ndarray, hint: str = "c") -> ir.Value:
        return self.constant(np.asarray(value, np.int32), hint)

    def int64s(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64), "shape")

    def put(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType = ir.DataType.INT32,
        **attributes: int | float | Sequence[int],
    ) -> ir.Value:
        """The result of a new node; of the project's own domain where ``op`` is one of its functions."""
        return self.put_all(op, inputs, [dtype], **attributes)[0]

    def put_all(
        self, op: str, inputs: Sequence[ir.Value | None], dtypes: Sequence[ir.DataType], **attributes: object
    ) -> list[ir.Value]:
        assert self.node is not None and self.node.graph is not None
        own = op in BODIES
        if own:
            use(self.model, op)
        made = ir.node(op, list(inputs), attributes, domain=DOMAIN if own else "", num_outputs=len(dtypes))  # type: ignore[arg-type]
        inherit(made, self.node)
        self.node.graph.insert_before(self.node, made)
        for place, (value, dtype) in enumerate(zip(made.outputs, dtypes, strict=True)):
            value.name = f"{self.node.outputs[0].name}.{op.lower()}{self._number}_{place}"
            value.type = ir.TensorType(dtype)
        self._number += 1
        return list(made.outputs)

    def requantize(self, value: ir.Value, bound: int, factor: ArrayLike, low: int, high: int) -> ir.Value:
        """clip(round(value * factor), low, high) in int32; |value| <= bound, and saturates where the result would."""
        lift = lifts(factor)
        m, d, _ = fit(np.asarray(factor, np.float64) / 2.0**lift)
        reach = (LIMIT - 1) >> lift
        if (bound > reach).any():
            ends = self.int32(-reach), self.int32(reach)
            value = self.put("Min", [self.put("Max", [value, ends[0]]), ends[1]])
        if lift.any():
            value = self.put("Mul", [value, self.int32(2**lift)])
        op = "Requantize" if (m >= 0).all() else "RequantizeSigned"
        return self.put(op, [value, self.int32(m), self.int32(d)], low=low, high=high)

    def clip(self, value: ir.Value, low: int, high: int) -> ir.Value:
        return self.put("Min", [self.put("Max", [value, self.int32(low)]), self.int32(high)])

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.put("Cast", [value], dtype, to=int(dtype))

    def rescaled(self, wide: Wide, places: int, bound: int) -> Wide:
        """``wide`` on another grid."""
        if wide.places == places and wide.bound <= bound:
            return wide
        if wide.places == places:
            return Wide(self.clip(wide.value, -bound, bound), places, bound)
        factor = np.float64(2.0 ** (places - wide.places))
        return Wide(self.requantize(wide.value, wide.bound, factor, -bound, bound), places, bound)

    def float_of(self, wide: Wide) -> ir.Value:
        """The real numbers: for a boundary."""
        plain = self.cast(wide.value, ir.DataType.FLOAT)
        step = self.constant(np.asarray(2.0**-wide.places, np.float32), "step")
        return self.put("Mul", [plain, step], ir.DataType.FLOAT)

    def float_of_codes(self, codes: Codes) -> ir.Value:
        scale = self.constant(np.asarray(codes.scale, np.float32), "scale")
        zero = self.constant(np.asarray(codes.zero, np.uint8), "zero")
        return self.put("DequantizeLinear", [codes.value, scale, zero], ir.DataType.FLOAT)


def lifts(factor: ArrayLike) -> np.ndarray:
    """By how many bits each value must be lifted for ``fit``: one number where all are alike.

    Each its own: with the largest for all, a channel of a small factor would saturate where its result does not.
    """
    size = np.abs(np.asarray(factor, np.float64))
    found = np.where(size > 0, np.maximum(np.frexp(size)[1] + 1, 0), 0)
    return found if found.size and found.min() < found.max() else np.asarray(found.max(initial=0))


def check_bound(bound: float, what: str, where: str) -> None:
    """ContractError where ``bound`` does not fit 30 bits and a sign."""
    if bound >= LIMIT:
        raise ContractError(f"{what} may reach {bound:.3g}, more than 30 bits hold", where=where)
