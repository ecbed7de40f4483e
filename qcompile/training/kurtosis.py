"""The kurtosis of a token's features at the outputs of linears: a measure of outlier channels, and a regulariser.

    kurtosis(y) = mean_d (y - mean)^4 / (variance^2 + eps)        uniform 1.8, normal 3, one large channel ~ width
Each layer's figure is the mean over its sampled tokens, and the loss is the sum of them. No process waits for
another: where gradients are averaged over processes, so is the regulariser's.
Source: arXiv 2404.03605.
"""

from __future__ import annotations

from typing import Any

import torch

from qcompile.errors import UserError

EPSILON = 1e-6
STRIDE, FEWEST, MOST = 16, 64, 4096  # one token of 16, but not fewer than 64 where there are, nor more than 4096


def token_kurtosis(y: torch.Tensor) -> torch.Tensor:
    """The kurtosis over the last axis, in float32 or better."""
    y = y if y.dtype == torch.float64 else y.float()
    square = (y - y.mean(dim=-1, keepdim=True)).square()
    variance = square.mean(dim=-1)
    return square.square().mean(dim=-1) / (variance.square() + EPSILON)


class Meter:
    """Collects the kurtosis of one model's layers during a forward pass in training mode.

    strength: the factor on the loss; 0 collects nothing
    stride:   one token of so many is looked at, another one each time
    A pass is open from the model's first hook to its last: what gradient checkpointing computes again in the
    backward pass takes the same way but is not counted twice.
    """

    def __init__(self, strength: float, stride: int = STRIDE) -> None:
        self.strength, self.stride = strength, stride
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
        if not self.strength:
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
        first = self.passes % step
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
        """strength times the sum over layers of the pass that was last; None where nothing was seen."""
        if not self.terms:
            return None
        home = next(iter(self.terms.values())).device
        return self.strength * torch.stack([term.to(home) for term in self.terms.values()]).sum()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"is_open": False, "is_included": False, "mask": None, "terms": {}}
