"""One node under the interval analysis: what its rule reads, and what the rule may complain of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.proof import spans
from qcompile.proof.spans import Dim, Dims, Span

BOUND_HINT = "give the largest size with --bound {}=N"


class UnreadableError(Exception):
    """A rule cannot say anything of this node; the message tells why."""


@dataclasses.dataclass(frozen=True)
class Complaint:
    """Why a node is not proven. ``kind``: overflow, narrowing, divisor, shift, index, unbounded or operator."""

    kind: str
    text: str
    hint: str = ""


@dataclasses.dataclass
class Step:
    """A node, the spans of its inputs, and the sizes that type inference found for its outputs."""

    node: ir.Node
    ins: list[Span | None]
    inferred: list[Dims | None]
    others: Mapping[ir.Value, Span] = dataclasses.field(default_factory=dict)  # of the values computed before
    complaints: list[Complaint] = dataclasses.field(default_factory=list)
    assumptions: list[str] = dataclasses.field(default_factory=list)

    def x(self, index: int = 0) -> Span:
        """Input ``index``, which the operator requires."""
        found = self.ins[index] if index < len(self.ins) else None
        if found is None:
            raise UnreadableError(f"input {index} is missing")
        return found

    def option(self, index: int) -> Span | None:
        """Input ``index`` where it is given."""
        return self.ins[index] if index < len(self.ins) else None

    def known(self, index: int) -> list[int]:
        """The elements of input ``index``, which must be constant."""
        found = spans.ints(self.x(index))
        if found is None:
            raise UnreadableError(f"input {index} is no constant")
        return found

    def number(self, name: str, default: int) -> int:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def text(self, name: str, default: str) -> str:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()

    def axis(self, default: int, rank: int | None) -> int:
        """The attribute ``axis``, counted from the front."""
        return self.front(self.number("axis", default), rank)

    def front(self, axis: int, rank: int | None) -> int:
        if rank is None:
            raise UnreadableError("the rank is unknown")
        if not -rank <= axis < max(rank, 1):
            raise UnreadableError(f"axis {axis} is outside rank {rank}")
        return axis % max(rank, 1)

    def dtype(self, output: int = 0) -> ir.DataType | None:
        return self.node.outputs[output].dtype

    def complain(self, kind: str, text: str, needs: frozenset[str] = spans.NOTHING) -> None:
        hint = BOUND_HINT.format(sorted(needs)[0]) if needs else ""
        self.complaints.append(Complaint(kind, text, hint))

    def size(self, dim: Dim, what: str) -> int:
        """The largest that ``dim`` can be; a complaint where nothing bounds it."""
        if dim.hi is None:
            named = ", ".join(sorted(dim.needs)) or "a size that the program computes"
            self.complain("unbounded", f"{what} over {named}, which has no bound", dim.needs)
        return dim.top

    def fitted(
        self,
        dims: Dims | None,
        lo: np.ndarray,
        hi: np.ndarray,
        *,
        reach: tuple[int, int] | None = None,
        kind: str = "overflow",
        output: int = 0,
    ) -> Span:
        """The span of output ``output`` for the exact result ``lo..hi``; a complaint where its type is too small.

        ``reach``: what partial sums may reach in any order, where that is more than the result.
        """
        dtype = self.dtype(output)
        if not spans.is_integer(dtype):
            return spans.full(dtype, dims)
        needs = spans.needs_of(self.ins)
        low, high = limits = spans.limits(dtype)
        least, most = reach or (int(lo.min()), int(hi.max()))
        if any(one.kind == "unbounded" for one in self.complaints):
            return spans.full(dtype, dims)
        if least < low or most > high:
            name = "" if dtype is None else dtype.name.lower()
            self.complain(kind, f"may reach {shown(least, most)}, {name} holds {shown(*limits)}", needs)
            return spans.full(dtype, dims)
        return spans.span(dtype, dims, lo, hi, needs)


Rule = Callable[[Step], Sequence[Span]]


def shown(lo: int, hi: int) -> str:
    """``-128..127``; large ends as powers of two where they are such, less one or not."""
    return f"{_end(lo)}..{_end(hi)}"


def _end(value: int) -> str:
    size = abs(value)
    if size < 2**20:
        return str(value)
    sign = "-" if value < 0 else ""
    for beyond in (0, 1):
        if (size + beyond) & (size + beyond - 1) == 0:
            return f"{sign}2^{(size + beyond).bit_length() - 1}{'-1' if beyond else ''}"
    return str(value) if size < 2**40 else f"about {sign}2^{size.bit_length() - 1}"
