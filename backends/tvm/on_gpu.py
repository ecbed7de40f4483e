"""The products of ``kernels/cuda`` in a program: which layer takes which, and its weights packed as that reads them.

rewrite:  a product -> a call of a PrimFunc that computes nothing and stands for the two kernels of its shape
needs:    a target of kind cuda; rows in whole 16-byte loads
ensures:  sums of integers are exact, those of floats float32; None where there is no kernel, and plain loops do
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import tvm
from tvm import te, tirx

from qcompile.backends.tvm.kernels.api import LARGEST_SUM
from qcompile.backends.tvm.kernels.cuda import layout
from qcompile.backends.tvm.kernels.cuda.products import Product
from qcompile.backends.tvm.notes import Weight
from qcompile.backends.tvm.scopes import Program, Scope
from qcompile.backends.tvm.stages import wide
from qcompile.backends.tvm.values import Dim, Tensor, Value, aligned, broadcast, expression, same, simplified
from qcompile.backends.tvm.written import SCHEDULED, as_codes

PRODUCT = "qcompile.product"  # the attribute of a PrimFunc that stands for kernels
BITS, LOAD = 4, 16
MIDDLE = 128


def is_gpu(scope: Scope) -> TypeGuard[Program]:
    """Whether ``scope`` is a program that takes these kernels."""
    return isinstance(scope, Program) and scope.target is not None and scope.target.kind.name == "cuda"


def integer(program: Program, x: Tensor, codes: np.ndarray, name: str) -> tuple[Tensor, str] | None:
    """int32 sums of x (M, K) times ``codes`` (K, N), and the name of the kernel."""
    depth, columns = codes.shape
    if codes.dtype != np.int8 or x.dtype not in ("int8", "uint8") or depth % LOAD or depth * 255 * 128 > LARGEST_SUM:
        return None
    held = program.parameter(f"{name}.rows", layout.columns_first(codes), "int8")
    product = Product("int8", x.dtype, depth, columns)
    return _call(program, product, [x, held], (x.shape[0], columns), "int32"), "int8_gemm"


def weight_only(program: Program, x: Tensor, weight: Weight) -> tuple[Tensor, str] | None:
    """x (M, K) float32 times a dequantised matrix of 4 bits or fewer, and the name of the kernel."""
    (depth, columns), group = weight.matrix.shape, weight.group
    packed = as_codes(weight)
    if packed is None or packed.bits > BITS or x.dtype != "float32" or depth % layout.STEP:
        return None
    if group < depth and group % layout.STEP:
        return None
    zero = np.full(packed.scale.shape, 2 ** (packed.bits - 1), np.uint8) if packed.zero is None else packed.zero
    if zero.max() > MIDDLE - 1:  # more than the lowest bits of a bfloat16 count
        return None
    arrays = {
        "rows": layout.codes_for_rows(packed.codes), "lanes": layout.codes_for_gemm(packed.codes),
        "scale": packed.scale.T, "zero": zero.T,
    }  # fmt: skip
    held = [
        program.parameter(f"{weight.name}.{part}", np.ascontiguousarray(array), array.dtype.name)
        for part, array in arrays.items()
    ]
    product = Product("w4", "float32", depth, columns, min(group, depth))
    return _call(program, product, [x, *held], (x.shape[0], columns), "float32"), "w4_gemm"


def batched(program: Program, a: Tensor, b: Tensor, less: Sequence[Value | None]) -> Tensor | None:
    """int32 sums of a (..., M, K) times b (..., K, N), batches broadcast; ``less``: scalars to be subtracted first."""
    left, right = (_codes(value, zero) for value, zero in zip((a, b), less, strict=True))
    if left is None or right is None or right.dtype != "int8":
        return None
    batch, depth = broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-1]
    full = simplified((depth + LOAD - 1) // LOAD * LOAD)

    def filled(x: Tensor, rows: Dim, turned: bool) -> Tensor:
        """x as (*batch, rows, full), with zeros behind the last column."""
        if not turned and same(full, depth) and len(x.shape) == len(batch) + 2 and all(map(same, x.shape, batch)):
            return program.force(x)

        def element(read: Any, index: Any) -> Any:
            row, k = index[-2:]
            inside = tirx.min(k, depth - 1)
            place = (inside, row) if turned else (row, inside)
            found = read(0, (*aligned(x.shape[:-2], index[:-2]), *place))
            return found if same(full, depth) else tirx.Select(k < depth, found, tirx.const(0, x.dtype))

        key = ("filled", turned, len(batch), str(depth))
        return program.force(expression((*batch, rows, full), x.dtype, [x], element, key, cost=1))

    rows, columns = a.shape[-2], b.shape[-1]
    operands = [filled(left, rows, False), filled(right, columns, True)]
    return _call(program, Product("int8", left.dtype), operands, (*batch, rows, columns), "int32")


def _codes(x: Tensor, zero: Value | None) -> Tensor | None:
    """x less ``zero`` in 8 bits; None where it does not fit them."""
    if x.dtype not in ("int8", "uint8") or isinstance(zero, Tensor):
        return None
    if zero is None or not zero.array.any():
        return x
    if x.dtype != "uint8" or zero.array.size != 1 or int(zero.array.reshape(-1)[0]) != MIDDLE:
        return None

    def element(read: Any, index: Any) -> Any:
        return tirx.Cast("int8", tirx.Cast("int32", read(0, index)) - MIDDLE)

    return expression(x.shape, "int8", [x], element, "centred", cost=1)


def _call(program: Program, product: Product, operands: Sequence[Tensor], shape: Sequence[Dim], dtype: str) -> Tensor:
    def made() -> Any:
        variables: dict[str, Any] = {}

        def free(dims: Sequence[Dim]) -> tuple[Any, ...]:
            """``dims`` with a variable for what is not known."""
            unknown = (str(dim) for dim in dims if not isinstance(dim, int))
            for name in unknown:
                variables.setdefault(name, tirx.Var(f"d{len(variables)}", "int64"))
            return wide([dim if isinstance(dim, int) else variables[str(dim)] for dim in dims])

        held = [te.placeholder(free(x.shape), x.dtype, name=f"x{n}") for n, x in enumerate(operands)]
        nothing = te.compute(free(shape), lambda *_: tirx.const(0, dtype), name="y")
        function = te.create_prim_func([*held, nothing]).without_attr("global_symbol")
        told = json.dumps(dataclasses.asdict(product), sort_keys=True)
        return function.with_attr(SCHEDULED, True).with_attr(PRODUCT, told)

    sides = [str(side) for operand in operands for side in operand.shape]
    return program.written((product.name, *sides, *map(str, shape)), made, operands, shape, dtype)


def product_of(function: Any) -> Product | None:
    """What ``function`` stands for; None where it has a body."""
    told = function.attrs[PRODUCT] if function.attrs is not None and PRODUCT in function.attrs else None
    return None if told is None else Product(**json.loads(str(told)))


def products_of(module: tvm.IRModule) -> list[Product]:
    """Every product of ``module`` once."""
    functions = [held for held in module.functions.values() if isinstance(held, tirx.PrimFunc)]
    found = {product.name: product for product in map(product_of, functions) if product is not None}
    return [found[name] for name in sorted(found)]
