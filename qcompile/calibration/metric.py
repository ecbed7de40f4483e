"""One number for a whole model on the samples, to gate and to choose by.

Causal language models (found by trying: an output over the vocabulary that does not look ahead): perplexity
of the samples' own tokens. Any other model: 1 - mean cosine similarity of its output rows with the float
model's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.observers import sequences
from qcompile.calibration.runner import Run
from qcompile.calibration.samples import Sample
from qcompile.graph.sites import find_embeddings
from qcompile.pipeline import Context

IDS = "input_ids"


@dataclasses.dataclass(frozen=True)
class Measured:
    """``value`` of the metric and each sample's own figure (nats per token, or 1 - cosine).

    Samples count alike, whatever their length.
    """

    name: str
    value: float
    each: tuple[float, ...]


class Metric:
    """Measures models against a float reference on fixed samples."""

    def __init__(self, ctx: Context, model: ir.Model, samples: Sequence[Any]) -> None:
        self._ctx, self._samples = ctx, list(samples)
        self.output = str(model.graph.outputs[0].name)
        self.is_perplexity = self._is_causal_lm(model)
        self.name = "perplexity" if self.is_perplexity else "1 - cosine similarity"
        self._reference: list[np.ndarray] = []
        if not self.is_perplexity:
            stream = ctx.runner.stream(model, self._samples, [self.output])
            self._reference = [values[self.output] for _, values in stream]
        self.reference = self.measure(model)

    def measure(self, model: ir.Model) -> Measured:
        """The metric of ``model``, whose first output is compared."""
        with self._ctx.runner.opened(model, [self.output]) as run:
            return self.measure_run(run)

    def measure_run(self, run: Run) -> Measured:
        """The metric of what ``run`` answers."""
        answers = (run(sample.feeds)[self.output] for sample in self._samples)
        if self.is_perplexity:
            each = tuple(_nats(y, sample) for y, sample in zip(answers, self._samples, strict=True))
            return Measured(self.name, float(np.exp(np.mean(each))), each)
        rows = zip(answers, self._reference, self._samples, strict=True)
        each = tuple(_one_minus_cosine(y, reference, sample) for y, reference, sample in rows)
        return Measured(self.name, float(np.mean(each)), each)

    def drop(self, measured: Measured) -> float:
        """How much worse than the float reference: relative for perplexity, the figure itself for cosine.

        Infinite for a model that answers NaN.
        """
        return _worst(measured.value / self.reference.value - 1 if self.is_perplexity else measured.value)

    def cautious_drop(self, measured: Measured) -> float:
        """``drop`` plus two standard errors over the samples, so that a few samples speak for the rest."""
        if len(measured.each) < 2:
            return self.drop(measured)
        gaps = np.asarray(measured.each) - (np.asarray(self.reference.each) if self.is_perplexity else 0.0)
        error = float(gaps.std(ddof=1) / np.sqrt(gaps.size))
        cautious = float(gaps.mean()) + 2 * error
        return _worst(float(np.expm1(cautious)) if self.is_perplexity else cautious)

    def _is_causal_lm(self, model: ir.Model) -> bool:
        shape = model.graph.outputs[0].shape
        tables = (node.inputs[0] for node in find_embeddings(model.graph))
        vocabularies = {table.shape[0] for table in tables if table is not None and table.shape is not None}
        if not self._samples or IDS not in self._samples[0].feeds or shape is None or len(shape) != 3:
            return False
        width = shape[-1]
        return isinstance(width, int) and width in vocabularies and self._looks_only_back(model, width)

    def _looks_only_back(self, model: ir.Model, vocabulary: int) -> bool:
        """Whether another last real token leaves the output at the real tokens before it as it was."""
        first = self._samples[0]
        ids = first.feeds[IDS]
        columns = np.arange(ids.shape[1])[None]
        real = np.ones(ids.shape, bool) if first.mask is None else first.mask.astype(bool)
        last = np.where(real, columns, -1).max(axis=1, keepdims=True)
        earlier = real & (columns < last)
        if not earlier.any():
            return False
        changed = np.where(columns == last, (ids + 1) % max(vocabulary, 2), ids).astype(ids.dtype)
        other = Sample({**first.feeds, IDS: changed}, first.mask)
        before, after = (
            values[self.output][earlier]
            for _, values in self._ctx.runner.stream(model, [first, other], [self.output], "")
        )
        return bool(np.allclose(before, after, rtol=1e-4, atol=1e-4))


class Divergence:
    """How far outputs are from the float model's, in a figure that a few tokens are enough for.

    Causal language models: mean over tokens of KL(float || quantised) in nats, which is what quantisation adds to the
    log perplexity of text as the float model would write it. Any other model: 1 - mean cosine similarity.
    """

    def __init__(self, ctx: Context, model: ir.Model, metric: Metric, samples: Sequence[Sample]) -> None:
        self.samples, self._metric = list(samples), metric
        stream = ctx.runner.stream(model, self.samples, [metric.output])
        self._reference = [self._prepared(values[metric.output]) for _, values in stream]

    def measure_run(self, run: Run) -> float:
        """The divergence of what ``run`` answers."""
        found = []
        for sample, reference in zip(self.samples, self._reference, strict=True):
            y = self._prepared(run(sample.feeds)[self._metric.output])
            if self._metric.is_perplexity:
                nats = (np.exp(reference) * (reference - y)).sum(axis=-1)
                found.append(float(nats.mean() if sample.mask is None else nats[sample.mask].mean()))
            else:
                found.append(_one_minus_cosine(y, reference, sample))
        return float(np.mean(found))

    def _prepared(self, y: np.ndarray) -> np.ndarray:
        return _log_softmax(y) if self._metric.is_perplexity else y


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = scores - scores.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _worst(drop: float) -> float:
    return math.inf if math.isnan(drop) else drop


def _nats(logits: np.ndarray, sample: Any) -> float:
    """Mean negative log-likelihood of the next token, over pairs of neighbours that are both real."""
    ids, total, count = sample.feeds[IDS], 0.0, 0
    for row in range(ids.shape[0]):
        targets = ids[row, 1:]
        mask = np.ones(ids.shape[1], bool) if sample.mask is None else sample.mask[row].astype(bool)
        real = mask[1:] & mask[:-1]
        scores = logits[row, :-1][real]
        top = scores.max(axis=-1)
        log_sum = top + np.log(np.exp(scores - top[:, None]).sum(axis=-1))
        total += float((log_sum - scores[np.arange(len(scores)), targets[real]]).sum())
        count += int(real.sum())
    return total / max(count, 1)


def _one_minus_cosine(y: np.ndarray, reference: np.ndarray, sample: Any) -> float:
    values = []
    for a, b in zip(sequences(y, sample.mask), sequences(reference, sample.mask), strict=True):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        values.append(1 - (a * b).sum(axis=-1) / np.maximum(norms, 1e-30))
    return float(np.concatenate(values).mean()) if values else 0.0
