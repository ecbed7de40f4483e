"""What the translator computes with: constants known now, and tensors that are expressions until they are forced.

A ``Tensor`` is a leaf (it exists when the program runs) or an expression: its element at an index from the elements
of its operands. Expressions are fused: only what is forced becomes a loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.sym import Analyzer

Dim = Any  # int, or a tirx expression over the dynamic dims of the inputs
Index = tuple[Any, ...]
Make = Callable[[Callable[[int, Index], Any], Index], Any]  # (element of operand n at an index, index) -> expression

_ANALYZER = Analyzer()


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A small constant. Integers may be expressions over dynamic dims: then ``array`` holds objects.

    name: of the initializer, where it is one and not part of an operator's definition
    """

    array: np.ndarray
    dtype: str
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def is_symbolic(self) -> bool:
        return self.array.dtype == object

    def ints(self) -> list[Dim]:
        """The elements, flat."""
        return [x if isinstance(x, tirx.Expr) else int(x) for x in self.array.reshape(-1)]


@dataclasses.dataclass(eq=False)
class Tensor:
    """A tensor of a known rank.

    key:   what ``make`` does, as data: two tensors with the same key and operands alike are computed by one kernel
    cost:  arithmetic in the expression; 0 for leaves and views of them
    leaf:  what holds it when the program runs; None for an expression
    note:  what a linear layer may see in it, such as the codes that it comes from
    """

    shape: tuple[Dim, ...]
    dtype: str
    make: Make | None = None
    operands: tuple[Tensor, ...] = ()
    key: Hashable = None
    cost: int = 0
    leaf: Any = None
    note: Any = None
    uses: int = 0

    @property
    def rank(self) -> int:
        return len(self.shape)


Value = Known | Tensor


def expression(
    shape: Sequence[Dim], dtype: str, operands: Sequence[Tensor], make: Make, key: Hashable, cost: int = 0
) -> Tensor:
    """A tensor that is computed where it is read."""
    total = cost + sum(operand.cost for operand in operands if operand.leaf is None)
    return Tensor(tuple(shape), dtype, make, tuple(operands), key, total)


def view(tensor: Tensor, shape: Sequence[Dim], place: Callable[[Index], Index], key: Hashable) -> Tensor:
    """``tensor`` with its elements in other places: ``place`` leads from the new index to the old."""
    return expression(shape, tensor.dtype, [tensor], lambda read, i: read(0, place(i)), key)


def simplified(dim: Dim) -> Dim:
    """``dim`` as an int where it is one."""
    if isinstance(dim, int | np.integer):
        return int(dim)
    found = _ANALYZER.simplify(dim)
    return int(found) if isinstance(found, tirx.IntImm) else found


def same(a: Dim, b: Dim) -> bool:
    """Whether two dims are proven to be equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a is b or bool(_ANALYZER.can_prove_equal(a, b))


def product(dims: Sequence[Dim]) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = dim if isinstance(total, int) and total == 1 else total * dim
    return simplified(total)


def spelled(shape: Sequence[Dim]) -> str:
    """A shape as part of a key."""
    return ",".join(str(dim) for dim in shape)


def broadcast(*shapes: Sequence[Dim]) -> tuple[Dim, ...]:
    """The common shape, as NumPy finds it; a dynamic dim that meets another is taken to be equal."""
    rank = max(map(len, shapes))
    found: list[Dim] = []
    for place in range(rank):
        sides = [shape[place - rank + len(shape)] for shape in shapes if place - rank + len(shape) >= 0]
        wide = [side for side in sides if not (isinstance(side, int) and side == 1)]
        fixed = [side for side in wide if isinstance(side, int)]
        found.append(fixed[0] if fixed else wide[0] if wide else 1)
    return tuple(found)


def aligned(shape: Sequence[Dim], index: Index) -> Index:
    """The index into an operand of ``shape`` that belongs to ``index`` of the broadcast result."""
    start = len(index) - len(shape)
    return tuple(
        0 if isinstance(side, int) and side == 1 else at for side, at in zip(shape, index[start:], strict=True)
    )


def stretched(shape: Sequence[Dim], result: Sequence[Dim]) -> bool:
    """Whether a tensor of ``shape`` is read more than once when it is broadcast to ``result``."""
    if len(shape) < len(result) and not all(isinstance(s, int) and s == 1 for s in result[: len(result) - len(shape)]):
        return True
    pairs = zip(shape, result[len(result) - len(shape) :], strict=True)
    return any(isinstance(a, int) and a == 1 and not (isinstance(b, int) and b == 1) for a, b in pairs)


def walk(roots: Sequence[Tensor]) -> Iterator[Tensor]:
    """Every tensor below ``roots`` once, operands first; nothing below a leaf."""
    seen: set[int] = set()
    stack: list[tuple[Tensor, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        tensor, done = stack.pop()
        if done:
            yield tensor
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            stack.append((tensor, True))
            if tensor.leaf is None:
                stack.extend((operand, False) for operand in reversed(tensor.operands))


def immediate(value: Any, dtype: str) -> Any:
    """A scalar as an expression of ``dtype``."""
    if isinstance(value, tirx.Expr):
        return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    return tirx.const(float(value) if dtype.startswith("float") else int(value), dtype)
