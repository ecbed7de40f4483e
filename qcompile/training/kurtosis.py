"""The kurtosis of a token's features at the outputs of linears: a measure of outlier channels, and a regulariser.

    kurtosis(y) = mean_d (y - mean)^4 / (variance^2 + eps)        uniform 1.8, normal 3, one large channel ~ width
Each layer's figure is the mean over its sampled tokens, and the loss is the sum of them. In a model of many layers
they take turns, and those that are seen count for the others. No process waits for another: where gradients are
averaged over processes, so is the regulariser's.
Source: arXiv 2404.03605.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qcompile.errors import UserError

EPSILON = 1e-6
STRIDE, FEWEST, MOST = 16, 64, 4096  # one token of 16, but not fewer than 64 where there are, nor more than 4096
TURNS, IN_A_TURN = 8, 4  # layers take up to 8 turns, at least 4 of them at a time


def token_kurtosis(y: torch.Tensor) -> torch.Tensor:
    """The kurtosis over the last axis, in float32 or better."""
    found: torch.Tensor = _Kurtosis.apply(y if y.dtype == torch.float64 else y.float())  # type: ignore[no-untyped-call]
    return found


class _Kurtosis(torch.autograd.Function):
    """With d = y - mean, D = variance^2 + eps, k = mean(d^4) / D:

    dk/dy = 4 / (n D) (d^3 - mean(d^3) - k variance d)
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        centred = y - y.mean(dim=-1, keepdim=True)
        square = centred.square()
        variance = square.mean(dim=-1, keepdim=True)
        divisor = variance.square().add_(EPSILON)
        kurtosis = square.square().mean(dim=-1, keepdim=True) / divisor
        if ctx.needs_input_grad[0]:
            cube = square.mul_(centred)
            slope = cube.sub_(cube.mean(dim=-1, keepdim=True)).sub_(centred.mul_(kurtosis * variance))
            ctx.save_for_backward(slope.mul_(4 / (y.shape[-1] * divisor)))
        return kurtosis.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (slope,) = ctx.saved_tensors
        found: torch.Tensor = slope * grads[0].unsqueeze(-1)
        return found


class Meter:
    """Collects the kurtosis of one model's layers during a forward pass in training mode.

    strength: the factor on the loss; 0 collects nothing
    stride:   one token of so many is looked at, another one each time
    layers:   their names, in order
    A pass is open from the model's first hook to its last: what gradient checkpointing computes again in the
    backward pass takes the same way but is not counted twice.
    """

    def __init__(self, strength: float, stride: int = STRIDE, layers: Sequence[str] = ()) -> None:
        self.strength, self.stride = strength, stride
        self.turns = max(1, min(TURNS, len(layers) // IN_A_TURN))
        self._places = {name: place for place, name in enumerate(layers)}
        self.passes = 0
        self.is_open, self.is_included = False, False
        self.mask: torch.Tensor | None = None
        self.terms: dict[str, torch.Tensor] = {}

    def open(self, mask: torch.Tensor | None) -> None:
        """Begin a pass; ``mask`` (batch, sequence) is nonzero at tokens that count."""
        self.passes += 1
        self.is_open, self.is_included, self.terms = True, False, {}
        self.mask = None if mask is None or mask.ndim != 2 else mask.flatten() != 0

    def observe(self, name: str, y: torch.Tensor) -> None:
        """Take in the output ``y`` (..., features) of the layer ``name``."""
        if not self.strength or (self.passes + self._places.get(name, 0)) % self.turns:
            return
        if self.is_open and not torch.is_grad_enabled():
            raise UserError(
                "the kurtosis of a layer cannot be trained: its output is computed without gradients",
                where=name,
                hint="use gradient checkpointing with use_reentrant=False, or leave the layer out with sites=",
            )
        with torch.autocast(y.device.type, enabled=False):
            term = self._mean(y)
        if self.is_open and term is not None:
            self.terms[name] = self.terms[name] + term if name in self.terms else term

    def _mean(self, y: torch.Tensor) -> torch.Tensor | None:
        rows = y.reshape(-1, y.shape[-1])
        step = self._step(len(rows))
        first = (self.passes // self.turns) % step
        counts = None if self.mask is None or len(self.mask) != len(rows) else self.mask[first::step]
        rows = rows[first::step]
        if not len(rows):
            return None
        found = token_kurtosis(rows)
        if counts is None:
            return found.mean()
        return torch.where(counts, found, 0).sum() / counts.sum().clamp(min=1)

    def _step(self, tokens: int) -> int:
        return max(1, min(self.stride, tokens // FEWEST), -(-tokens // MOST))

    def total(self) -> torch.Tensor | None:
        """strength times the sum over layers, as the last pass has it; None where nothing was seen."""
        if not self.terms:
            return None
        home = next(iter(self.terms.values())).device
        return self.strength * self.turns * torch.stack([term.to(home) for term in self.terms.values()]).sum()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"is_open": False, "is_included": False, "mask": None, "terms": {}}
