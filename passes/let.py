"""Learnable equivalent transforms: block by block, the scales and shifts that make its rounding cost least.

rewrite:  linear(norm(x), W, b)  ->  linear((norm(x) - z) / s, W * s, b + W @ z), folded; so between values and the
          attention's output, up and down projections, and queries and keys (channels that rotary embeddings mix, and
          query heads of one key head, share s)
          log s and z learned by AdamW on |block_quantised(x) - block_float(x_float)|^2, x what the blocks before it
          make that are done; a transform before this pass (os_plus, awq) is where it starts
needs:    calibration samples; torch; a block that can be cut and differentiated
ensures:  equal to 1e-5; no block is further from the float model's output, on the samples, than it was
source:   OmniQuant, arXiv 2308.13137, equations 3 and 5
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from qcompile.block.learned import KINDS, LearnedPass
from qcompile.graph.sites import Kind
from qcompile.ledger import Preserves

if TYPE_CHECKING:
    from qcompile.block.joint import Rates


@dataclasses.dataclass(frozen=True)
class Let(LearnedPass):
    """Options, besides those of every learned pass:

    rate: learning rate of AdamW on the logarithms of scales
    start: what changes start from: a search, where no transform stands before this pass, or none
    norm: transform what norms feed
    v_o: transform between values and the attention's output projection
    up_down: transform between a feed-forward's up and down projections
    q_k: transform between queries and keys
    """

    name: ClassVar[str] = "let"
    preserves: ClassVar[Preserves] = "function"

    rate: float = 0.005
    start: Literal["search", "none"] = "search"
    norm: bool = True
    v_o: bool = True
    up_down: bool = True
    q_k: bool = True

    def rates(self) -> Rates:
        from qcompile.block.joint import Rates

        return Rates(self.rate, 0)

    def kinds(self) -> Sequence[Kind]:
        return [kind for kind in KINDS if getattr(self, kind)]
