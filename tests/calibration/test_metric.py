"""The metric: which models it calls language models, and its figures against NumPy alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.calibration import metric as metrics
from qcompile.calibration.metric import Measured, Metric
from qcompile.calibration.samples import Sample
from qcompile.models.architectures import cached_export
from tests.passes.planted import Bench, bench

Array = np.ndarray
LENGTHS = (10, 10, 10)


def samples(lengths: Sequence[int] = LENGTHS, total: int = 0, seed: int = 0) -> list[Sample]:
    """Token ids of those lengths, padded on the right to ``total``."""
    generator, found = np.random.default_rng(seed), []
    for length in lengths:
        ids, mask = np.zeros((1, max(total, length)), np.int64), np.zeros((1, max(total, length)), np.int64)
        ids[0, :length], mask[0, :length] = generator.integers(3, 256, length), 1
        found.append(Sample({"input_ids": ids, "attention_mask": mask}, mask.astype(bool)))
    return found


def outputs(found: Bench, some: Sequence[Sample]) -> list[Array]:
    name = str(found.model.graph.outputs[0].name)
    return [np.array(v[name], np.float64) for _, v in found.ctx.runner.stream(found.model, some, [name])]


@pytest.mark.parametrize(("name", "causal"), [("gpt2", True), ("llama", True), ("bloom", True), ("bert", False)])
@pytest.mark.parametrize("total", (0, 16))
def test_language_models_are_told_from_encoders(name: str, causal: bool, total: int) -> None:
    with bench(cached_export(name)) as found:
        assert Metric(found.ctx, found.model, samples((10,), total)).is_perplexity is causal


def looks_both_ways() -> ir.Model:
    """Logits over the vocabulary at every position, but of the mean of all real tokens: a masked LM."""
    table = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, 256] logits) {
        last = Constant <value_ints = [2]> ()
        one = Constant <value_ints = [1]> ()
        x = Gather (table, input_ids)
        column = Unsqueeze (attention_mask, last)
        real = Cast <to = 1> (column)
        kept = Mul (x, real)
        mean = ReduceMean <keepdims = 1> (kept, one)
        y = Add (x, mean)
        t = Transpose <perm = [1, 0]> (table)
        logits = MatMul (y, t)
    }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize("total", (0, 16))
def test_an_encoder_over_a_vocabulary_is_no_language_model_even_when_padded(total: int) -> None:
    """The last column of a padded sample is masked, so changing that one shows nothing."""
    with bench(looks_both_ways(), samples()) as found:
        metric = Metric(found.ctx, found.model, samples((10,), total))
        assert not metric.is_perplexity and metric.reference.value == pytest.approx(0, abs=1e-6)


def test_one_token_is_too_few_to_tell() -> None:
    with bench(cached_export("gpt2")) as found:
        assert not Metric(found.ctx, found.model, samples((1,))).is_perplexity


@pytest.mark.parametrize("total", (0, 16))
def test_perplexity_is_that_of_numpy(total: int) -> None:
    with bench(cached_export("gpt2")) as found:
        some = samples(total=total)
        metric = Metric(found.ctx, found.model, some)
        nats = []
        for logits, sample in zip(outputs(found, some), some, strict=True):
            n = int(sample.mask.sum()) if sample.mask is not None else 0
            scores, targets = logits[0, : n - 1], sample.feeds["input_ids"][0, 1:n]
            likelihood = np.exp(scores)[np.arange(n - 1), targets] / np.exp(scores).sum(axis=1)
            nats.append(-np.log(likelihood).mean())
        assert metric.name == "perplexity"
        assert metric.reference.value == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
        assert metric.reference.each == pytest.approx(nats, rel=1e-5)


def test_padding_on_the_left_predicts_nothing() -> None:
    with bench(cached_export("llama")) as found:
        (one,) = samples((10,))
        ids, mask = (np.pad(one.feeds[name], ((0, 0), (6, 0))) for name in ("input_ids", "attention_mask"))
        left = Sample({"input_ids": ids, "attention_mask": mask}, mask.astype(bool))
        alone, padded = (Metric(found.ctx, found.model, [s]).reference.value for s in (one, left))
        assert padded == pytest.approx(alone, rel=1e-3)  # rotary positions are relative


def test_the_drop_of_a_language_model_is_relative_and_of_others_the_figure() -> None:
    with bench(cached_export("gpt2")) as found:
        metric = Metric(found.ctx, found.model, samples())
        each = tuple(v + 0.1 for v in metric.reference.each)
        assert metric.reference.divergences == pytest.approx((0, 0, 0), abs=1e-6)
        worse = Measured(metric.name, metric.reference.value * np.exp(0.1), each, (0.05, 0.05, 0.05))
        assert metric.drop(worse) == pytest.approx(np.expm1(0.1))
        assert metric.cautious_drop(worse) == pytest.approx(np.expm1(0.1))  # the divergence promises less
        uneven = dataclasses.replace(worse, divergences=(0, 0, 0.3))  # mean 0.1 and standard error 0.1
        assert metric.cautious_drop(uneven) == pytest.approx(np.expm1(0.3))


def test_the_divergence_of_a_language_model_is_that_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK_TOKENS", 16)
    with bench(cached_export("gpt2")) as found:
        some = samples((5, 60), total=60)
        metric = Metric(found.ctx, found.model, some)
        before = outputs(found, some)
        other = [y * 0.9 for y in before]
        answers = iter(other)
        measured = metric.measure_run(lambda feeds: {metric.output: next(answers)})
        for sample, a, b, figure in zip(some, before, other, measured.divergences, strict=True):
            p, q = (np.exp(y[0]) / np.exp(y[0]).sum(axis=-1, keepdims=True) for y in (a, b))
            each = (p * np.log(p / q)).sum(axis=-1)
            assert sample.mask is not None
            assert figure == pytest.approx(float(each[sample.mask[0]].mean()), rel=1e-3)


@pytest.mark.parametrize("name", ("gpt2", "bert"))
def test_a_model_that_answers_nan_is_infinitely_worse(name: str) -> None:
    """NaN compares false with everything: as a figure it would pass for one that holds the gate."""
    with bench(cached_export(name)) as found:
        metric = Metric(found.ctx, found.model, samples())
        broken = Measured(metric.name, float("nan"), (float("nan"), 0.1, 0.1), (float("nan"), 0.1, 0.1))
        assert metric.drop(broken) == metric.cautious_drop(broken) == float("inf")


def test_cosine_is_that_of_numpy_at_real_tokens_only() -> None:
    with bench(cached_export("bert")) as found:
        some = samples((5, 12), total=16)
        metric = Metric(found.ctx, found.model, some)
        before = outputs(found, some)
        weight = next(
            v
            for k, v in found.model.graph.initializers.items()
            if "query.weight" in k or (v.shape is not None and list(v.shape) == [64, 64])
        )
        assert weight.const_value is not None
        weight.const_value = ir.tensor(np.zeros((64, 64), np.float32), name=weight.name)
        after, measured = outputs(found, some), metric.measure(found.model)
        gaps = []
        for a, b, sample in zip(before, after, some, strict=True):
            assert sample.mask is not None
            a, b = a[sample.mask], b[sample.mask]
            cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            gaps.append(1 - cosine.mean())
        assert measured.each == pytest.approx(gaps, abs=1e-5) and measured.value > 1e-4
        assert metric.drop(measured) == measured.value


def test_a_model_without_token_ids_is_compared_by_cosine(tmp_path: Path) -> None:
    pixels: Any = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    with bench(cached_export("vit")) as found:
        assert Metric(found.ctx, found.model, [Sample(pixels)]).name == "1 - cosine similarity"
