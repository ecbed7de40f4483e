"""Equivalent changes of a block that are learned: a shift and a scale of each channel before it is quantised.

    x~ = (x - z) / s before the quantiser;  W' = diag(s) W,  b' = b + z W in what reads it

is how every fold looks in the middle (OmniQuant, arXiv 2308.13137, equation 3): the producer's side, a norm's gain or
the columns of a projection, changes no rounding, since each column has a scale of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qcompile.block.quantisers import fake_quantize, fake_quantize_per_token
from qcompile.graph.gates import FACTOR
from qcompile.quant.schemes import ActivationScheme


class Change(torch.nn.Module):
    """s = exp(t) and z = unit * p of each channel; t and p start at zero, where the change is none.

    ties: (C,), channels that share a number share their scale
    unit: (C,), what a shift is measured in; None: no shift
    """

    group: Tensor
    unit: Tensor
    steps: torch.nn.Parameter | None

    def __init__(self, ties: np.ndarray, unit: np.ndarray | None) -> None:
        super().__init__()
        _, group = np.unique(ties, return_inverse=True)
        self.register_buffer("group", torch.from_numpy(group.reshape(-1)))
        self.logs = torch.nn.Parameter(torch.zeros(int(group.max()) + 1))
        self.steps = None if unit is None else torch.nn.Parameter(torch.zeros(len(unit)))
        self.register_buffer("unit", torch.zeros(0) if unit is None else torch.from_numpy(np.float32(unit)))

    def scale(self) -> Tensor:
        """(C,), positive."""
        return self.logs[self.group].exp()

    def shift(self) -> Tensor | None:
        """(C,)."""
        return None if self.steps is None else self.steps * self.unit


class Reader:
    """``change`` as one reader meets it: its channel i is the change's ``expand[i]``; None: i. ``inverse``: 1 / s."""

    def __init__(self, change: Change, expand: np.ndarray | None, inverse: bool = False) -> None:
        self.change = change
        self._expand = None if expand is None else torch.from_numpy(expand)
        self._inverse = inverse

    def scale(self) -> Tensor:
        found = self._rows(self.change.scale())
        return 1 / found if self._inverse else found

    def shift(self) -> Tensor | None:
        found = self.change.shift()
        return None if found is None else self._rows(found)

    def _rows(self, channels: Tensor) -> Tensor:
        return channels if self._expand is None else channels[self._expand.to(channels.device)]


class Input(torch.nn.Module):
    """What linears read: changed, then quantised.

    ends: (lo, hi) of a static range, one number or (C,), as it is before the change; reach: (lo, hi), each (C,), of
    the values then
    """

    def __init__(
        self,
        reader: Reader | None,
        scheme: ActivationScheme | None,
        ends: tuple[np.ndarray, np.ndarray] | None = None,
        reach: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self._reader, self._scheme = reader, scheme
        self.change = None if reader is None else reader.change
        self._ends = None if ends is None else [torch.from_numpy(np.asarray(end, np.float32)) for end in ends]
        self._reach = None if reach is None else [torch.from_numpy(np.asarray(end, np.float32)) for end in reach]

    def forward(self, x: Tensor) -> Tensor:
        scheme = self._scheme
        if self._reader is not None:
            x = self._changed(x)
        if scheme is None:
            return x
        if scheme.dynamic:
            return fake_quantize_per_token(x, scheme.bits, scheme.symmetric)
        lo, hi = self._range(x.device)
        return fake_quantize(x, lo, hi, scheme.bits, scheme.symmetric)

    def _range(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The static range after the change: what its ends were of the reach of all channels, they are again."""
        assert self._ends is not None
        lo, hi = (end.to(device) for end in self._ends)
        if self._reader is None:
            return lo, hi
        if lo.ndim:  # a range for each channel
            return self._changed(lo), self._changed(hi)
        assert self._reach is not None
        low, high = (end.to(device) for end in self._reach)
        return _share(lo, low.min()) * self._changed(low).min(), _share(hi, high.max()) * self._changed(high).max()

    def _changed(self, x: Tensor) -> Tensor:
        assert self._reader is not None
        shift = self._reader.shift()
        return (x if shift is None else x - shift) / self._reader.scale()


def _share(end: Tensor, reach: Tensor) -> Tensor:
    return torch.where(reach == 0, torch.ones_like(end), end / reach)


class AndBack(torch.nn.Module):
    """A factor of SwiGLU: changed, quantised and changed back."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self._reader, self._input = reader, Input(reader, FACTOR)

    def forward(self, x: Tensor) -> Tensor:
        back: Tensor = self._input(x) * self._reader.scale()
        return back


class Heads(torch.nn.Module):
    """``inner`` on the heads (B, H, S, d) of an attention's operand, seen as channels (B, S, H * d)."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        flat: Tensor = self.inner(x.transpose(1, 2).reshape(batch, length, heads * width))
        return flat.reshape(batch, length, heads, width).transpose(1, 2)


class Meter(torch.nn.Module):
    """What passes, over the tokens of ``mask``: each channel's reach, mean square, and that of tokens of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: np.ndarray | None = None
        self._lo: Tensor | None = None
        self._hi: Tensor | None = None
        self._square: Tensor | None = None
        self._energy: Tensor | None = None
        self._count = 0

    def forward(self, x: Tensor) -> Tensor:
        fits = self.mask is not None and tuple(x.shape[:2]) == self.mask.shape
        rows = x[torch.from_numpy(np.array(self.mask)).to(x.device)] if fits else x.reshape(-1, x.shape[-1])
        squares = rows.double().square()
        energy = (squares / squares.sum(1, keepdim=True).clamp(min=1e-30)).sum(0)
        lo, hi, square = rows.amin(0), rows.amax(0), squares.sum(0)
        self._lo = lo if self._lo is None else torch.minimum(lo, self._lo)
        self._hi = hi if self._hi is None else torch.maximum(hi, self._hi)
        self._square = square if self._square is None else self._square + square
        self._energy = energy if self._energy is None else self._energy + energy
        self._count += len(rows)
        return x

    @property
    def reach(self) -> tuple[np.ndarray, np.ndarray]:
        """(lo, hi) of each channel."""
        assert self._lo is not None and self._hi is not None
        return self._lo.cpu().numpy(), self._hi.cpu().numpy()

    @property
    def size(self) -> np.ndarray:
        """Root mean square of each channel."""
        assert self._square is not None
        return np.sqrt(self._square.cpu().numpy() / max(self._count, 1)).astype(np.float32)

    @property
    def energy(self) -> np.ndarray:
        """Mean square of each channel of tokens of length one, as ``calibration.ranges.ChannelEnergy``."""
        assert self._energy is not None
        return (self._energy.cpu().numpy() / max(self._count, 1)).astype(np.float32)
