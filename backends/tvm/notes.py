"""What a linear layer may see in its operands: the codes that a float tensor comes from."""

from __future__ import annotations

import dataclasses

import numpy as np

from qcompile.backends.tvm.values import Known, Tensor


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant matrix: (codes - zero) * scale, with one grid for each slice of ``axis`` or each block of it.

    codes: (K, N), or (N, K) where ``turned``
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    axis: int
    block: int
    turned: bool = False
    name: str = "weight"

    def transposed(self) -> Weight:
        return dataclasses.replace(self, turned=not self.turned)

    @property
    def matrix(self) -> np.ndarray:
        """The codes (K, N)."""
        return self.codes.T if self.turned else self.codes

    @property
    def per_column(self) -> bool:
        """Whether there is one grid for each output channel."""
        return self.block == 0 and (self.scale.size == 1 or self.axis == (0 if self.turned else 1))

    @property
    def group(self) -> int:
        """Rows of K on one grid of a column."""
        return self.block if self.block else int(self.matrix.shape[0])

    def grids(self) -> tuple[np.ndarray, np.ndarray]:
        """scale float32 and zero int32, (groups, N); only where the grid runs along K or is per column."""
        count, width = -(-self.matrix.shape[0] // self.group), self.matrix.shape[1]
        both = []
        for held, kind in ((self.scale, np.float32), (self.zero, np.int32)):
            array = np.zeros(1, kind) if held is None else np.asarray(held).astype(kind)
            if array.ndim == 2:
                array = array.T if self.turned else array
            row = array.reshape(-1) if array.ndim < 2 else array
            both.append(np.ascontiguousarray(np.broadcast_to(row, (count, width))))
        return both[0], both[1]

    @property
    def fits(self) -> bool:
        """Whether ``grids`` says it all."""
        return self.per_column or (self.block > 0 and self.axis == (1 if self.turned else 0))


@dataclasses.dataclass(frozen=True)
class Activation:
    """(codes - zero) * scale with one grid for the whole tensor."""

    codes: Tensor
    scale: Known
    zero: Known | None


@dataclasses.dataclass(frozen=True)
class Rows:
    """(codes - zero) * step with a grid for each row; ``zero`` int32 and ``step`` are (..., 1)."""

    codes: Tensor
    step: Tensor
    zero: Tensor | None
