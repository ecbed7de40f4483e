"""Shared by the transforms: gather a site's activations, and search one scale for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.calibration.objective import Objective, Region, cut_region
from qcompile.calibration.observers import ChannelRange, observe
from qcompile.calibration.samples import first_samples
from qcompile.graph.sites import Site, as_linear
from qcompile.pipeline import Context
from qcompile.quant.schemes import ActivationScheme

CHUNK_BYTES = 256 << 20  # activations held at a time
ROUNDS = 2  # of refinement
RANGE_TOKENS = 2048
LARGEST_LOG = 4.0  # a power scale stays within e^-4 .. e^4 of its mean: a channel hardly seen gets no extreme one


@dataclasses.dataclass(frozen=True)
class Found:
    """A site's transform: scale and shift of each channel, and the search behind them where there was one.

    ``parameter`` is what was searched or given (a threshold, an exponent); ``baseline`` the loss of leaving the
    site alone; ``curve`` all points (parameter, loss) that were tried.
    """

    scale: np.ndarray
    shift: np.ndarray
    parameter: float | None = None
    loss: float | None = None
    baseline: float | None = None
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    rule: str = ""  # the family of scales that won, where a pass tries several


def channel_ranges(ctx: Context, model: ir.Model, sites: Sequence[Site]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(lo, hi) of every channel of each site's tensor over ``RANGE_TOKENS`` tokens, in the producer's channels.

    A fold is an equivalence whatever the range, so a part of the samples will do here; static ranges are
    calibrated on all of them, after the fold.
    """
    found = {site.linears[0].x.name: ChannelRange() for site in sites}
    observe(
        ctx,
        model,
        {str(name): [collector] for name, collector in found.items()},
        _first_tokens(ctx, RANGE_TOKENS),
        "channel ranges",
    )
    return [_per_producer(site, found[site.linears[0].x.name]) for site in sites]


def _per_producer(site: Site, seen: ChannelRange) -> tuple[np.ndarray, np.ndarray]:
    assert seen.lo is not None and seen.hi is not None
    if site.expand is None:
        return seen.lo, seen.hi
    channels = int(site.expand.max()) + 1
    lo, hi = np.full(channels, np.inf, np.float32), np.full(channels, -np.inf, np.float32)
    np.minimum.at(lo, site.expand, seen.lo)
    np.maximum.at(hi, site.expand, seen.hi)
    return lo, hi


def objectives(
    ctx: Context, model: ir.Model, sites: Sequence[Site], tokens: int, plain: bool = False
) -> Iterator[tuple[Site, Objective]]:
    """Each site with its objective on the first samples, about ``tokens`` tokens; a chunk in memory at a time."""
    samples = _first_tokens(ctx, tokens)
    for chunk in _chunks(sites, tokens):
        regions = [cut_region(model, site) if site.kind == "norm" and not plain else None for site in chunk]
        names = [str(site.linears[0].x.name) for site in chunk]
        extra = [name for region in regions if region is not None for name in region.extra]
        runs = [
            (sample, {k: np.array(v) for k, v in values.items()})
            for sample, values in ctx.runner.stream(model, samples, names + extra, "searching")
        ]
        for site, name, region in zip(chunk, names, regions, strict=True):
            yield site, _objective(ctx, site, name, region, runs)


def _chunks(sites: Sequence[Site], tokens: int) -> Iterator[list[Site]]:
    chunk: list[Site] = []
    size = 0
    for site in sites:
        need = site.channels * tokens * 4
        if chunk and size + need > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(site)
        size += need
    if chunk:
        yield chunk


def _first_tokens(ctx: Context, tokens: int) -> list[object]:
    return list(first_samples(ctx.samples, tokens=tokens))


def _objective(
    ctx: Context, site: Site, name: str, region: Region | None, runs: list[tuple[object, dict[str, np.ndarray]]]
) -> Objective:
    """``name`` is what the linears' input was called when ``runs`` were made."""
    rule = ctx.recipe.for_linear(site.linears[0])
    x = [values[name] for _, values in runs]
    extra_names = region.extra if region is not None else []
    now = (as_linear(linear.node) for linear in site.linears)  # a fold of another site may have added a bias
    return Objective(
        linears=tuple(linear for linear in now if linear is not None),
        weights=rule.weights.model_copy(update={"clip": "minmax"})
        if rule is not None and rule.weights is not None
        else None,
        activations=_searched(ctx, rule.activations) if rule is not None else None,
        x=x,
        region=region,
        extra=[{n: values[n] for n in extra_names} for _, values in runs],
        masks=[_token_mask(sample, a) for (sample, _), a in zip(runs, x, strict=True)],
    )


def _searched(ctx: Context, scheme: ActivationScheme | None) -> ActivationScheme | None:
    """Under a gate, ranges for each token: where a static one then costs much, the gate gives one for each token.

    A scale that is searched to save a static range of a sink token spends the weights' precision on it in vain.
    """
    if ctx.max_drop is None or scheme is None or scheme.dynamic:
        return scheme
    return ActivationScheme(bits=scheme.bits, granularity="per_token", symmetric=scheme.symmetric)


def _token_mask(sample: object, value: np.ndarray) -> np.ndarray | None:
    mask: np.ndarray | None = getattr(sample, "mask", None)
    if mask is None or mask.all() or mask.size != int(np.prod(value.shape[:-1])):
        return None
    return mask.reshape(-1).astype(bool)


def power_scale(size: np.ndarray, weight: np.ndarray, exponent: float) -> np.ndarray:
    """s_j = size_j^a / |W_j|^(1 - a), geometric mean one; unused channels (no size, no weight) stay.

    SmoothQuant's form (arXiv 2211.10438, Eq. 4), with the root mean square of the row W_j. ``size`` is the largest
    magnitude where one range serves all tokens, and the root mean square of length-one tokens where each has its own.
    """
    used = (size > 0) & (weight > 0)
    logs = exponent * np.log(np.where(used, size, 1.0)) - (1 - exponent) * np.log(np.where(used, weight, 1.0))
    logs -= logs[used].mean() if used.any() else 0.0
    return np.where(used, np.exp(np.clip(logs, -LARGEST_LOG, LARGEST_LOG)), 1.0).astype(np.float32)


def threshold_grid(top: float, floor: float, points: int) -> np.ndarray:
    """Candidate thresholds, largest first, evenly spaced in their logarithm.

    The paper's linear grid spends all its points near the top where one outlier stretches the range.
    """
    return np.geomspace(top, floor, points) if top > floor else np.array([top])


Transform = Callable[[float], tuple[np.ndarray, np.ndarray]]  # parameter -> scale, shift
Loss = Callable[[float, np.ndarray, np.ndarray], float]


def search(candidates: Sequence[float], transform: Transform, loss: Loss, baseline: float) -> Found:
    """The candidate with the smallest loss (ties: the first); the identity stays when nothing beats ``baseline``."""
    return _best([(float(p), loss(p, *transform(p))) for p in candidates], transform, baseline)


def refine(found: Found, points: int, transform: Transform, loss: Loss) -> Found:
    """``found``, or better: ``points`` more candidates, evenly spaced in their logarithm, between the neighbours of
    the best one, ``ROUNDS`` times."""
    assert found.baseline is not None
    curve = list(found.curve)
    for _ in range(ROUNDS if points else 0):
        order = sorted(p for p, _ in curve)
        place = order.index(min(curve, key=_by_loss)[0])
        low, high = order[max(place - 1, 0)], order[min(place + 1, len(order) - 1)]
        if low < high and low > 0:
            between = np.geomspace(high, low, points + 2)[1:-1].tolist()
            curve += [(p, loss(p, *transform(p))) for p in between]
    return _best(curve, transform, found.baseline)


def _best(curve: list[tuple[float, float]], transform: Transform, baseline: float) -> Found:
    parameter, value = min(curve, key=_by_loss)
    scale, shift = transform(parameter)
    if not value < baseline:
        return Found(np.ones_like(scale), np.zeros_like(shift), parameter, baseline, baseline, sorted(curve))
    return Found(scale, shift, parameter, value, baseline, sorted(curve))


def _by_loss(tried: tuple[float, float]) -> float:
    return math.inf if math.isnan(tried[1]) else tried[1]
