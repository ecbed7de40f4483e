"""Weights as the kernels on processors read them: panels of 16 columns, in each the columns side by side.

Integer matrix, int8:   (panels, depth / 4 + 1, 16, 4); [p, q, c, j] is row 4 q + j of column 16 p + c, and the last
                        slab holds the columns' sums, int32.
Codes of 2, 4, 8 bits:  uint8 (panels, slabs, 16, 4); a slab has 32 / bits rows: bits [i b, (i + 1) b) of byte
                        [c, j] are row 4 i + j.
Codes of 3 bits:        for 32 rows, two slabs of their low two bits, then one of their high bits.
Rows are filled up with zeros to whole slabs (64 rows for the integer matrix), columns to an even number of panels.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qcompile.errors import UserError

PANEL = 16
TILE_DEPTH = 64
CODE_BITS = (2, 3, 4, 8)


def panels_of(columns: int) -> int:
    """How many panels ``columns`` fill; always even, since kernels take them in pairs."""
    return 2 * -(-columns // (2 * PANEL))


def padded_depth(depth: int) -> int:
    return TILE_DEPTH * -(-depth // TILE_DEPTH)


def integer_shape(depth: int, columns: int) -> tuple[int, int, int, int]:
    return panels_of(columns), padded_depth(depth) // 4 + 1, PANEL, 4


def pack_integer(weight: np.ndarray) -> np.ndarray:
    """W (K, N) int8, packed for ``matmul_integer`` on a processor."""
    depth, columns = weight.shape
    panels, quads = panels_of(columns), padded_depth(depth) // 4
    padded = np.zeros((quads * 4, panels * PANEL), np.int8)
    padded[:depth, :columns] = weight
    body = padded.reshape(quads, 4, panels, PANEL).transpose(2, 0, 3, 1)  # (panels, quads, 16, 4)
    sums = padded.sum(axis=0, dtype=np.int64).astype("<i4").view(np.int8).reshape(panels, 1, PANEL, 4)
    return np.ascontiguousarray(np.concatenate([body, sums], axis=1))


@dataclasses.dataclass(frozen=True)
class CodeLayout:
    """Where the codes of a (K, N) matrix lie. ``group``: rows that share a scale; K where a column shares one."""

    depth: int
    columns: int
    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS:
            raise UserError(f"there is no kernel for codes of {self.bits} bits", hint="take 2, 3, 4 or 8")
        if self.group < self.depth and self.group % 32:
            raise UserError(
                f"groups of {self.group} rows do not fill the kernels' registers",
                hint="take a multiple of 32, or one group a column",
            )

    @property
    def rows(self) -> int:
        """Rows that are stored together: one slab, and three for 3 bits."""
        return 32 if self.bits == 3 else 32 // self.bits

    @property
    def slabs(self) -> int:
        """64-byte slabs of those rows."""
        return 3 if self.bits == 3 else 1

    @property
    def stored_group(self) -> int:
        """Rows of a group with its filling."""
        return self.rows * -(-min(self.group, self.depth) // self.rows)

    @property
    def groups(self) -> int:
        return -(-self.depth // self.group)

    @property
    def stored_depth(self) -> int:
        return self.groups * self.stored_group

    @property
    def panels(self) -> int:
        return panels_of(self.columns)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.panels, self.stored_depth // self.rows * self.slabs, PANEL, 4

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        return self.panels, self.groups, PANEL


def pack_codes(codes: np.ndarray, layout: CodeLayout, fill: np.ndarray | int = 0) -> np.ndarray:
    """Codes uint8 (K, N) of ``layout.bits`` bits. ``fill``: what missing rows hold, a number or one a column."""
    depth, columns = codes.shape
    padded = np.zeros((layout.stored_depth, layout.panels * PANEL), np.uint8)
    padded[:, :columns] = fill
    padded[:depth, :columns] = codes
    count = padded.shape[0] // layout.rows
    quads = padded.reshape(count, layout.rows // 4, 4, layout.panels, PANEL).transpose(3, 0, 1, 4, 2)
    if layout.bits == 3:
        low = [_merged(quads[:, :, part : part + 4] & 3, 2) for part in (0, 4)]
        slabs = np.stack([*low, _merged(quads >> 2, 1)], axis=2)
        return np.ascontiguousarray(slabs.reshape(layout.shape))
    return np.ascontiguousarray(_merged(quads, layout.bits))


def _merged(quads: np.ndarray, bits: int) -> np.ndarray:
    """(panels, slabs, quads, 16, 4) -> (panels, slabs, 16, 4), quad i at bit i * bits."""
    shifts = np.arange(quads.shape[2], dtype=np.uint8)[:, None, None] * np.uint8(bits)
    merged: np.ndarray = np.bitwise_or.reduce(quads << shifts, axis=2)
    return merged


def pack_columns(values: np.ndarray, layout: CodeLayout, dtype: str) -> np.ndarray:
    """Scales or zero points (groups, N), or (N) with one group, as (panels, groups, 16)."""
    held = np.zeros((layout.groups, layout.panels * PANEL), dtype)
    held[:, : layout.columns] = values.reshape(layout.groups, layout.columns)
    return np.ascontiguousarray(held.reshape(layout.groups, layout.panels, PANEL).transpose(1, 0, 2))
