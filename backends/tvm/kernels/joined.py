"""Tensors one after the other along an axis, each copied row by row: a branch for every element would be no vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, T, loop


def joined(shapes: Sequence[Sequence[int | None]], axis: int, dtype: str, symbol: str = "joined") -> Any:
    """(parts ..., y). ``shapes``: of the parts, None for what is dynamic; parts differ along ``axis`` alone."""
    rank = len(shapes[0])

    def body(argument: Callable[..., Buffer], spare: Expr) -> None:
        common = [_side(next((shape[d] for shape in shapes if shape[d] is not None), None)) for d in range(rank)]
        sizes = [_side(shape[axis]) for shape in shapes]
        parts = [
            argument(f"x{n}", [*common[:axis], size, *common[axis + 1 :]], dtype) for n, size in enumerate(sizes)
        ]
        whole = sizes[0]
        for size in sizes[1:]:
            whole = whole + size
        y = argument("y", [*common[:axis], whole, *common[axis + 1 :]], dtype)
        start: Expr = emit.int64(0)
        for part, size in zip(parts, sizes, strict=True):
            with contextlib.ExitStack() as stack:
                sides = [size if d == axis else common[d] for d in range(rank)]
                at = [stack.enter_context(loop(side)) for side in sides]
                emit.store(y, [*at[:axis], at[axis] + start, *at[axis + 1 :]], part[tuple(at)])
            start = start + size

    return emit.primitive(symbol, body)


def _side(fixed: int | None) -> Expr:
    return T.int64() if fixed is None else emit.int64(fixed)
