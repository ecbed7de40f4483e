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
from qcompile.backends.tvm.kernels.packing import CODE_BITS
from qcompile.backends.tvm.notes import Weight
from qcompile.backends.tvm.scopes import Program
from qcompile.backends.tvm.values import Tensor

SCHEDULED = "tirx.is_scheduled"
UNITS = ("amx", "vnni", "sdot")  # elsewhere the loops of ``linears`` stay
ROUNDING_UNITS = ("amx", "vnni")  # on ARM the kernel that rounds x crashed


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
    held = [
        program.parameter(f"{weight.name}.{part}", array, array.dtype.name)
        for part, array in zip((f"panels{packed.bits}", "scales", "zeros"), operands, strict=False)
    ]
    symmetric = packed.zero is None
    result = _call(
        program, (name, depth, columns, packed.bits, group, symmetric), x, held, columns, "float32",
        lambda: kernel(depth, columns, packed.bits, group, program.target, zero_points=not symmetric),
    )  # fmt: skip
    return result, name


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


def _call(
    program: Program, key: Hashable, x: Tensor, held: Sequence[Tensor], columns: int, dtype: str,
    write: Callable[[], Any],
) -> Tensor:  # fmt: skip
    def made() -> Any:
        return write().without_attr("global_symbol").with_attr(SCHEDULED, True)

    return program.written(key, made, [x, *held], (x.shape[0], columns), dtype)
