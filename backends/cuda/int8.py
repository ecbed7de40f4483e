"""Static linears on the int8 kernel of ONNX Runtime's CUDA provider.

    MatMul(DequantizeLinear(QuantizeLinear(x, s, z), s, z), DequantizeLinear(W int8 (K, N), sw))
        ->  (MatMulInteger(int8 codes of x, W) - z sum W) * (s sw)
That provider multiplies int8 by int8 only, so codes of uint8 move by 128. The sums are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.cuda.half import WIDE
from qcompile.backends.ort.linear import QuantisedWeight, quantised_weight
from qcompile.backends.ort.names import REASON
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger

_MIDDLE = {np.dtype(np.uint8): 128, np.dtype(np.int8): 0}


def rewrite_static(model: ir.Model, workspace: Workspace, ledger: Ledger) -> int:
    """Bring every static linear to MatMulInteger; returns how many."""
    count, codes = 0, dict[tuple[int, ...], ir.Value]()
    for product in match.nodes(model.graph, "MatMul"):
        dequantize = match.producer(product.inputs[0], "DequantizeLinear")
        weight = quantised_weight(product)
        if dequantize is None or weight is None:
            continue
        reason = _refusal(dequantize, weight)
        if reason:
            product.metadata_props[REASON] = reason
            ledger.skip(layer_name(product), reason, str(product.name))
            continue
        _Static(model, workspace, product, codes).replace(dequantize, weight)
        count += 1
    return count


def _refusal(dequantize: ir.Node, weight: QuantisedWeight) -> str:
    quantize = match.producer(dequantize.inputs[0], "QuantizeLinear")
    scale = constant_array(dequantize.inputs[1])
    zero = constant_array(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    if quantize is None or scale is None or scale.size != 1 or zero is None or zero.dtype not in _MIDDLE:
        return "the activation has no one scale and zero point of 8 bits"
    if not weight.per_column or not weight.is_symmetric or weight.transposed:
        return "the weight has groups, zero points or the embedding's table; CUDA's int8 product takes none of them"
    return ""


class _Static:
    """``codes``: int8 codes that were written already, by what they come from."""

    def __init__(self, model: ir.Model, workspace: Workspace, product: ir.Node, codes: dict[Any, ir.Value]) -> None:
        self._model, self._workspace, self._product, self._codes = model, workspace, product, codes

    def replace(self, dequantize: ir.Node, weight: QuantisedWeight) -> None:
        scale, zero = (constant_array(dequantize.inputs[place]) for place in (1, 2))
        matrix, steps = constant_array(weight.codes), constant_array(weight.scale)
        assert scale is not None and zero is not None and matrix is not None and steps is not None
        shift = int(zero.reshape(-1)[0]) - _MIDDLE[zero.dtype]
        sums = matrix.astype(np.int64).sum(axis=0) * shift
        total = self._put("MatMulInteger", [self._signed(dequantize, shift), weight.codes], "sums")
        moved = self._put("Sub", [total, self._held("offset", sums.astype(np.int32))], "moved")
        wide = self._put("Cast", [moved], "float", {"to": ir.AttrInt64("to", ir.DataType.FLOAT.value)})
        factor = self._held("factor", (steps.reshape(-1) * scale.reshape(-1)[0]).astype(np.float32))
        last = match.new_node("", "Mul", [wide, factor], {}, [self._product])
        match.put_instead(self._product, last)
        last.name = f"{self._name}.scaled{WIDE}"

    @property
    def _name(self) -> str:
        return str(self._product.outputs[0].name)

    def _signed(self, dequantize: ir.Node, shift: int) -> ir.Value:
        """The codes of the activation as int8."""
        quantize = match.producer(dequantize.inputs[0], "QuantizeLinear")
        assert quantize is not None and quantize.inputs[0] is not None
        key = (id(quantize.inputs[0]), id(quantize.inputs[1]), shift)
        if key not in self._codes:
            zero = self._held("zero", np.array(shift, np.int8))
            made = match.new_node("", "QuantizeLinear", [*quantize.inputs[:2], zero], {}, [quantize])
            quantize.graph.insert_before(quantize, made)  # type: ignore[union-attr]
            made.outputs[0].name = f"{quantize.outputs[0].name}.int8"
            self._codes[key] = made.outputs[0]
        return self._codes[key]

    def _held(self, what: str, array: np.ndarray) -> ir.Value:
        return new_initializer(self._model, f"{self._name}.{what}", array, self._workspace)

    def _put(self, kind: str, inputs: list[Any], what: str, attributes: dict[str, ir.Attr] | None = None) -> ir.Value:
        node = match.new_node("", kind, inputs, attributes or {}, [self._product])
        self._product.graph.insert_before(self._product, node)  # type: ignore[union-attr]
        node.name, node.outputs[0].name = f"{self._name}.{what}{WIDE}", f"{self._name}.{what}"
        return node.outputs[0]
