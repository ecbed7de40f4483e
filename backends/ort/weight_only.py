"""Linears with low-bit weights and float activations.

    MatMul(x, DequantizeLinear(codes (K, N), scale, zero)) [+ Add(bias)]
        ->  com.microsoft.MatMulNBits(x, packed, scale, zero, bias){bits=4, block_size, accuracy_level=1}
        ->  MatMul(x, (Cast(codes) - zero) * scale)     above 4 bits, and for a tied head
Accuracy level 1 multiplies floats. Level 4 is faster but quantises x as well, which no weight-only recipe
asks for: where x has outliers it was seen to change outputs by more than 4-bit weights do. At 8 bits level 1
is slower than float, for it expands the codes at every product: so ONNX Runtime expands them once, when the
program is loaded. Codes of 2 and 3 bits take 4. Blocks along K are powers of two from 16: one scale for a
column, or for a longer group, is repeated for each block; K is padded to whole blocks with codes of zero.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import MS, put_node
from qcompile.backends.ort.linear import QuantisedWeight, bias_of, quantised_weight, replace_linear
from qcompile.backends.ort.names import REASON
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger

BITS = 4
MIDDLE = 8  # the kernel's codes are 0..15 around it
ACCURACY_LEVEL = 1
LARGEST_BLOCK = 128
EXPANDED = "weights of more than 4 bits are expanded at load: the kernel that reads them is slower than float"


@dataclasses.dataclass(frozen=True)
class Packed:
    """Operands of MatMulNBits: codes u8 (N, blocks, block / 2), scale (N, blocks), zero u8 or None."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None


def rewrite(model: ir.Model, workspace: Workspace, ledger: Ledger) -> int:
    """Bring the remaining low-bit weights to MatMulNBits, or let them expand at load; returns how many."""
    count = 0
    for product in match.nodes(model.graph, "MatMul"):
        weight = quantised_weight(product)
        if weight is None:
            continue
        block = block_of(weight)
        if block is not None and not weight.transposed and _fits(weight):
            _replace(model, product, weight, block, workspace)
            ledger.current.facts["accuracy_level"] = ACCURACY_LEVEL
        else:
            reason = _expand(model, product, weight, workspace)
            product.metadata_props[REASON] = reason
            ledger.skip(layer_name(product), reason, str(product.name))
        count += 1
    return count


def block_of(weight: QuantisedWeight) -> int | None:
    """The largest block that the scales allow; for one scale a column, one that divides K if there is any."""
    if weight.per_column or (weight.axis == 0 and weight.block >= weight.rows):
        fitting = [b for b in (LARGEST_BLOCK, 64, 32, 16) if weight.rows % b == 0]
        return fitting[0] if fitting else 32
    if not weight.block or weight.axis != 0:
        return None
    block = weight.block & -weight.block  # the largest power of two that divides it
    return min(block, LARGEST_BLOCK) if block >= 16 else None


def _fits(weight: QuantisedWeight) -> bool:
    """Whether codes and zero points are 4-bit numbers."""
    arrays = [a for v in (weight.codes, weight.zero) if (a := constant_array(v)) is not None]
    return all(int(a.min()) >= -MIDDLE and int(a.max()) < MIDDLE for a in arrays)


def _replace(model: ir.Model, product: ir.Node, weight: QuantisedWeight, block: int, workspace: Workspace) -> None:
    name, packed = str(weight.codes.name), pack(weight, block)
    inputs: list[ir.Value | None] = [
        product.inputs[0],
        new_initializer(model, f"{name}.packed", packed.codes, workspace),
        new_initializer(model, f"{name}.block_scale", packed.scale, workspace),
        None if packed.zero is None else new_initializer(model, f"{name}.block_zero", packed.zero, workspace),
        None,
    ]
    add, bias = bias_of(product, weight.columns)
    inputs.append(bias)
    while inputs[-1] is None:
        inputs.pop()
    numbers = {"K": weight.rows, "N": weight.columns, "bits": BITS, "block_size": block}
    numbers["accuracy_level"] = ACCURACY_LEVEL
    attributes = [ir.AttrInt64(key, value) for key, value in numbers.items()]
    replace_linear(product, add, ir.Node(MS, "MatMulNBits", inputs, attributes, num_outputs=1))


def pack(weight: QuantisedWeight, block: int) -> Packed:
    """The codes, unsigned around 8, in blocks along K."""
    held, scale, zero = (constant_array(v) for v in (weight.codes, weight.scale, weight.zero))
    assert held is not None and scale is not None
    codes = held.T
    n, k = codes.shape
    blocks = -(-k // block)
    scales = _per_block(scale, weight, blocks, block).astype(np.float32)
    zeros = np.zeros((n, blocks), np.int8) if zero is None else _per_block(zero, weight, blocks, block)
    padded = np.repeat(zeros, block, axis=1)
    padded[:, :k] = codes
    packed = nibbles(padded + MIDDLE).reshape(n, blocks, block // 2)
    return Packed(packed, np.ascontiguousarray(scales), nibbles(zeros + MIDDLE) if zeros.any() else None)


def _per_block(array: np.ndarray, weight: QuantisedWeight, blocks: int, block: int) -> np.ndarray:
    """A scale or zero point for each (column, block)."""
    if weight.per_column:
        return np.repeat(array.reshape(-1, 1), blocks, axis=1)
    return array.T[:, np.arange(blocks) * block // weight.block]


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes 0..15 (N, M) as bytes (N, ceil(M / 2)), the first of two in the low half."""
    pairs = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).astype(np.uint8)
    packed: np.ndarray = pairs[:, ::2] | pairs[:, 1::2] << 4
    return packed


def _expand(model: ir.Model, product: ir.Node, weight: QuantisedWeight, workspace: Workspace) -> str:
    """Spell the dequantisation in operators that are folded at load; returns why it is no kernel.

    DequantizeLinear in front of MatMul would be fused to a MatMulNBits of accuracy level 4.
    """
    if weight.block:
        return "no block of the 4-bit kernel fits these groups and bits"
    name = weight.codes.name

    def put(op: str, inputs: list[ir.Value | None], *attributes: ir.Attr) -> ir.Value:
        return put_node(product, "", op, inputs, f"{name}.{op}", attributes).outputs[0]

    def line(value: ir.Value, kind: type[np.generic]) -> ir.Value:
        """A vector along the quantised axis of the codes."""
        held = constant_array(value)
        assert held is not None
        shaped = held.reshape((-1, 1) if weight.axis == 0 else (1, -1)).astype(kind)
        return new_initializer(model, f"{name}.line", shaped, workspace)

    expanded = put("Cast", [weight.codes], ir.AttrInt64("to", int(ir.DataType.FLOAT)))
    if not weight.is_symmetric and weight.zero is not None:
        expanded = put("Sub", [expanded, line(weight.zero, np.float32)])
    expanded = put("Mul", [expanded, line(weight.scale, np.float32)])
    if weight.transposed:
        expanded = put("Transpose", [expanded], ir.AttrInt64s("perm", [1, 0]))
    product.replace_input_with(1, expanded)
    return "the head shares the table of the embedding" if weight.transposed else EXPANDED
