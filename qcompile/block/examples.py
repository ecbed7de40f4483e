"""A block's samples as the loop that learns takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from qcompile.block.learn import Example
from qcompile.block.stream import Step

HELD_BYTES = 128 << 20  # what stays in memory: short samples are read a thousand times


class Examples(Sequence[Example]):
    """Read when asked for; the first ones, while they are small, once."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._held: dict[int, Example] = {}
        self._left = HELD_BYTES

    def __len__(self) -> int:
        return len(self._step.targets)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number in self._held:
            return self._held[number]
        feeds, target = self._step.feeds(number), self._step.targets[number]
        size = target.nbytes + sum(array.nbytes for array in feeds.values())
        if size > self._left:
            return Example(feeds, [target], self._step.mask(number))
        self._left -= size
        held = {name: np.array(array) for name, array in feeds.items()}
        self._held[number] = Example(held, [np.array(target)], self._step.mask(number))
        return self._held[number]
