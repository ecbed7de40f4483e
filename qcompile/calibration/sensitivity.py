"""Sensitivity that acts: choose the clip on the model's output, and spend precision where it holds the gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.draft import Choice, Draft
from qcompile.calibration.metric import Metric
from qcompile.calibration.observers import sequences
from qcompile.calibration.runner import matmul
from qcompile.graph.edits import constant_array
from qcompile.graph.sites import Linear, find_linears
from qcompile.pipeline import Context
from qcompile.quant.numerics import fake_quantize, fake_quantize_per_token
from qcompile.quant.schemes import ActivationScheme

# Token quantiles to try, largest first: in short texts one token in ten is special (arXiv 2209.13325, section 4.2).
ALPHAS = (1.0, 0.998, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
ALPHAS_8_BIT = (1.0, 0.99)  # 256 levels leave little to gain
BROKEN = 0.5  # mean relative error of a linear's tokens from which a static range is given up without a try
Step = tuple[str, ActivationScheme | None]
PATIENCE = 5  # stop after so many worse quantiles in a row


def choose_alpha(ctx: Context, draft: Draft, choice: Choice, count: int) -> float:
    """The token quantile, one for all activations, with the smallest squared error of the model's first output."""
    schemes = [s for s in choice.activations.values() if not s.dynamic and s.observer == "token_wise"]
    if not schemes:
        return 1.0
    samples = _some(ctx, count)
    output = str(draft.model.graph.outputs[0].name)
    reference = [values[output] for _, values in ctx.runner.stream(draft.model, samples, [output], "choosing the clip")]
    best, best_error, worse, curve = 1.0, np.inf, 0, []
    for alpha in ALPHAS if min(s.bits for s in schemes) < 8 else ALPHAS_8_BIT:
        error = _output_error(ctx, draft.build(choice, alpha), samples, output, reference)
        curve.append([alpha, error])
        if error < best_error:
            best, best_error, worse = alpha, error, 0
        else:
            worse += 1
        if worse >= PATIENCE:
            break
    ctx.ledger.current.facts["alpha_search"] = curve
    return best


def _some(ctx: Context, count: int, most: int = 1024) -> list[Any]:
    """Up to ``count`` samples, fewer when they come to ``most`` tokens before."""
    picked: list[Any] = []
    tokens = 0
    for sample in ctx.samples:
        picked.append(sample)
        tokens += int(np.prod(next(iter(sample.feeds.values())).shape[:2]))
        if len(picked) >= count or tokens >= most:
            break
    return picked


def _output_error(ctx: Context, trial: ir.Model, samples: list[Any], output: str, reference: list[np.ndarray]) -> float:
    error = 0.0
    for (sample, values), target in zip(
        ctx.runner.stream(trial, samples, [output], "choosing the clip"), reference, strict=True
    ):
        for a, b in zip(sequences(values[output], sample.mask), sequences(target, sample.mask), strict=True):
            error += float(np.square(a - b).sum())
    return error


# --------------------------------------------------------------------------- the gate


@dataclasses.dataclass(frozen=True)
class Ranked:
    """An activation with the mean relative error that its scheme alone gives the linears that read it."""

    name: str
    damage: float


def broken_exceptions(draft: Draft, ranked: Sequence[Ranked]) -> dict[str, ActivationScheme | None]:
    """The next step up for every activation whose static scheme loses more than half of the signal."""
    steps = _ladder(draft)
    return {
        item.name: steps[item.name]
        for item in ranked
        if item.damage > BROKEN and not draft.choice.activations[item.name].dynamic
    }


def hold_gate(
    ctx: Context, draft: Draft, ranked: Sequence[Ranked], metric: Metric, alpha: float, max_drop: float
) -> Choice:
    """The choice with the fewest activations in higher precision whose cautious drop is at most ``max_drop``.

    Activations come in the order of the damage that their own scheme does; the ladder is per token, then float.
    The count is found by bisection on the whole model's metric.
    """
    ladder, readers = _ladder(draft), draft.readers()
    trials = _Trials(draft, metric, alpha, readers)
    order = [(item.name, ladder[item.name]) for item in ranked]
    chosen = _bisect(trials.drop, order, max_drop, start=len(broken_exceptions(draft, ranked)))
    if chosen is None:  # per token everywhere does not hold it: go on to float, worst first
        everywhere = dict(order)
        floats: list[Step] = [(item.name, None) for item in ranked]
        more = _bisect(lambda extra: trials.drop({**everywhere, **extra}), floats, max_drop)
        chosen = {**everywhere, **(more if more is not None else dict(floats))}
    ctx.ledger.current.facts["gate"] = {
        "metric": metric.name, "float": metric.reference.value, "max_drop": max_drop, "drop": trials.drop(chosen),
        "steps": trials.steps, "linears": {name: readers.get(name, []) for name in chosen},
        "exceptions": {name: str(scheme) if scheme is not None else "float" for name, scheme in chosen.items()},
    }  # fmt: skip
    return draft.choice.with_activation(chosen, readers)


class _Trials:
    """Measures the whole model with some exceptions; each set of them once."""

    def __init__(self, draft: Draft, metric: Metric, alpha: float, readers: Mapping[str, list[str]]) -> None:
        self._draft, self._metric, self._alpha, self._readers = draft, metric, alpha, readers
        self._known: dict[frozenset[tuple[str, str]], float] = {}
        self.steps: list[dict[str, Any]] = []

    def drop(self, changes: Mapping[str, ActivationScheme | None]) -> float:
        key = frozenset((name, str(scheme)) for name, scheme in changes.items())
        if key not in self._known:
            choice = self._draft.choice.with_activation(changes, self._readers)
            measured = self._metric.measure(self._draft.build(choice, self._alpha))
            self._known[key] = self._metric.cautious_drop(measured)
            self.steps.append({"exceptions": len(changes), "metric": measured.value, "drop": self._known[key]})
        return self._known[key]


def _ladder(draft: Draft) -> dict[str, ActivationScheme | None]:
    """The next step up for each activation: static -> per token with the same bits -> 8 bits -> float."""
    steps: dict[str, ActivationScheme | None] = {}
    for name, scheme in draft.choice.activations.items():
        if scheme.dynamic:
            steps[name] = None if scheme.bits >= 8 else scheme.model_copy(update={"bits": 8})
        else:
            symmetric = scheme.symmetric or scheme.bits >= 8
            steps[name] = ActivationScheme(bits=scheme.bits, granularity="per_token", symmetric=symmetric)
    return steps


def _bisect(
    attempt: Callable[[dict[str, Any]], float], order: list[Step], max_drop: float, start: int = 0
) -> dict[str, Any] | None:
    """The shortest prefix of ``order`` that holds the gate, by bisection from ``start``; None when all of it misses."""
    low, high = -1, start  # the longest prefix known to miss, the shortest one to try next
    while not attempt(dict(order[:high])) <= max_drop:  # a drop that is NaN misses
        if high == len(order):
            return None
        low, high = high, min(2 * high + 1, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        if attempt(dict(order[:middle])) <= max_drop:
            high = middle
        else:
            low = middle
    return dict(order[:high])


def rank(ctx: Context, draft: Draft, alpha: float) -> list[Ranked]:
    """All quantised activations, worst first."""
    names = list(draft.choice.activations)
    by_input: dict[str, list[Linear]] = {}
    for linear in find_linears(draft.model.graph):
        by_input.setdefault(str(linear.x.name), []).append(linear)
    damage, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for sample, values in ctx.runner.stream(draft.model, _some(ctx, 32, 512), names, "ranking"):
        for name in names:
            for rows in sequences(values[name], sample.mask):
                damage[name] += _damage(draft, name, draft.choice.activations[name], rows, by_input[name], alpha)
                tokens[name] += rows.shape[0]
    found = [Ranked(name, damage[name] / max(tokens[name], 1)) for name in names]
    return sorted(found, key=lambda item: (-item.damage, item.name))


def _damage(
    draft: Draft, name: str, scheme: ActivationScheme, rows: np.ndarray, linears: list[Linear], alpha: float
) -> float:
    if scheme.dynamic:
        quantized = fake_quantize_per_token(rows, scheme.bits, scheme.symmetric)
    else:
        quantized = fake_quantize(rows, draft.ranges.affine(name, scheme, alpha))
    w = np.concatenate([linear.w if not linear.transposed else _first_columns(linear) for linear in linears], axis=1)
    error = np.square(matmul(rows - quantized, w)).sum(axis=1)
    signal = np.square(matmul(rows, w)).sum(axis=1)
    return float((error / np.maximum(signal, 1e-20)).sum())


def _first_columns(linear: Linear) -> np.ndarray:
    table = constant_array(linear.weight)
    assert table is not None
    return table[:2048].T
