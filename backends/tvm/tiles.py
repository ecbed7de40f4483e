"""Matrix products in tiles of fixed size, so that a CPU keeps its accumulators in registers whatever the dims are.

    packed[b, no, k, w]  = right[b, k, no W + w]          only where the right side is not laid out like that already
    tiles[b, mo, no, mi, w] = sum over k of left[b, mo R + mi, k] packed[b, no, k, w]
    y[b, m, n] = tiles[b, m / R, n / W, m % R, n % W]            read so by whatever comes next
What lies past the last row or column repeats it, and nothing reads the result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from tvm import te, tirx

from qcompile.backends.tvm.scopes import Body, Program
from qcompile.backends.tvm.values import Dim, Tensor, simplified, view

ROWS, WIDTHS = 4, (64, 32, 16)
PRODUCT, PACK = "tiles", "packed"  # names of the stages that schedules know
Side = Callable[[Callable[[int, Any], Any], Any, Any, Any], Any]  # (read, batch index, row, column) -> element


def tiled(
    program: Program, batch: Sequence[Dim], sizes: tuple[Dim, Dim, Dim], dtype: str, operands: Sequence[Tensor],
    left: Side, right: Side, key: Hashable, pack: bool,
) -> Tensor:  # fmt: skip
    """The product (*batch, M, N) with sizes M, N, K of sides that read from ``operands``."""
    rows, columns, depth = sizes
    width = next((w for w in WIDTHS if isinstance(columns, int) and columns % w == 0), 16)
    forced = [program.force(operand) for operand in operands]

    def build(body: Body) -> list[Tensor]:
        for operand in forced:
            body.kernel.read(operand)
        stages = [body.kernel.stages[id(operand)] for operand in forced]

        def read(n: int, index: Any) -> Any:
            return stages[n](*index)

        return [_stages(body, read, tuple(batch), sizes, width, dtype, left, right, pack)]

    whole = (key, "tiled", pack, dtype, len(batch), str(rows), str(columns), str(depth))
    tiles = program.kernel(whole, forced, build, "product")[0]

    def place(i: Any) -> Any:
        m, n = i[-2], i[-1]
        return (*i[:-2], m // ROWS, n // width, m % ROWS, n % width)

    return view(tiles, (*batch, rows, columns), place, ("untiled", width))


def _stages(
    body: Body, read: Any, batch: tuple[Dim, ...], sizes: tuple[Dim, Dim, Dim], width: int, dtype: str, left: Side,
    right: Side, pack: bool,
) -> Tensor:  # fmt: skip
    rows, columns, depth = sizes
    rank = len(batch)
    strips, blocks = simplified((columns + width - 1) // width), simplified((rows + ROWS - 1) // ROWS)

    def column(strip: Any, lane: Any) -> Any:
        at = strip * width + lane
        return at if isinstance(columns, int) and columns % width == 0 else tirx.min(at, columns - 1)

    def strip_of(b: Any, strip: Any, k: Any, lane: Any) -> Any:
        return right(read, b, k, column(strip, lane))

    if pack:
        packed = te.compute(
            (*batch, strips, depth, width), lambda *i: strip_of(i[:rank], i[rank], i[rank + 1], i[rank + 2]), name=PACK
        )

        def strip_of(b: Any, strip: Any, k: Any, lane: Any) -> Any:
            return packed(*b, strip, k, lane)

    k = te.reduce_axis((0, depth), name="k")

    def element(*i: Any) -> Any:
        b, (block, strip, row, lane) = i[:rank], i[rank:]
        at = tirx.min(block * ROWS + row, rows - 1)
        return te.sum(left(read, b, at, k.var) * strip_of(b, strip, k.var, lane), axis=k)

    held = te.compute((*batch, blocks, strips, ROWS, width), element, name=PRODUCT)
    tiles = Tensor(tuple(held.shape), dtype, leaf="stage")
    body.kernel.put(tiles, held)
    return tiles
