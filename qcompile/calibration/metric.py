"""One number for a whole model on the samples, to gate and to choose by.

Causal language models (found by trying: an output over the vocabulary that does not look ahead): perplexity
of the samples' own tokens. Any other model: 1 - mean cosine similarity of its output rows with the float
model's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.observers import sequences
from qcompile.calibration.runner import Run
from qcompile.calibration.samples import Sample, shortened
from qcompile.graph.sites import find_embeddings
from qcompile.pipeline import Context

IDS = "input_ids"
PROBED_TOKENS = 32
CHUNK_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Measured:
    """``value`` of the metric, and each sample's own figures; samples count alike, whatever their length.

    each: nats per token, or 1 - cosine; divergences: mean over tokens of KL(float || this) in nats, or 1 - cosine
    """

    name: str
    value: float
    each: tuple[float, ...]
    divergences: tuple[float, ...]


class Metric:
    """Measures models against a float reference on fixed samples.

    causal: whether ``model`` is a causal language model; found by trying when it is None.
    """

    def __init__(self, ctx: Context, model: ir.Model, samples: Sequence[Any], causal: bool | None = None) -> None:
        self._ctx, self._samples = ctx, list(samples)
        self.output = str(model.graph.outputs[0].name)
        self.is_perplexity = self._is_causal_lm(model) if causal is None else causal
        self.name = "perplexity" if self.is_perplexity else "1 - cosine similarity"
        stream = ctx.runner.stream(model, self._samples, [self.output])
        self._floats = [self._kept(values[self.output], i) for i, (_, values) in enumerate(stream)]
        self.reference = self._measured(np.load(path, mmap_mode="r") for path in self._floats)

    def measure(self, model: ir.Model) -> Measured:
        """The metric of ``model``, whose first output is compared."""
        with self._ctx.runner.opened(model, [self.output]) as run:
            return self.measure_run(run)

    def measure_run(self, run: Run) -> Measured:
        """The metric of what ``run`` answers."""
        return self._measured(run(sample.feeds)[self.output] for sample in self._samples)

    def squares(self, model: ir.Model) -> float:
        """Summed squared difference of the first output from the float model's, over real tokens; not for perplexity,
        whose float outputs are kept as log probabilities."""
        total = 0.0
        with self._ctx.runner.opened(model, [self.output]) as run:
            for sample, path in zip(self._samples, self._floats, strict=True):
                y, reference = run(sample.feeds)[self.output], np.load(path, mmap_mode="r")
                for a, b in zip(sequences(y, sample.mask), sequences(reference, sample.mask), strict=True):
                    total += float(np.square(a - b).sum())
        return total

    def drop(self, measured: Measured) -> float:
        """How much worse than the float reference: relative for perplexity, the figure itself for cosine.

        Infinite for a model that answers NaN.
        """
        return _worst(measured.value / self.reference.value - 1 if self.is_perplexity else measured.value)

    def cautious_drop(self, measured: Measured) -> float:
        """What a few samples say for the rest: ``drop``, or the divergence plus two standard errors if that is more.

        The divergence is what quantisation adds to the log perplexity of text as the float model would write it. It
        varies far less between texts than the difference of their perplexities, which is no cautious figure by itself.
        """
        found = np.asarray(measured.divergences)
        error = float(found.std(ddof=1) / np.sqrt(found.size)) if found.size > 1 else 0.0
        cautious = float(found.mean()) + 2 * error
        return max(self.drop(measured), _worst(float(np.expm1(cautious)) if self.is_perplexity else cautious))

    def _kept(self, y: np.ndarray, index: int) -> Path:
        """The float model's answer to one sample, on disk since a vocabulary is large: log probabilities, or ``y``."""
        path = self._ctx.workspace.root / f"metric-{id(self)}-{index}.npy"
        held = np.lib.format.open_memmap(path, "w+", np.float32, y.shape)
        if self.is_perplexity:
            for piece in _pieces(y.shape[1]):
                held[:, piece] = _log_softmax(y[:, piece])
        else:
            held[...] = y
        held.flush()
        return path

    def _measured(self, outputs: Iterable[np.ndarray]) -> Measured:
        compare = _nats_and_divergence if self.is_perplexity else _cosine_twice
        figures = [
            compare(y, np.load(path, mmap_mode="r"), sample)
            for y, path, sample in zip(outputs, self._floats, self._samples, strict=True)
        ]
        each, divergences = zip(*figures, strict=True)
        mean = float(np.mean(each))
        return Measured(self.name, float(np.exp(mean)) if self.is_perplexity else mean, each, divergences)

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
        first = shortened(model, self._samples[0], PROBED_TOKENS)
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


def _worst(drop: float) -> float:
    return math.inf if math.isnan(drop) else drop


def _pieces(tokens: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_TOKENS) for start in range(0, tokens, CHUNK_TOKENS))


def _nats_and_divergence(logits: np.ndarray, reference: np.ndarray, sample: Sample) -> tuple[float, float]:
    """Mean negative log-likelihood of the next token, over pairs of neighbours that are both real, and KL divergence
    from ``reference`` (log probabilities), over all real tokens.

    Both arrays are (batch, seq, vocabulary); a few tokens are in memory at a time.
    """
    ids, nats, divergence = sample.feeds[IDS], [], []
    for row in range(ids.shape[0]):
        real = np.ones(ids.shape[1], bool) if sample.mask is None else sample.mask[row].astype(bool)
        for piece in _pieces(ids.shape[1]):
            ours, theirs = _log_softmax(logits[row, piece]), reference[row, piece]
            divergence.append(np.einsum("tv,tv->t", np.exp(theirs), theirs - ours)[real[piece]])
            after = slice(piece.start + 1, piece.stop + 1)
            following = ids[row, after]
            pairs = real[piece][: following.size] & real[after]
            nats.append(-ours[np.arange(following.size), following][pairs])
    return _mean(nats), _mean(divergence)


def _mean(parts: Sequence[np.ndarray]) -> float:
    joined = np.concatenate(parts)
    return float(joined.mean()) if joined.size else 0.0


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = scores - scores.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _cosine_twice(y: np.ndarray, reference: np.ndarray, sample: Sample) -> tuple[float, float]:
    figure = _one_minus_cosine(y, reference, sample)
    return figure, figure


def _one_minus_cosine(y: np.ndarray, reference: np.ndarray, sample: Any) -> float:
    values = []
    for a, b in zip(sequences(y, sample.mask), sequences(reference, sample.mask), strict=True):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        values.append(1 - (a * b).sum(axis=-1) / np.maximum(norms, 1e-30))
    return float(np.concatenate(values).mean()) if values else 0.0
