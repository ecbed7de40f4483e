"""The loops around low-bit weights on a processor: chunks of rows of x, panels of W, blocks of rows, groups along K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, Register, T, int64, loop
from qcompile.backends.tvm.kernels.features import PANEL, Features
from qcompile.backends.tvm.kernels.integer import store_panel
from qcompile.backends.tvm.kernels.packing import CodeLayout

STEPS = 4  # of unpacking that are written out


class PanelProduct:
    """One kernel while it is written. ``middle``: the zero point of all groups; None where they are an argument.

    chunk: rows of x for which W passes once; heights: rows that a block has, the tallest first.
    """

    chunk: ClassVar[int]
    heights: ClassVar[Sequence[int]]
    x_dtype: ClassVar[str] = "float32"

    def __init__(self, layout: CodeLayout, features: Features, middle: int | None) -> None:
        self.layout, self.features, self.middle = layout, features, middle
        self.lanes = features.lanes
        self.x: Buffer
        self.w: Buffer
        self.scale: Buffer
        self.zero: Buffer
        self.y: Buffer

    def prepare(self, first: Expr, height: Expr) -> None:
        """What is done with rows first .. first + height of x before W passes."""

    def group(self, start: Expr, panel: Expr, group: Expr, column: int, results: list[Register], rows: int) -> None:
        """Add a group with ``rows`` rows to ``results``, float registers, one for each row of x from ``start`` on."""
        raise NotImplementedError

    def declare(self, argument: Any, rows: Expr) -> None:
        """The kernel's arguments in their order."""
        self.x = argument("x", (rows, self.layout.depth), self.x_dtype)
        self.w = argument("w", self.layout.shape, "uint8")
        self.scale = argument("scale", self.layout.scale_shape, "float32")
        if self.middle is None:
            self.zero = argument("zero", self.layout.scale_shape, "uint8")
        self.y = argument("y", (rows, self.layout.columns), "float32")

    def primitive(self, symbol: str) -> Any:
        def body(argument: Callable[..., Buffer], rows: Expr) -> None:
            self.declare(argument, rows)
            self.write(rows)

        return emit.primitive(symbol, body)

    def write(self, rows: Expr) -> None:
        with loop(T.floordiv(rows + (self.chunk - 1), int64(self.chunk))) as chunk:
            first = emit.bind(chunk * self.chunk)
            height = emit.bind(T.min(int64(self.chunk), rows - first))
            self.prepare(first, height)
            with loop(-(-self.layout.columns // PANEL)) as panel:
                self._panel(first, height, panel)

    def _panel(self, first: Expr, height: Expr, panel: Expr) -> None:
        done: Expr = int64(0)
        for tall in self.heights:
            count = emit.bind(T.floordiv(height - done, int64(tall)))
            with loop(count) as block:
                self._block(first, emit.bind(done + block * tall), tall, panel)
            done = emit.bind(done + count * tall)

    def _block(self, first: Expr, start: Expr, height: int, panel: Expr) -> None:
        parts = range(0, PANEL, self.lanes)
        kind = f"float32x{self.lanes}"
        results = [[Register(kind, emit.zeros("float32", self.lanes)) for _ in parts] for _ in range(height)]
        whole, rest = divmod(self.layout.depth, self.layout.group)
        row = self.at(first, start)
        if whole:
            with loop(whole) as group:
                for index, column in enumerate(parts):
                    self.group(row, panel, group, column, [r[index] for r in results], self.layout.group)
        if rest:
            for index, column in enumerate(parts):
                self.group(row, panel, int64(whole), column, [r[index] for r in results], rest)
        for r in range(height):
            values = [one.value for one in results[r]]
            store_panel(self.y, first + start + r, panel * PANEL, self.layout.columns, values)

    def at(self, first: Expr, start: Expr) -> Expr:
        """The row that ``group`` is given: of x."""
        return first + start

    def steps(self, group: Expr, count: int, step: Callable[[Expr], None]) -> None:
        """``step(number)`` for ``count`` steps of unpacking from the start of ``group`` on, some in a loop."""
        before = emit.bind(group * (self.layout.stored_group // self.layout.rows))
        turns = count // STEPS
        if turns:
            with loop(turns) as turn:
                for part in range(STEPS):
                    step(emit.bind(before + turn * STEPS + part))
        for part in range(turns * STEPS, count):
            step(emit.bind(before + part))


def split(height: int, rows: int) -> int:
    """Over how many registers the sum of a group is spread, so that additions overlap."""
    if height > 2:
        return 1
    return 2 if rows <= 128 else 4


def total_of(parts: Sequence[Register]) -> Expr:
    total = parts[0].value
    for other in parts[1:]:
        total = total + other.value
    return total
