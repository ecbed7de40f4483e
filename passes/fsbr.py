"""FSBR, I-LLM's fully smooth block reconstruction: omniquant's transforms and clips, and a pair inside SwiGLU.

rewrite:  that of omniquant; with act_smooth also
          silu(g) * u  ->  (g s) sigmoid((g s) / s) * (u / s), g s and u / s the columns of projections
needs:    that of omniquant; act_smooth: a SwiGLU whose two projections give its factors directly
ensures:  no block is further from the float model's output, on the samples, than with the recipe's plain rounding;
          act_smooth adds two nodes to a block, and is measured with the factors of SwiGLU at 8 bits per token, as an
          integer-only program has them: no recipe here rounds them, so that by itself it gains nothing
source:   I-LLM, arXiv 2405.17849, section 3.2
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
class Fsbr(LearnedPass):
    """Options, besides those of every learned pass:

    let_rate: learning rate of AdamW on the logarithms of scales
    lwc_rate: learning rate of AdamW on the logits of the clips
    start: what changes start from: a search, where no transform stands before this pass, or none
    act_smooth: move scales from SwiGLU's gate to its other factor as well
    """

    name: ClassVar[str] = "fsbr"
    preserves: ClassVar[Preserves] = "approximation"

    epochs: int = 10
    let_rate: float = 0.005
    lwc_rate: float = 0.01
    start: Literal["search", "none"] = "search"
    act_smooth: bool = False

    def rates(self) -> Rates:
        from qcompile.block.joint import Rates

        return Rates(self.let_rate, self.lwc_rate)

    def kinds(self) -> Sequence[Kind]:
        return KINDS

    def codes(self) -> bool:
        return True

    def smooths(self) -> bool:
        return self.act_smooth
