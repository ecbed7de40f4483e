"""Operands of the kernels, drawn at random, and a run of a kernel on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

tvm: Any = pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.tvm.kernels import pack_nbits  # noqa: E402
from qcompile.backends.tvm.kernels.program import compiled  # noqa: E402

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class LowBit:
    """Codes (K, N), scales and zero points (groups, N)."""

    bits: int
    group: int | None
    symmetric: bool
    codes: Array
    scale: Array
    zero: Array

    @property
    def rows(self) -> int:
        """Of a group."""
        depth = len(self.codes)
        return depth if self.group is None else min(self.group, depth)

    def packed(self, *, sums: bool = False) -> tuple[Array, ...]:
        zero = None if self.symmetric else self.zero
        return pack_nbits(self.codes, self.scale, zero, self.bits, self.group, sums=sums)


def drawn(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def integers(dtype: str, *shape: int, seed: int = 0) -> Array:
    """Over the whole range of ``dtype``, with both ends."""
    info = np.iinfo(dtype)
    found = drawn(seed).integers(info.min, info.max + 1, shape).astype(dtype)
    found.flat[0], found.flat[-1] = info.min, info.max
    return found


def low_bit(k: int, n: int, bits: int, group: int | None, *, symmetric: bool) -> LowBit:
    generator, count = drawn(k + n), 1 if group is None else -(-k // group)
    codes = generator.integers(0, 2**bits, (k, n)).astype(np.uint8)
    scale = generator.uniform(0.01, 0.1, (count, n)).astype(np.float32)
    drawn_zero = generator.integers(0, 2**bits, (count, n)).astype(np.uint8)
    zero = np.full((count, n), 2 ** (bits - 1), np.uint8) if symmetric else drawn_zero
    return LowBit(bits, group, symmetric, codes, scale, zero)


def opened(kernel: Any, target: Any) -> Callable[..., Array]:
    """``kernel`` as a function (operands, shape and type of y) -> y; memory behind y is seen to stay as it was."""
    call = compiled([kernel], target)[str(kernel.attrs["global_symbol"])]

    def run(operands: Sequence[Array], shape: tuple[int, int], dtype: str) -> Array:
        memory = tvm.runtime.tensor(np.full((shape[0] + 1, shape[1]), 77, dtype))
        call(*(tvm.runtime.tensor(operand) for operand in operands), memory._create_view(shape, dtype))
        held: Array = memory.numpy()
        assert (held[shape[0] :] == 77).all()
        return held[: shape[0]]

    return run
