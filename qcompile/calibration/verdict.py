"""What one activation needs before it can be held in few bits, from the figures of the outlier analysis."""

from __future__ import annotations

import dataclasses

import numpy as np

from qcompile.calibration.statistics import TINY, ChannelStatistics, TokenStatistics

SINK_SHARE = 0.6  # of the range: more than this owed to few tokens is theirs, not the channels'
SPREAD = 4.0  # range over the median channel's: at 4 that channel lacks two of the bits
SHIFT_GAIN = 1.25  # a smaller gain is not worth a shift

FINE = "per tensor"


@dataclasses.dataclass(frozen=True)
class Figures:
    """Ranges of one tensor, and how they come about.

    range:       hi - lo of the quantiser, which holds zero
    ordinary:    the same without the tokens that own it, where few do (``sink``: which; else empty)
    shift_gain:  ordinary range over the range of the widest channel: what centring every channel gains
    spread:      ordinary range over the median channel's
    first_token, few_tokens: the share of the range that only first tokens, or 1 % of the tokens, need
    """

    range: float
    ordinary: float
    sink: str
    shift_gain: float
    spread: float
    first_token: float
    few_tokens: float


def figures(channels: ChannelStatistics, tokens: TokenStatistics) -> Figures:
    """The figures of one tensor."""
    first, few = tokens.share_of_first(), tokens.share_of_few()
    sink = "first token" if first >= SINK_SHARE else "few tokens" if few >= SINK_SHARE else ""
    kept = tokens.ordinary if first >= SINK_SHARE else channels
    assert kept.lo is not None and kept.hi is not None
    width = np.asarray(kept.hi - kept.lo, np.float64)
    whole = max(float(channels.hi.max()), 0.0) - min(float(channels.lo.min()), 0.0)
    ordinary = whole * (1 - (first if sink == "first token" else few if sink else 0.0))
    return Figures(
        range=whole,
        ordinary=ordinary,
        sink=sink,
        shift_gain=ordinary / max(min(float(width.max()), ordinary), TINY),
        spread=ordinary / max(float(np.median(width)), TINY),
        first_token=first,
        few_tokens=few,
    )


def needs(found: Figures, shiftable: bool, obstacle: str) -> list[str]:
    """What the tensor needs; empty when one static scale for it all is fine.

    ``shiftable``: its producer can carry a shift; ``obstacle``: why no transform can be folded into its
    producer, empty when one can.
    """
    wanted = [f"per token ({found.sink})"] if found.sink else []
    if found.spread <= SPREAD:
        return wanted
    if obstacle:
        return [*wanted, "higher precision"]
    gain = found.shift_gain if shiftable and found.shift_gain >= SHIFT_GAIN else 1.0
    if gain > 1:
        wanted.append("shift")
    if found.spread / gain > SPREAD:
        wanted.append("scale")
    return wanted
