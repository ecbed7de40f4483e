"""Sensitivity that acts: choose the clip on the model's output, and spend precision where it holds the gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompile.calibration.draft import Choice, Draft
from qcompile.calibration.metric import Measured, Metric
from qcompile.calibration.observers import sequences
from qcompile.calibration.runner import matmul
from qcompile.graph.edits import constant_array
from qcompile.graph.sites import Linear, find_linears
from qcompile.pipeline import Context
from qcompile.quant.numerics import fake_quantize, fake_quantize_per_token
from qcompile.quant.schemes import ActivationScheme

# Token quantiles to try, largest first: in short texts one token in ten is special (arXiv 2209.13325, section 4.2).
ALPHAS = (1.0, 0.998, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
PATIENCE = 5  # stop after so many worse quantiles in a row


def choose_alpha(ctx: Context, draft: Draft, count: int) -> float:
    """The token quantile, one for all activations, with the smallest squared error of the model's first output."""
    schemes = [s for s in draft.choice.activations.values() if not s.dynamic and s.observer == "token_wise"]
    if not schemes:
        return 1.0
    samples = _some(ctx, count)
    output = str(draft.model.graph.outputs[0].name)
    reference = [values[output] for _, values in ctx.runner.stream(draft.model, samples, [output], "choosing the clip")]
    best, best_error, worse, curve = 1.0, np.inf, 0, []
    for alpha in ALPHAS:
        error = _output_error(ctx, draft, alpha, samples, output, reference)
        curve.append([alpha, error])
        if error < best_error:
            best, best_error, worse = alpha, error, 0
        else:
            worse += 1
        if worse >= PATIENCE:
            break
    ctx.ledger.current.facts["alpha_search"] = curve
    return best


def _some(ctx: Context, count: int) -> list[Any]:
    """Up to ``count`` samples, fewer when they are long: about as much work as 32 sentences of 128 tokens."""
    picked: list[Any] = []
    tokens = 0
    for sample in ctx.samples:
        picked.append(sample)
        tokens += int(np.prod(next(iter(sample.feeds.values())).shape[:2]))
        if len(picked) >= count or tokens >= 1024:
            break
    return picked


def _output_error(
    ctx: Context, draft: Draft, alpha: float, samples: list[Any], output: str, reference: list[np.ndarray]
) -> float:
    error = 0.0
    trial = draft.build(alpha=alpha)
    for (sample, values), target in zip(ctx.runner.stream(trial, samples, [output], "choosing the clip"), reference, strict=True):
        for a, b in zip(sequences(values[output], sample.mask), sequences(target, sample.mask), strict=True):
            error += float(np.square(a - b).sum())
    return error


# --------------------------------------------------------------------------- the gate


def hold_gate(ctx: Context, draft: Draft, metric: Metric, alpha: float, max_drop: float) -> Choice:
    """The choice with the fewest activations in higher precision whose cautious drop is at most ``max_drop``.

    Activations are ranked by the local damage of their static scheme; the ladder is per token, then float. The
    count is found by bisection on the whole model's metric, then every exception is tried without.
    """
    facts = ctx.ledger.current.facts
    ladder = _ladder(draft)
    ranked = _ranked(ctx, draft, alpha, [n for n, _ in ladder])
    readers = draft.readers()
    steps: list[dict[str, Any]] = []

    def attempt(changes: Mapping[str, ActivationScheme | None]) -> tuple[float, Measured]:
        measured = metric.measure(draft.build(draft.choice.with_activation(changes, readers), alpha))
        drop = metric.cautious_drop(measured)
        steps.append({"exceptions": len(changes), "metric": measured.value, "drop": drop})
        return drop, measured

    first = dict(ladder)
    order = [(name, first[name]) for name, _ in ranked]
    chosen = _bisect(attempt, order, max_drop)
    if chosen is None:  # per token everywhere does not hold it: go on to float, worst first
        everywhere = dict(order)
        floats = [(name, None) for name, _ in ranked]
        more = _bisect(lambda extra: attempt({**everywhere, **extra}), floats, max_drop)
        chosen = {**everywhere, **(more if more is not None else dict(floats))}
    facts["gate"] = {
        "metric": metric.name, "float": metric.reference.value, "max_drop": max_drop, "steps": steps,
        "exceptions": {name: str(scheme) if scheme is not None else "float" for name, scheme in chosen.items()},
        "linears": {name: readers.get(name, []) for name in chosen},
    }  # fmt: skip
    facts["sensitivity"] = [{"activation": name, "linears": readers.get(name, []), "damage": value} for name, value in ranked]
    return draft.choice.with_activation(chosen, readers)


def _ladder(draft: Draft) -> list[tuple[str, ActivationScheme | None]]:
    """The next step up for each activation: static -> per token with the same bits -> float."""
    steps: list[tuple[str, ActivationScheme | None]] = []
    for name, scheme in draft.choice.activations.items():
        if scheme.dynamic:
            steps.append((name, None if scheme.bits >= 8 else scheme.model_copy(update={"bits": 8})))
        else:
            symmetric = scheme.symmetric or scheme.bits >= 8
            steps.append((name, ActivationScheme(bits=scheme.bits, granularity="per_token", symmetric=symmetric)))
    return steps


def _bisect(attempt: Any, order: list[tuple[str, Any]], max_drop: float) -> dict[str, Any] | None:
    """The shortest prefix of ``order`` that holds the gate, by bisection; None when all of it does not."""
    if attempt({})[0] <= max_drop:
        return {}
    low, high = 0, 1
    while high < len(order) and attempt(dict(order[:high]))[0] > max_drop:
        low, high = high, min(high * 3, len(order))
    if high >= len(order) and attempt(dict(order))[0] > max_drop:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if attempt(dict(order[:middle]))[0] <= max_drop:
            high = middle
        else:
            low = middle
    return dict(order[:high])


def _ranked(ctx: Context, draft: Draft, alpha: float, names: list[str]) -> list[tuple[str, float]]:
    """Activations by damage, worst first: mean over tokens of the relative error of the linears that read them."""
    by_input: dict[str, list[Linear]] = {}
    for linear in find_linears(draft.model.graph):
        by_input.setdefault(str(linear.x.name), []).append(linear)
    damage = dict.fromkeys(names, 0.0)
    for sample, values in ctx.runner.stream(draft.model, _some(ctx, 32)[:8], names, "ranking"):
        for name in names:
            scheme = draft.choice.activations[name]
            for rows in sequences(values[name], sample.mask):
                damage[name] += _damage(draft, name, scheme, rows, by_input[name], alpha)
    return sorted(damage.items(), key=lambda item: (-item[1], item[0]))


def _damage(draft: Draft, name: str, scheme: ActivationScheme, rows: np.ndarray, linears: list[Linear], alpha: float) -> float:
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
