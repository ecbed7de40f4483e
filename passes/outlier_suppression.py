"""Outlier Suppression: move a norm's gain out of the norm, so that it no longer magnifies the outliers.

rewrite:  linear(norm(x; gamma, beta), W, b)  ->  linear(norm(x; 1, beta / gamma), W * gamma, b)
          a reader that is no linear gets norm(x) * gamma
needs:    gamma constant; W constant
ensures:  equal to 1e-5; a channel whose gamma is almost zero keeps it (beta / gamma explodes)
source:   arXiv 2209.13325, section 4.1; its token-wise clipping is ``quantise``'s observer ``token_wise``
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.search import Found
from qcompile.calibration.transform import Ranges, Transform
from qcompile.graph.edits import constant_array
from qcompile.graph.sites import Site
from qcompile.pipeline import Context, check_range


@dataclasses.dataclass(frozen=True)
class OutlierSuppression(Transform):
    """Options:

    floor: a channel whose gain is less, as a share of the median gain, keeps it
    """

    name: ClassVar[str] = "outlier_suppression"
    parameter: ClassVar[str] = "gain"

    floor: float = 0.01

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "floor")

    def choose(
        self, model: ir.Model, ctx: Context, sites: Sequence[Site], ranges: Sequence[Ranges]
    ) -> Iterator[tuple[Site, Found]]:
        for site in sites:
            scale = self._gain(site)
            kept = int((scale == 1).sum())
            if kept:
                ctx.ledger.note(f"{site.name}: {kept} of {scale.size} channels keep their gain")
            yield site, Found(scale, np.zeros_like(scale))

    def _gain(self, site: Site) -> np.ndarray:
        gamma = constant_array(site.producer.inputs[1])
        assert gamma is not None
        gamma = np.broadcast_to(gamma.reshape(-1), (site.channels,)).astype(np.float32)
        size = np.abs(gamma)
        moved = size >= max(self.floor * float(np.median(size)), np.finfo(np.float32).tiny)
        return np.asarray(np.where(moved, gamma, 1), np.float32)
