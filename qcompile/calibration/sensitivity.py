"""Sensitivity that acts: choose the clip on the model's output, and spend precision where it holds the gate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qcompile.calibration.draft import SWITCHES, Choice, Draft, Steps
from qcompile.calibration.metric import Measured, Metric
from qcompile.calibration.runner import Run
from qcompile.calibration.samples import Sample, first_samples, shortened
from qcompile.pipeline import Context
from qcompile.progress import track
from qcompile.quant.schemes import ActivationScheme

# Token quantiles to try, largest first: in short texts one token in ten is special (arXiv 2209.13325, section 4.2).
# Every other one until they get worse, then the neighbours of the best one.
ALPHAS = (1.0, 0.998, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
ALPHAS_8_BIT = (1.0, 0.99)  # 256 levels leave little to gain but what a few sink tokens take
STRIDE = 2
RANKING_TOKENS = 64
ALPHA_TOKENS = 512
Step = tuple[str, ActivationScheme | None]
PATIENCE = 2  # stop after so many worse quantiles in a row


def choose_alpha(ctx: Context, draft: Draft, choice: Choice, count: int, causal: bool | None = None) -> float:
    """The token quantile, one for all activations, with the smallest error of the model's first output.

    Causal language models: the divergence of their predictions, where a sink token counts like any other; its logits
    would own a squared error. Others: the squared error. ``causal``: which it is; found by trying when it is None.
    """
    schemes = [s for s in choice.activations.values() if not s.dynamic and s.observer == "token_wise"]
    if not schemes:
        return 1.0
    samples = list(first_samples(ctx.samples, count=count, tokens=ALPHA_TOKENS))
    metric = Metric(ctx, draft.model, samples, causal)

    def error(alpha: float) -> float:
        trial = draft.build(choice, alpha)
        return float(np.mean(metric.measure(trial).divergences)) if metric.is_perplexity else metric.squares(trial)

    found = _descend(error, *((ALPHAS, STRIDE) if min(s.bits for s in schemes) < 8 else (ALPHAS_8_BIT, 1)))
    ctx.ledger.current.facts["alpha_search"] = [[alpha, found[alpha]] for alpha in sorted(found, reverse=True)]
    return min(found, key=lambda alpha: (found[alpha], -alpha))


def _descend(error: Callable[[float], float], grid: Sequence[float], stride: int) -> dict[float, float]:
    """Errors of the points tried: each ``stride``-th until ``PATIENCE`` in a row are worse, then those around the best.

    A point that is NaN counts as infinitely bad.
    """
    found: dict[float, float] = {}
    best = worse = 0
    for place in range(0, len(grid), stride):
        found[grid[place]] = _worst(error(grid[place]))
        if found[grid[place]] < found[grid[best]]:
            best, worse = place, 0
        else:
            worse += place > 0
        if worse >= PATIENCE:
            break
    for place in range(max(best - stride + 1, 0), min(best + stride, len(grid))):
        if grid[place] not in found:
            found[grid[place]] = _worst(error(grid[place]))
    return found


# --------------------------------------------------------------------------- the gate


@dataclasses.dataclass(frozen=True)
class Ranking:
    """``damage``: what each activation's own scheme adds to the divergence when all others are one step up, by name,
    the largest first; ``rest``: the divergence with all of them one step up."""

    damage: dict[str, float]
    rest: float


def rank(ctx: Context, draft: Draft, metric: Metric, samples: Iterable[Sample]) -> Ranking:
    """Measures every quantised activation by itself on the whole model's output."""
    steps = _ladder(draft)
    moved = _movable(steps).keys()
    near = [shortened(draft.model, sample, RANKING_TOKENS) for sample in first_samples(samples, tokens=RANKING_TOKENS)]
    close = Metric(ctx, draft.model, near, metric.is_perplexity)

    def divergence(run: Run) -> float:
        return float(np.mean(close.measure_run(run).divergences))

    with _opened(ctx, draft, steps, 1.0, metric.output) as switched:
        rest = divergence(switched(moved))
        apart = {name: divergence(switched(moved ^ {name})) for name in track(list(steps), "ranking")}
    # without a step up, what is set apart is the activation as a float: the model gets better by it
    damage = {name: _worst(value - rest if name in moved else rest - value) for name, value in apart.items()}
    return Ranking(dict(sorted(damage.items(), key=lambda item: (-item[1], item[0]))), rest)


def likely_exceptions(draft: Draft, ranking: Ranking, max_drop: float) -> dict[str, ActivationScheme]:
    """The fewest activations to move up a step such that the damages of the others add up to ``max_drop`` at most."""
    steps = _movable(_ladder(draft))
    order = [name for name in ranking.damage if name in steps]
    total, kept = ranking.rest, 0
    for name in reversed(order):
        total += ranking.damage[name]
        if total > max_drop:
            break
        kept += 1
    return {name: steps[name] for name in order[: len(order) - kept]}


def hold_gate(
    ctx: Context, draft: Draft, ranking: Ranking, metric: Metric, alpha: float, max_drop: float
) -> Choice:
    """The choice with the fewest activations in higher precision whose cautious drop is at most ``max_drop``.

    Activations move in the order of the damage that their own scheme does, one step up the ladder; when all of them
    there do not hold it, on to float. The count is found by bisection on the whole model's metric.
    """
    readers = draft.readers()
    steps = _movable(_ladder(draft))
    order: list[Step] = [(name, steps[name]) for name in ranking.damage if name in steps]
    with _opened(ctx, draft, steps, alpha, metric.output) as switched:
        trials = _Trials(draft, metric, alpha, switched)
        chosen = _bisect(trials.drop, order, max_drop, len(likely_exceptions(draft, ranking, max_drop)))
    if chosen is None:
        floats: list[Step] = [(name, None) for name in ranking.damage]
        more = _bisect(lambda extra: trials.drop({**dict(order), **extra}), floats, max_drop)
        chosen = {**dict(order), **(more if more is not None else dict(floats))}
    ctx.ledger.current.facts["gate"] = {
        "metric": metric.name, "float": metric.reference.value, "max_drop": max_drop, "drop": trials.drop(chosen),
        "steps": trials.steps, "linears": {name: readers.get(name, []) for name in chosen},
        "exceptions": {name: str(scheme) if scheme is not None else "float" for name, scheme in chosen.items()},
    }  # fmt: skip
    return draft.choice.with_activation(chosen, readers)


@contextlib.contextmanager
def _opened(
    ctx: Context, draft: Draft, steps: Steps, alpha: float, output: str
) -> Iterator[Callable[[Iterable[str]], Run]]:
    """One session for all trials: from the activations that move one step up to a function that runs the model."""
    with ctx.runner.opened(draft.build_switched(alpha, steps), [output]) as run:

        def switched(moved: Iterable[str]) -> Run:
            flags = np.isin(list(steps), list(moved))
            return lambda feeds: run({**feeds, SWITCHES: flags})

        yield switched


class _Trials:
    """Measures the whole model with some exceptions; each set of them once."""

    def __init__(self, draft: Draft, metric: Metric, alpha: float, switched: Callable[[Iterable[str]], Run]) -> None:
        self._draft, self._metric, self._alpha, self._switched = draft, metric, alpha, switched
        self._known: dict[frozenset[tuple[str, str]], float] = {}
        self.steps: list[dict[str, Any]] = []

    def drop(self, changes: Steps) -> float:
        key = frozenset((name, str(scheme)) for name, scheme in changes.items())
        if key not in self._known:
            measured = self._measure(changes)
            self._known[key] = self._metric.cautious_drop(measured)
            self.steps.append({"exceptions": len(changes), "metric": measured.value, "drop": self._known[key]})
        return self._known[key]

    def _measure(self, changes: Steps) -> Measured:
        if None in changes.values():  # float weights as well, which no switch brings back
            choice = self._draft.choice.with_activation(changes, self._draft.readers())
            return self._metric.measure(self._draft.build(choice, self._alpha))
        return self._metric.measure_run(self._switched(changes))


def _ladder(draft: Draft) -> dict[str, ActivationScheme | None]:
    """The next step up for each activation: a static one to per token with the same bits, one per token to 8 bits, and
    None, float, for those with 8 bits per token."""
    steps: dict[str, ActivationScheme | None] = {}
    for name, scheme in draft.choice.activations.items():
        if scheme.dynamic:
            steps[name] = None if scheme.bits >= 8 else scheme.model_copy(update={"bits": 8})
        else:
            steps[name] = ActivationScheme(bits=scheme.bits, granularity="per_token", symmetric=scheme.symmetric)
    return steps


def _movable(steps: Steps) -> dict[str, ActivationScheme]:
    """The activations whose next step up is not float."""
    return {name: scheme for name, scheme in steps.items() if scheme is not None}


def _bisect(
    attempt: Callable[[dict[str, Any]], float], order: list[Step], max_drop: float, start: int = 0
) -> dict[str, Any] | None:
    """The shortest prefix of ``order`` that holds the gate; None when all of it misses.

    From ``start`` outwards, first by a quarter of it, then by as much as the first two drops promise, then by twice
    that and so on, until it lies between two trials; then by halves.
    """
    low, high = -1, len(order) + 1  # the longest prefix known to miss, the shortest known to hold
    length, stride = min(start, len(order)), 0
    seen: list[tuple[int, float]] = []
    while high - low > 1:
        seen.append((length, attempt(dict(order[:length]))))
        if seen[-1][1] <= max_drop:  # a drop that is NaN misses
            high = length
        else:
            low = length
        stride = _promised(seen, max_drop) or 2 * stride or max(start // 4, 1)
        if low < 0:
            length = max(high - stride, 0)
        elif high > len(order):
            length = min(low + stride, len(order))
        else:
            length = (low + high) // 2
    return dict(order[:high]) if high <= len(order) else None


def _promised(seen: list[tuple[int, float]], max_drop: float) -> int:
    """How far behind the second length a line through the first two drops comes to ``max_drop``; 0: unknown."""
    if len(seen) != 2:
        return 0
    (before, worse), (length, drop) = seen
    slope = (drop - worse) / (length - before)
    distance = abs(drop - max_drop) / -slope if slope < 0 else 0.0
    return math.ceil(distance) if math.isfinite(distance) else 0


def _worst(damage: float) -> float:
    return math.inf if math.isnan(damage) else damage

