"""Static linears on integer kernels.

    MatMul(DequantizeLinear(codes u8, s, z), DequantizeLinear(W s8 [K, N], sw, zw)) [+ Add(bias)]
        ->  com.microsoft.MatMulIntegerToFloat(codes, W, s, sw, z, zw, bias)
    W read as Transpose(table (N, K))  ->  com.microsoft.QGemm{transB=1}, on the embedding's own table
The products of codes are summed exactly in int32; one QuantizeLinear serves all linears that read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import MS
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import is_op
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger


@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    """The constant operands of a DequantizeLinear that makes W (K, N).

    ``transposed``: the codes are a table (N, K), read through Transpose.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    axis: int
    block: int
    transposed: bool

    @property
    def per_column(self) -> bool:
        """Whether there is one scale for each output column."""
        return self.block == 0 and self.axis == (0 if self.transposed else 1)

    @property
    def rows(self) -> int:
        """K."""
        held = constant_array(self.codes)
        assert held is not None
        return int(held.shape[1 if self.transposed else 0])

    @property
    def columns(self) -> int:
        """N."""
        held = constant_array(self.codes)
        assert held is not None
        return int(held.shape[0 if self.transposed else 1])

    @property
    def is_symmetric(self) -> bool:
        zero = constant_array(self.zero)
        return zero is None or not zero.any()


def quantised_weight(product: ir.Node) -> QuantisedWeight | None:
    """The codes behind the right operand of a MatMul; None where it is no quantised constant matrix."""
    value, transposed = product.inputs[1], False
    transpose = match.producer(value, "Transpose")
    if transpose is not None:
        value, transposed = transpose.inputs[0], True
    node = match.producer(value, "DequantizeLinear")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    codes = constant_array(node.inputs[0])
    if codes is None or codes.ndim != 2 or codes.dtype != np.int8 or constant_array(node.inputs[1]) is None:
        return None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    axis = match.int_attribute(node, "axis", 1) % 2
    block = match.int_attribute(node, "block_size", 0)
    return QuantisedWeight(node.inputs[0], node.inputs[1], zero, axis, block, transposed)


def bias_of(product: ir.Node, width: int) -> tuple[ir.Node | None, ir.Value | None]:
    """(the Add of a constant vector that is the only reader of ``product``, the vector)."""
    add = match.only_consumer(product.outputs[0], "Add")
    if add is None:
        return None, None
    bias = match.other_operand(add, product.outputs[0])
    held = constant_array(bias)
    return (add, bias) if held is not None and held.shape == (width,) else (None, None)


def rewrite_static(model: ir.Model, workspace: Workspace, ledger: Ledger) -> int:
    """Bring every static linear to its integer kernel; returns how many."""
    count = 0
    for product in match.nodes(model.graph, "MatMul"):
        dequantize = match.producer(product.inputs[0], "DequantizeLinear")
        weight = quantised_weight(product)
        if dequantize is None or weight is None:
            continue
        reason = _refusal(dequantize, weight)
        if reason:
            ledger.skip(layer_name(product), reason, str(product.name))
            continue
        add, bias = (None, None) if weight.transposed else bias_of(product, weight.columns)
        codes, scale, zero = dequantize.inputs[:3]
        zeros = column_zeros(model, weight, workspace)
        replace_linear(product, add, integer_node([codes, scale, zero], weight, weight.codes, zeros, bias))
        count += 1
    return count


def _refusal(dequantize: ir.Node, weight: QuantisedWeight) -> str:
    scale, codes = constant_array(dequantize.inputs[1]), dequantize.inputs[0]
    if scale is None or scale.size != 1 or len(dequantize.inputs) < 3:
        return "activations have one scale for each channel group; the kernel takes one"
    if not weight.per_column:
        return "weights have one scale for each group of rows; the int8 kernel takes one for each column"
    if weight.transposed and (codes is None or codes.shape is None or len(codes.shape) != 2):
        return "the activation is no matrix of tokens"
    return ""


def integer_node(
    activation: Sequence[ir.Value | None],
    weight: QuantisedWeight,
    matrix: ir.Value,
    zeros: ir.Value | None,
    bias: ir.Value | None = None,
) -> ir.Node:
    """The integer product of ``activation`` (codes, scale, zero) and ``matrix``, float at its end.

    ``matrix`` holds the codes of ``weight``, perhaps with more rows. QGemm reads a table (N, K) as it is, and
    adds no float bias.
    """
    codes, scale, zero = activation
    if weight.transposed:
        inputs = [codes, scale, zero, matrix, weight.scale, zeros]
        return ir.Node(MS, "QGemm", inputs, [ir.AttrInt64("transB", 1)], num_outputs=1)
    inputs = [codes, matrix, scale, weight.scale, zero, zeros, bias]
    while inputs[-1] is None:
        inputs.pop()
    return ir.Node(MS, "MatMulIntegerToFloat", inputs, num_outputs=1)


def column_zeros(model: ir.Model, weight: QuantisedWeight, workspace: Workspace) -> ir.Value | None:
    """The weight's zero points as the kernel wants them: absent for zeros, but QGemm has no such form."""
    if not weight.is_symmetric or not weight.transposed:
        return None if weight.is_symmetric else weight.zero
    return new_initializer(model, "zeros", np.zeros(weight.columns, np.int8), workspace)


def replace_linear(product: ir.Node, add: ir.Node | None, new: ir.Node) -> None:
    """Put ``new`` in the place of ``product`` and its bias, under the layer's name."""
    end = add or product
    named = match.new_node(new.domain, new.op_type, new.inputs, dict(new.attributes), [product])
    match.put_instead(end, named)
    if add is not None:
        match.remove_dead(named.graph, [product])  # type: ignore[arg-type]


def is_product(node: ir.Node) -> bool:
    """Whether ``node`` multiplies by a weight or by another activation, in any spelling."""
    return node.op_type in PRODUCTS or is_op(node, "Gemm", "MatMul")


PRODUCTS = (
    "Attention", "DynamicQuantizeMatMul", "FusedMatMul", "FusedGemm", "Gemm", "GroupQueryAttention", "MatMul",
    "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention", "QGemm", "QLinearMatMul",
)  # fmt: skip
