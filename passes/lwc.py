"""Learnable weight clipping: block by block, the clips that bring the block's output nearest to the float model's.

rewrite:  linear(x, W, b)  ->  linear(x, V, b), V the values of codes that quantise then writes as they are
          ends of a column's or group's range: 1.25 sigmoid(u) max W, 1.25 sigmoid(l) min W, u and l learned by AdamW on
          |block_quantised(x) - block_float(x_float)|^2, x what the blocks before it make that are done
needs:    calibration samples; torch; W constant and no embedding's table; a block that can be cut and differentiated
ensures:  no block is further from the float model's output, on the samples, than with the recipe's plain rounding;
          codes in the program equal the ones here
source:   OmniQuant, arXiv 2308.13137, equation 2
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from qcompile.block.learned import LearnedPass
from qcompile.ledger import Preserves

if TYPE_CHECKING:
    from qcompile.block.joint import Rates


@dataclasses.dataclass(frozen=True)
class Lwc(LearnedPass):
    """Options, besides those of every learned pass:

    rate: learning rate of AdamW on the logits of the clips
    """

    name: ClassVar[str] = "lwc"
    preserves: ClassVar[Preserves] = "approximation"

    rate: float = 0.01

    def rates(self) -> Rates:
        from qcompile.block.joint import Rates

        return Rates(0, self.rate)

    def codes(self) -> bool:
        return True
