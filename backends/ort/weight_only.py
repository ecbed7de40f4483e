"""Linears with low-bit weights and float activations.

    MatMul(x, DequantizeLinear(codes (K, N), scale, zero)) [+ Add(bias)]
        ->  com.microsoft.MatMulNBits(x, packed, scale, zero, bias){bits, block_size, accuracy_level}
The kernel stores 2, 4 or 8 bits; 3-bit codes take 4. Blocks along K are powers of two from 16: one scale for
a column, or for a longer group, is repeated for each block; K is padded with zeros to whole blocks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import MS
from qcompile.backends.ort.linear import QuantisedWeight, bias_of, quantised_weight, replace_linear
from qcompile.backends.ort.tables import Stored
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger

ACCURACY_LEVEL = (
    4  # blocks of x become int8 in the kernel; levels below are slower than float at 2 and 8 bits
)
LARGEST_BLOCK = 128
CONTAINERS = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Operands of MatMulNBits: packed u8 (N, blocks, bytes), scale (N, blocks), zero u8 or None."""

    packed: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int
    block: int


def rewrite(model: ir.Model, workspace: Workspace, ledger: Ledger, stored: dict[int, Stored]) -> int:
    """Bring every remaining low-bit weight to MatMulNBits; returns how many."""
    count = 0
    for product in match.nodes(model.graph, "MatMul"):
        weight = quantised_weight(product)
        if weight is None:
            continue
        block = block_of(weight)
        if block is None:
            reason = "groups of rows are no multiple of 16, the smallest block of the kernel"
            ledger.skip(layer_name(product), reason, str(product.name))
            continue
        _replace(model, product, weight, block, workspace, stored)
        count += 1
    if count:
        ledger.current.facts["accuracy_level"] = ACCURACY_LEVEL
        ledger.note(
            f"MatMulNBits quantises blocks of its float input to int8 (accuracy level {ACCURACY_LEVEL})"
        )
    return count


def block_of(weight: QuantisedWeight) -> int | None:
    """The largest block that the scales allow; for one scale a column, one that divides K if there is any."""
    held = constant_array(weight.codes)
    assert held is not None
    k = held.shape[1 if weight.transposed else 0]
    if weight.per_column:
        fitting = [b for b in (LARGEST_BLOCK, 64, 32, 16) if k % b == 0]
        return fitting[0] if fitting else 32
    if weight.block == 0 or weight.axis != (1 if weight.transposed else 0):
        return None
    block = weight.block & -weight.block  # the largest power of two that divides it
    return min(block, LARGEST_BLOCK) if block >= 16 else None


def _replace(
    model: ir.Model,
    product: ir.Node,
    weight: QuantisedWeight,
    block: int,
    workspace: Workspace,
    stored: dict[int, Stored],
) -> None:
    packed = pack(weight, block, smallest=8 if weight.transposed else 2)  # a table is looked up in bytes
    name = str(weight.codes.name)
    k, n = _shape(weight)
    inputs: list[ir.Value | None] = [
        product.inputs[0],
        new_initializer(model, f"{name}.packed", packed.packed, workspace),
        new_initializer(model, f"{name}.block_scale", packed.scale, workspace),
        None if packed.zero is None else new_initializer(model, f"{name}.block_zero", packed.zero, workspace),
    ]
    if weight.transposed:
        stored[id(weight.codes)] = Stored(inputs[1], 128)  # type: ignore[arg-type]
    add, bias = bias_of(product, n)
    inputs += [None, bias]
    while inputs[-1] is None:
        inputs.pop()
    numbers = {
        "K": k,
        "N": n,
        "bits": packed.bits,
        "block_size": packed.block,
        "accuracy_level": ACCURACY_LEVEL,
    }
    attributes = [ir.AttrInt64(key, value) for key, value in numbers.items()]
    replace_linear(product, add, ir.Node(MS, "MatMulNBits", inputs, attributes, num_outputs=1))


def _shape(weight: QuantisedWeight) -> tuple[int, int]:
    held = constant_array(weight.codes)
    assert held is not None
    k, n = held.shape[::-1] if weight.transposed else held.shape
    return int(k), int(n)


def pack(weight: QuantisedWeight, block: int, smallest: int) -> Packed:
    """The codes, unsigned around 2^(bits-1), in blocks along K."""
    held, scale = constant_array(weight.codes), constant_array(weight.scale)
    assert held is not None and scale is not None
    zero = constant_array(weight.zero)
    codes = (held if weight.transposed else held.T).astype(np.int16)  # (N, K)
    n, k = codes.shape
    blocks = -(-k // block)
    scales = _per_block(scale, weight, n, k, block)
    zeros = (
        np.zeros_like(scales, np.int16)
        if zero is None
        else _per_block(zero, weight, n, k, block).astype(np.int16)
    )
    bits = _container(codes, zeros, smallest)
    middle = 1 << (bits - 1)
    padded = np.repeat(zeros, block, axis=1)
    padded[:, :k] = codes
    packed = _bytes((padded + middle).astype(np.uint8), bits).reshape(n, blocks, block * bits // 8)
    packed_zero = _bytes((zeros + middle).astype(np.uint8), bits) if zeros.any() else None
    return Packed(packed, scales.astype(np.float32), packed_zero, bits, block)


def _per_block(array: np.ndarray, weight: QuantisedWeight, n: int, k: int, block: int) -> np.ndarray:
    """A scale or zero point for each (column, block), (N, blocks)."""
    blocks = -(-k // block)
    if weight.per_column:
        return np.repeat(np.asarray(array).reshape(n, 1), blocks, axis=1)
    by_group = array if weight.transposed else array.T  # (N, groups)
    return by_group[:, np.arange(blocks) * block // weight.block]


def _container(codes: np.ndarray, zeros: np.ndarray, smallest: int) -> int:
    low, high = min(codes.min(), zeros.min()), max(codes.max(), zeros.max())
    fitting = [b for b in CONTAINERS if b >= smallest and -(1 << (b - 1)) <= low and high < 1 << (b - 1)]
    return fitting[0]


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, M) of ``bits`` in bytes (N, ceil(M bits / 8)), the first in the lowest bits."""
    each = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).reshape(codes.shape[0], -1, each)
    shifts = (np.arange(each) * bits).astype(np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(padded << shifts, axis=-1).astype(np.uint8)
    return packed
