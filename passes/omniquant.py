"""OmniQuant: equivalent transforms and weight clips of each block, learned together.

rewrite:  that of let, and that of lwc on the weights it leaves, with one loss for both
needs:    calibration samples; torch; W constant and no embedding's table; a block that can be cut and differentiated
ensures:  no block is further from the float model's output, on the samples, than with the recipe's plain rounding;
          codes in the program equal the ones here; no node is added where let adds none
source:   OmniQuant, arXiv 2308.13137; the start from a search: llmc's practice with AWQ
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
class OmniQuant(LearnedPass):
    """Options, besides those of every learned pass:

    let_rate: learning rate of AdamW on the logarithms of scales
    lwc_rate: learning rate of AdamW on the logits of the clips
    start: what changes start from: a search, where no transform stands before this pass, or none
    norm: transform what norms feed
    v_o: transform between values and the attention's output projection
    up_down: transform between a feed-forward's up and down projections
    q_k: transform between queries and keys
    keep_codes: keep the codes of the learned clips; off: leave them to gptq or rtn
    """

    name: ClassVar[str] = "omniquant"
    preserves: ClassVar[Preserves] = "approximation"

    let_rate: float = 0.005
    lwc_rate: float = 0.01
    start: Literal["search", "none"] = "search"
    norm: bool = True
    v_o: bool = True
    up_down: bool = True
    q_k: bool = True
    keep_codes: bool = True

    def rates(self) -> Rates:
        from qcompile.block.joint import Rates

        return Rates(self.let_rate, self.lwc_rate)

    def kinds(self) -> Sequence[Kind]:
        return [kind for kind in KINDS if getattr(self, kind)]

    def codes(self) -> bool:
        return self.keep_codes
