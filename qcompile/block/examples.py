"""A block's samples as the loop that learns takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from qcompile.block.learn import Example
from qcompile.block.stream import Step


class Examples(Sequence[Example]):
    """Read when asked for."""

    def __init__(self, step: Step) -> None:
        self._step = step

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
        return Example(self._step.feeds(number), [self._step.targets[number]], self._step.mask(number))
