"""Linears with low-bit weights and float activations.

    MatMul(x, DequantizeLinear(codes (K, N), scale, zero)) [+ Add(bias)]
        ->  com.microsoft.MatMulNBits(x, packed, scale, zero, bias){bits, block_size, accuracy_level}
        ->  MatMul(x, (Cast(codes) - zero) * scale)     where the level has no kernel for the bits
Accuracy level 1 multiplies floats, with codes of 4 bits; those of 2 and 3 take 4 bits too. For 8 bits, and a head that
shares the table of the embedding, ONNX Runtime expands the codes once, when the program is loaded: its kernels of 2
and 8 bits expand them at every product at this level, which is slower than float.
Level 4 is faster, and has 2, 4 (for 3 too) and 8 bits, but rounds x to 8 bits in blocks as well, which no weight-only
recipe asks for: where x has outliers it was seen to change outputs by more than 4-bit weights do.
Blocks along K are powers of two from 16 (32 at level 4): one scale for a column, or for a longer group, is repeated for
each block; K is padded to whole blocks with codes of zero.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

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

Level = Literal[1, 4]
BITS: dict[Level, tuple[int, ...]] = {1: (4,), 4: (2, 4, 8)}  # widths of the codes in a level's kernels
LARGEST_BLOCK = 128
SMALLEST_BLOCK: dict[Level, int] = {1: 16, 4: 32}
EXPANDED = "weights of more than 4 bits are expanded at load: the kernel that reads them is slower than float"
NO_BLOCK = "no block of the kernel fits these groups and bits"
TIED = "the head shares the table of the embedding"


@dataclasses.dataclass(frozen=True)
class Packed:
    """Operands of MatMulNBits: codes u8 (N, blocks, block * bits / 8), scale (N, blocks), zero u8 or None."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None


def rewrite(
    model: ir.Model, workspace: Workspace, ledger: Ledger, level: Level, tables: dict[int, ir.Value]
) -> int:
    """Bring the remaining low-bit weights to MatMulNBits, or let them expand at load; returns how many.

    Tied tables that were packed are noted in ``tables``, by the id of their codes.
    """
    count = 0
    for product in match.nodes(model.graph, "MatMul"):
        weight = quantised_weight(product)
        if weight is None:
            continue
        block, bits = block_of(weight, SMALLEST_BLOCK[level]), width_of(weight, level)
        if block is not None and bits is not None and (level == 4 or not weight.transposed):
            packed = _replace(model, product, weight, (bits, block, level), workspace)
            if weight.transposed and bits == 8:
                tables[id(weight.codes)] = packed
            ledger.current.facts["accuracy_level"] = level
        else:
            _expand(model, product, weight, workspace)
            reason = NO_BLOCK if block is None else TIED if weight.transposed else EXPANDED
            product.metadata_props[REASON] = reason
            ledger.skip(layer_name(product), reason, str(product.name))
        count += 1
    return count


def block_of(weight: QuantisedWeight, smallest: int = SMALLEST_BLOCK[1]) -> int | None:
    """The largest block that the scales allow; for one scale a column, one that divides K if there is any."""
    if weight.per_column or (weight.axis == 0 and weight.block >= weight.rows):
        fitting = [b for b in (LARGEST_BLOCK, 64, 32, 16) if weight.rows % b == 0 and b >= smallest]
        return fitting[0] if fitting else 32
    if not weight.block or weight.axis != 0:
        return None
    block = weight.block & -weight.block  # the largest power of two that divides it
    return min(block, LARGEST_BLOCK) if block >= smallest else None


def width_of(weight: QuantisedWeight, level: Level) -> int | None:
    """The fewest bits of a kernel of ``level`` that hold codes and zero points."""
    arrays = [a for v in (weight.codes, weight.zero) if (a := constant_array(v)) is not None]
    low, high = min(int(a.min()) for a in arrays), max(int(a.max()) for a in arrays)
    return next((bits for bits in BITS[level] if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)), None)


def _replace(
    model: ir.Model, product: ir.Node, weight: QuantisedWeight, form: tuple[int, int, Level], workspace: Workspace
) -> ir.Value:
    """The kernel in place of ``product``; ``form``: bits, block and accuracy level. Returns the packed codes."""
    (bits, block, level), name = form, str(weight.codes.name)
    packed = pack(weight, bits, block)
    codes = new_initializer(model, f"{name}.packed", packed.codes, workspace)
    inputs: list[ir.Value | None] = [
        product.inputs[0],
        codes,
        new_initializer(model, f"{name}.block_scale", packed.scale, workspace),
        None if packed.zero is None else new_initializer(model, f"{name}.block_zero", packed.zero, workspace),
        None,
    ]
    add, bias = bias_of(product, weight.columns)
    inputs.append(bias)
    while inputs[-1] is None:
        inputs.pop()
    numbers = {"K": weight.rows, "N": weight.columns, "bits": bits, "block_size": block, "accuracy_level": level}
    attributes = [ir.AttrInt64(key, value) for key, value in numbers.items()]
    replace_linear(product, add, ir.Node(MS, "MatMulNBits", inputs, attributes, num_outputs=1))
    return codes


def pack(weight: QuantisedWeight, bits: int, block: int) -> Packed:
    """The codes, unsigned around 2^(bits - 1), in blocks along K."""
    held, scale, zero = (constant_array(v) for v in (weight.codes, weight.scale, weight.zero))
    assert held is not None and scale is not None
    codes, middle = held if weight.transposed else held.T, 2 ** (bits - 1)
    n, k = codes.shape
    blocks = -(-k // block)
    scales = _per_block(scale, weight, blocks, block).astype(np.float32)
    zeros = np.zeros((n, blocks)) if zero is None else _per_block(zero, weight, blocks, block)
    zeros = zeros.astype(np.int16)
    padded = np.repeat(zeros, block, axis=1)
    padded[:, :k] = codes
    packed = in_bytes(padded + middle, bits).reshape(n, blocks, block * bits // 8)
    return Packed(packed, np.ascontiguousarray(scales), in_bytes(zeros + middle, bits) if zeros.any() else None)


def _per_block(array: np.ndarray, weight: QuantisedWeight, blocks: int, block: int) -> np.ndarray:
    """A scale or zero point for each (column, block)."""
    if weight.per_column:
        return np.repeat(array.reshape(-1, 1), blocks, axis=1)
    return array.T[:, np.arange(blocks) * block // weight.block]


def in_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes 0 .. 2^bits - 1 (N, M) as bytes (N, ceil(M bits / 8)), the first in the lowest bits."""
    share = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % share))).astype(np.uint8)
    packed = np.zeros((len(padded), padded.shape[1] // share), np.uint8)
    for place in range(share):
        packed |= padded[:, place::share] << place * bits
    return packed


def _expand(model: ir.Model, product: ir.Node, weight: QuantisedWeight, workspace: Workspace) -> None:
    """Spell the dequantisation in operators that are folded at load.

    DequantizeLinear in front of MatMul would be fused to a MatMulNBits of accuracy level 4.
    """
    groups = weight.rows // weight.block if weight.block else 0
    if weight.block and (weight.axis != 0 or weight.rows % weight.block):
        return  # nothing is fused where the last group is shorter
    name = weight.codes.name

    def put(op: str, inputs: list[ir.Value | None], *attributes: ir.Attr) -> ir.Value:
        return put_node(product, "", op, inputs, f"{name}.{op}", attributes).outputs[0]

    def line(value: ir.Value, kind: type[np.generic]) -> ir.Value:
        """One number for each slice of the codes along the quantised axis, or for each group."""
        held = constant_array(value)
        assert held is not None
        per_slice = (-1, 1) if weight.axis == 0 else (1, -1)
        shaped = held.reshape((groups, 1, -1) if groups else per_slice).astype(kind)
        return new_initializer(model, f"{name}.line", shaped, workspace)

    def shaped(value: ir.Value, *sizes: int) -> ir.Value:
        return put("Reshape", [value, new_initializer(model, f"{name}.shape", np.array(sizes), workspace)])

    expanded = put("Cast", [weight.codes], ir.AttrInt64("to", int(ir.DataType.FLOAT)))
    if groups:
        expanded = shaped(expanded, groups, weight.block, weight.columns)
    if not weight.is_symmetric and weight.zero is not None:
        expanded = put("Sub", [expanded, line(weight.zero, np.float32)])
    expanded = put("Mul", [expanded, line(weight.scale, np.float32)])
    if groups:
        expanded = shaped(expanded, weight.rows, weight.columns)
    if weight.transposed:
        expanded = put("Transpose", [expanded], ir.AttrInt64s("perm", [1, 0]))
    product.replace_input_with(1, expanded)
