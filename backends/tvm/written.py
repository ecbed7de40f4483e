"""The kernels of ``kernels`` in a program: which linear layer takes which, and its weights packed as that reads them.

rewrite:  a linear layer -> a call of a PrimFunc that is written out; layers of one shape share it
needs:    a processor with a unit for 8-bit products: AMX, AVX-512 VNNI, ARM's dot product
ensures:  sums of integers are exact; None where there is no kernel, and the loops of ``linears`` do
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from qcompile.backends.tvm import kernels
from qcompile.backends.tvm.kernels.api import LARGEST_SUM
from qcompile.backends.tvm.kernels.attention import LANES, AttentionProduct
from qcompile.backends.tvm.kernels.joined import joined
from qcompile.backends.tvm.kernels.packing import CODE_BITS
from qcompile.backends.tvm.notes import Activation, Rows, Weight
from qcompile.backends.tvm.scopes import Program
from qcompile.backends.tvm.values import Tensor, simplified

SCHEDULED = "tirx.is_scheduled"
UNITS = ("amx", "vnni", "sdot")  # elsewhere the loops of ``linears`` stay
ROUNDING_UNITS = ("amx", "vnni")  # on ARM such kernels are right under qemu, and nobody has timed them


@dataclasses.dataclass(frozen=True)
class Packed:
    """Codes as the kernels count them, uint8; ``zero``: None where all are 2^(bits - 1)."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int


def integer(program: Program, x: Tensor, codes: np.ndarray, name: str) -> tuple[Tensor, str] | None:
    """int32 sums of x (M, K) times ``codes`` (K, N), and the name of the kernel."""
    depth, columns = codes.shape
    if unit(program.target) not in UNITS or codes.dtype != np.int8 or x.dtype not in ("int8", "uint8"):
        return None
    if depth * 255 * 128 > LARGEST_SUM:
        return None
    held = [program.parameter(f"{name}.panels", kernels.pack_integer(codes), "int8")]
    result = _call(
        program, ("matmul_integer", depth, columns, x.dtype), x, held, columns, "int32",
        lambda: kernels.matmul_integer(depth, columns, x.dtype, program.target),
    )  # fmt: skip
    return result, "matmul_integer"


def weight_only(program: Program, x: Tensor, weight: Weight) -> tuple[Tensor, str] | None:
    """x (M, K) float32 times a dequantised matrix, and the name of the kernel."""
    found = unit(program.target)
    if found not in UNITS or x.dtype != "float32":
        return None
    (depth, columns), group = weight.matrix.shape, weight.group
    if group < depth and group % 32:
        return None
    packed = as_codes(weight)
    if packed is None:
        return None
    level = program.accuracy_level if found in ROUNDING_UNITS else 1
    kernel, name = (
        (kernels.matmul_nbits_int8, "matmul_nbits_int8") if level == 4 else (kernels.matmul_nbits, "matmul_nbits")
    )
    operands = kernels.pack_nbits(packed.codes, packed.scale, packed.zero, packed.bits, group)
    held = _parameters(program, weight.name, (f"panels{packed.bits}", "scales", "zeros"), operands)
    symmetric = packed.zero is None
    result = _call(
        program, (name, depth, columns, packed.bits, group, symmetric), x, held, columns, "float32",
        lambda: kernel(depth, columns, packed.bits, group, program.target, zero_points=not symmetric),
    )  # fmt: skip
    return result, name


def takes_codes(program: Program, grid: Activation | Rows, weight: Weight) -> Packed | None:
    """``weight`` as ``few_bits`` takes it; None where there is no kernel, or ``integer`` has the better one."""
    if unit(program.target) not in ROUNDING_UNITS or grid.codes.dtype not in ("int8", "uint8"):
        return None
    (depth, _), group = weight.matrix.shape, weight.group
    packed = as_codes(weight) if group >= depth or group % 32 == 0 else None
    if packed is None or (packed.bits == 8 and weight.per_column):
        return None
    return packed if min(group, depth) * 255 * 2**packed.bits <= LARGEST_SUM else None


def few_bits(
    program: Program, x: Tensor, grid: Activation | Rows, scales: Sequence[Tensor], weight: Weight, packed: Packed
) -> Tensor:
    """x (M, K) codes times a matrix of codes, as floats. ``scales``: of each row, its step and its zero point."""
    (depth, columns), bits, group = weight.matrix.shape, packed.bits, weight.group
    scale, zero, static = packed.scale, None, isinstance(grid, Activation)
    if isinstance(grid, Activation):
        scale = np.float32(grid.scale.array.reshape(-1)[0]) * scale
        zero = 0 if grid.zero is None else int(grid.zero.array.reshape(-1)[0])
        zero -= 128 if x.dtype == "uint8" else 0
    operands = kernels.pack_nbits(packed.codes, scale, packed.zero, bits, group, sums=x.dtype == "uint8", x_zero=zero)
    names = (f"panels{bits}", "scales", *([] if packed.zero is None else ["zeros"]), "sums")
    held = _parameters(program, weight.name, names, operands)
    key = ("matmul_w4a8", depth, columns, bits, group, packed.zero is None, x.dtype, static)
    return _call(
        program, key, x, [*scales, *held], columns, "float32",
        lambda: kernels.matmul_w4a8(
            depth, columns, bits, group, program.target, x_dtype=x.dtype, zero_points=packed.zero is not None,
            static=static,
        ),
    )  # fmt: skip


def attention(
    program: Program, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, groups: int
) -> Tensor | None:
    """softmax(scale q k^T + bias) v of floats; None where the heads fill no registers."""
    heads, depth, width = q.shape[1], q.shape[-1], v.shape[-1]
    fixed = [side for side in (heads, depth, width) if isinstance(side, int)]
    whole = len(fixed) == 3 and depth % LANES == 0 and width % LANES == 0
    if unit(program.target) not in ROUNDING_UNITS or q.dtype != "float32" or not whole or bias.rank > 4:
        return None
    held = program.reshape(bias, (*[1] * (4 - bias.rank), *bias.shape))
    stretched = tuple(isinstance(side, int) and side == 1 for side in held.shape)
    return program.written(
        ("attention", heads, groups, depth, width, scale, stretched),
        lambda: _plain(AttentionProduct(heads, groups, depth, width, scale, stretched).primitive("attention")),
        [program.force(tensor) for tensor in (q, k, v, held)], (*q.shape[:-1], width), "float32",
    )  # fmt: skip


def grown(program: Program, parts: Sequence[Tensor], axis: int) -> Tensor | None:
    """``parts`` one after the other, such as a cache and what it grows by, in loops of a CPU.

    None where no part is of dynamic length, and for GPUs, whose schedules give each element a thread.
    """
    dynamic = any(not isinstance(part.shape[axis], int) for part in parts)
    if unit(program.target) in ("", "loops") or not dynamic or axis == parts[0].rank - 1:
        return None
    shapes = tuple(tuple(side if isinstance(side, int) else None for side in part.shape) for part in parts)
    total = parts[0].shape[axis]
    for part in parts[1:]:
        total = simplified(total + part.shape[axis])
    shape, dtype = [*parts[0].shape[:axis], total, *parts[0].shape[axis + 1 :]], parts[0].dtype
    return program.written(
        ("joined", shapes, axis, dtype), lambda: _plain(joined(shapes, axis, dtype)),
        [program.force(part) for part in parts], shape, dtype,
    )  # fmt: skip


def as_codes(weight: Weight) -> Packed | None:
    """Codes from 0 on in the fewest bits that have a kernel, zero points in a byte; None where they fit none."""
    scale, zero = weight.grids()
    matrix = weight.matrix.astype(np.int32)
    low, high = min(int(matrix.min()), int(zero.min())), int(matrix.max())
    bits = next((bits for bits in CODE_BITS if high - low < 2**bits), 0)
    if not bits or int(zero.max()) - low > 255:
        return None
    centred = int(zero.flat[0]) - 2 ** (bits - 1)
    if (zero == zero.flat[0]).all() and centred <= matrix.min() and high < centred + 2**bits:
        return Packed((matrix - centred).astype(np.uint8), scale, None, bits)
    return Packed((matrix - low).astype(np.uint8), scale, (zero - low).astype(np.uint8), bits)


def unit(target: Any) -> str:
    """What multiplies integers on ``target``; empty for None."""
    return kernels.features(target).unit if target is not None else ""


def _parameters(
    program: Program, name: str, parts: Sequence[str], operands: Sequence[np.ndarray]
) -> list[Tensor]:
    return [
        program.parameter(f"{name}.{part}", array, array.dtype.name)
        for part, array in zip(parts, operands, strict=False)
    ]


def _call(
    program: Program, key: Hashable, x: Tensor, held: Sequence[Tensor], columns: int, dtype: str,
    write: Callable[[], Any],
) -> Tensor:  # fmt: skip
    return program.written(key, lambda: _plain(write()), [x, *held], (x.shape[0], columns), dtype)


def _plain(function: Any) -> Any:
    """``function`` as one of a module that ``schedule`` leaves as it is."""
    return function.without_attr("global_symbol").with_attr(SCHEDULED, True)
