"""Outliers: where a model's activations are hard to quantise, why, and what each place needs.

rewrite:  none
needs:    calibration samples
ensures:  the graph is untouched; memory does not grow with the number of samples; padding is never counted;
          for every input of a linear: statistics of channels and tokens, what quantisers lose, and a verdict
source:   arXiv 2304.09145 (asymmetric channels), 2208.07339 section 4 (outlier features), 2209.13325 (gamma)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.statistics import (
    ChannelStatistics,
    QuantizerLoss,
    TokenStatistics,
    jaccard,
    real_sequences,
)
from qcompile.calibration.verdict import FINE, Figures, figures, needs
from qcompile.graph.edits import constant_array
from qcompile.graph.sites import Site, describe, find_linears, find_sites
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range

RATIO = 4.0  # a channel this many times the median channel is an outlier
LAYER_SHARE, POSITION_SHARE = 0.25, 0.06  # an outlier feature's layers and positions (LLM.int8, section 4)


@dataclasses.dataclass(frozen=True)
class Outliers(Pass):
    """Options:

    top: channels and tokens to name at each place
    loss_samples: samples that quantisers are tried on
    threshold: an activation of this size is an outlier (LLM.int8)
    """

    name: ClassVar[str] = "outliers"
    preserves: ClassVar[Preserves] = "analysis"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)

    top: int = 8
    loss_samples: int = 2
    threshold: float = 6.0

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "top", "loss_samples")
        check_range(self, 0, math.inf, "threshold")

    def run(self, model: ir.Model, ctx: Context) -> int:
        watched = _watched(model, self)
        if not watched:
            ctx.ledger.note("no linear with a constant weight was found, so there is nothing to look at")
            return 0
        self._stream(model, ctx, watched)
        seen = [one for one in watched if one.channels.tokens]
        self._losses(model, ctx, seen)
        facts = ctx.ledger.current.facts
        facts["outliers"] = {"sites": {one.label: _summary(one, self.top) for one in seen}}
        facts["outliers"] |= _across_layers([one for one in seen if one.kind == "norm"], self.top)
        facts["channel_ranges"] = {
            one.label: {"before": [one.channels.lo.tolist(), one.channels.hi.tolist()]} for one in seen
        }
        for one in seen:
            ctx.ledger.record(one.label, **_row(one))
        for text in _notes(facts["outliers"]):
            ctx.ledger.note(text)
        return 0

    def _stream(self, model: ir.Model, ctx: Context, watched: list[_Watched]) -> None:
        names = [one.value for one in watched]
        for sample, values in ctx.runner.stream(model, ctx.samples, names, "looking for outliers"):
            for one in watched:
                for sequence in real_sequences(values[one.value], sample):
                    one.channels.update(sequence.rows)
                    one.tokens.update(sequence)

    def _losses(self, model: ir.Model, ctx: Context, seen: list[_Watched]) -> None:
        """A second, short run: static quantisers need the ranges first."""
        some = [sample for _, sample in zip(range(self.loss_samples), ctx.samples, strict=False)]
        for one in seen:
            one.loss = QuantizerLoss(one.channels.lo, one.channels.hi)
        names = [one.value for one in seen]
        for sample, values in ctx.runner.stream(model, some, names, "trying quantisers"):
            for one in seen:
                for sequence in real_sequences(values[one.value], sample):
                    assert one.loss is not None
                    one.loss.update(sequence)


@dataclasses.dataclass
class _Watched:
    """One tensor under observation. ``obstacle``: why no transform folds into its producer."""

    value: str
    label: str
    kind: str
    obstacle: str
    gamma: np.ndarray | None
    channels: ChannelStatistics
    tokens: TokenStatistics
    loss: QuantizerLoss | None = None

    @property
    def shiftable(self) -> bool:
        return self.kind in ("norm", "v_o")


def _watched(model: ir.Model, options: Outliers) -> list[_Watched]:
    """The tensors of all sites, then the inputs of linears that are in none; each once, in graph order."""
    found: dict[str, _Watched] = {}

    def watch(value: ir.Value, label: str, kind: str, obstacle: str, gamma: np.ndarray | None) -> None:
        name = str(value.name)
        channels, tokens = ChannelStatistics(options.top, options.threshold), TokenStatistics(options.top)
        found.setdefault(name, _Watched(name, label, kind, obstacle, gamma, channels, tokens))

    for site in find_sites(model):
        if site.kind != "q_k":  # scores are products of activations: no linear reads them
            watch(site.linears[0].x, describe(site), site.kind, site.reason, _gamma(site))
    for linear in find_linears(model.graph):
        watch(linear.x, f"linear:{linear.name}", "linear", "its producer is no place for a transform", None)
    return list(found.values())


def _gamma(site: Site) -> np.ndarray | None:
    return constant_array(site.producer.inputs[1]) if site.kind == "norm" else None


def _row(one: _Watched) -> dict[str, Any]:
    """The site's line in the table of ``analyze``."""
    found = figures(one.channels, one.tokens)
    assert one.loss is not None
    lost = one.loss.token_sqnr()
    largest = one.tokens.largest[0]
    return {
        "needs": _verdict(one, found),
        "range": found.range,
        "ordinary_range": found.ordinary,
        "spread": found.spread,
        "shift_gain": found.shift_gain,
        "first_token": found.first_token,
        "few_tokens": found.few_tokens,
        "largest": f"{largest.value:.4g} in channel {largest.channel}"
        + (f" at token {largest.position}" if largest.position >= 0 else ""),
        "db_per_tensor": lost["per_tensor_8"],
        "db_per_token": lost["per_token_8"],
    }


def _verdict(one: _Watched, found: Figures) -> str:
    return " + ".join(needs(found, one.shiftable, one.obstacle)) or FINE


def _summary(one: _Watched, top: int) -> dict[str, Any]:
    """Everything known of one tensor, its channels and tokens cut to the ``top`` largest."""
    found, channels = figures(one.channels, one.tokens), one.channels
    assert one.loss is not None
    return {
        "kind": one.kind,
        "needs": needs(found, one.shiftable, one.obstacle),
        "obstacle": one.obstacle,
        **dataclasses.asdict(found),
        "channels_seen": int(channels.lo.size),
        "tokens_seen": channels.tokens,
        "kurtosis": channels.kurtosis,
        "energy_of_top_channels": channels.energy_share(),
        "steadiness": channels.steadiness,
        "outlier_channels": int((_ratios(channels) >= RATIO).sum()),
        "sqnr_db": one.loss.sqnr(),
        "token_sqnr_db": one.loss.token_sqnr(),
        "top_channels": _top_channels(one, top),
        "top_tokens": [
            {"value": t.value, "channel": t.channel, "position": t.position if t.position >= 0 else None,
             "sequence": t.sequence, "id": t.id}
            for t in one.tokens.largest
        ],
        **(_of_gamma(channels, one.gamma) if one.gamma is not None else {}),
    }  # fmt: skip


def _ratios(channels: ChannelStatistics) -> np.ndarray:
    return channels.absmax / max(float(np.median(channels.absmax)), 1e-12)


def _top_channels(one: _Watched, top: int) -> list[dict[str, Any]]:
    """The channels of largest magnitude; ``first_token_only``: ordinary tokens stay below a quarter of it."""
    channels, ordinary = one.channels, one.tokens.ordinary
    assert ordinary.lo is not None and ordinary.hi is not None
    ratios = _ratios(channels)
    rows = []
    for rank, j in enumerate(np.argsort(-channels.absmax, kind="stable")[:top].tolist()):
        lo, hi = float(channels.lo[j]), float(channels.hi[j])
        rows.append({
            "channel": j, "rank": rank, "lo": lo, "hi": hi, "ordinary_lo": float(ordinary.lo[j]),
            "ordinary_hi": float(ordinary.hi[j]),
            "first_token_only": bool(RATIO * ordinary.absmax[j] <= channels.absmax[j]),
            "mean": float(channels.mean[j]), "std": float(channels.std[j]), "centre": (lo + hi) / 2,
            "half_range": (hi - lo) / 2, "asymmetry": float(channels.asymmetry[j]),
            "sign_consistency": float(channels.sign_consistency[j]), "ratio": float(ratios[j]),
            "sequences": float(channels.hits[j] / channels.sequences),
        })  # fmt: skip
    return rows


def _of_gamma(channels: ChannelStatistics, gamma: np.ndarray) -> dict[str, Any]:
    """How far the norm's own gain makes the outliers: correlation with it, and the reach without it."""
    size = np.abs(np.asarray(gamma, np.float64)).reshape(-1)
    if size.size != channels.absmax.size or not size.std() or not channels.absmax.std():
        return {}
    usable = size > 1e-3 * np.median(size)
    return {
        "gamma_correlation": float(np.corrcoef(size, channels.absmax)[0, 1]),
        "absmax_without_gamma": float((channels.absmax[usable] / size[usable]).max()),
    }


def _across_layers(norms: list[_Watched], top: int) -> dict[str, Any]:
    """Which channels of the hidden axis are outliers in layer after layer."""
    width = max((one.channels.lo.size for one in norms), default=0)
    norms = [one for one in norms if one.channels.lo.size == width]
    if not norms:
        return {"persistent": [], "features": [], "layer_jaccard": None}
    largest = [frozenset(np.argsort(-one.channels.absmax, kind="stable")[:top].tolist()) for one in norms]
    overlaps = [jaccard(a, b) for a, b in itertools.pairwise(largest)]
    outliers = np.mean([_ratios(one.channels) >= RATIO for one in norms], axis=0)
    steady = np.flatnonzero(outliers >= LAYER_SHARE)
    return {
        "layer_jaccard": float(np.mean(overlaps)) if overlaps else None,
        "persistent": [
            _persistent(int(j), float(outliers[j]), norms)
            for j in sorted(steady, key=lambda j: (-outliers[j], j))[: 4 * top]
        ],
        "features": _features(norms),
    }


def _persistent(channel: int, share: float, norms: list[_Watched]) -> dict[str, Any]:
    asymmetry = [float(one.channels.asymmetry[channel]) for one in norms]
    return {"channel": channel, "share_of_layers": share, "asymmetry": float(np.median(asymmetry))}


def _features(norms: list[_Watched]) -> list[dict[str, Any]]:
    """LLM.int8's rule: beyond the threshold in enough layers, and there at enough positions."""
    large = np.stack([one.channels.large / one.channels.tokens for one in norms])
    layers = (large > 0).mean(axis=0)
    positions = large.sum(axis=0) / np.maximum((large > 0).sum(axis=0), 1)
    found = np.flatnonzero((layers >= LAYER_SHARE) & (positions >= POSITION_SHARE))
    return [
        {"channel": int(j), "share_of_layers": float(layers[j]), "share_of_positions": float(positions[j])}
        for j in found
    ]


def _notes(found: dict[str, Any]) -> list[str]:
    """What holds for the model as a whole, in words."""
    notes = []
    if found["persistent"]:
        shown = [f"{c['channel']} ({c['share_of_layers']:.0%})" for c in found["persistent"][:8]]
        notes.append(f"channels that are outliers in a quarter of the norms or more: {', '.join(shown)}")
    if found["features"]:
        shown = [str(c["channel"]) for c in found["features"][:8]]
        notes.append(f"outlier features by LLM.int8's rule: channels {', '.join(shown)}")
    for sink, words in (("first token", "the first token"), ("few tokens", "a few tokens")):
        count = sum(1 for site in found["sites"].values() if site["sink"] == sink)
        if count:
            notes.append(f"tensors that owe most of their range to {words}: {count}")
    return notes
