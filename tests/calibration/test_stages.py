"""A model run stage by stage: what it sees is what one run of the whole model gives, at any weights."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.calibration.moments import gather
from qcompile.calibration.observers import sequences
from qcompile.calibration.samples import Sample
from qcompile.calibration.stages import Stage, Stream, find_stages
from qcompile.errors import UserError
from qcompile.graph.edits import replace_constant
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import cached_export
from qcompile.quant.schemes import ActivationScheme
from tests.passes.planted import Bench, bench, inputs, normed, outlier_norm

Array = np.ndarray
NAMES = ("llama", "bert", "t5", "mixtral", "phi", "vit")


def stages_of(found: Bench) -> list[Stage]:
    return find_stages([linear for linear in find_linears(found.model.graph) if not linear.transposed])


def whole(found: Bench, name: str) -> list[Array]:
    """The real rows of a value, from one run of the whole model."""
    runs = found.ctx.runner.stream(found.model, found.ctx.samples, [name])
    return [rows for sample, values in runs for rows in sequences(np.array(values[name]), sample.mask)]


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_sees_the_predecessors_as_they_are_by_then(name: str) -> None:
    with bench(cached_export(name)) as found:
        stages = stages_of(found)
        assert len(stages) > 4 and sum(len(stage.linears) for stage in stages) >= 8
        with Stream(found.ctx, found.model, stages, {}) as stream:
            for stage in stages:
                stream.advance()
                seen, expected = list(stream.rows()), whole(found, str(stage.x.name))
                assert len(seen) == len(expected)
                for a, b in zip(seen, expected, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, float(np.abs(b).max())))
                for linear in stage.linears:  # all that follow must hear of it
                    replace_constant(linear.weight, np.asarray(linear.w) * 0.9, found.ctx.workspace)
        assert not list(found.ctx.workspace.root.glob("stream-*"))


def test_values_that_no_later_stage_reads_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.calibration.stages.IN_MEMORY", 0)
    with bench(cached_export("llama")) as found:
        stages = stages_of(found)
        with Stream(found.ctx, found.model, stages, {}) as stream:
            counts = []
            for _ in stages:
                stream.advance()
                counts.append(len(list(found.ctx.workspace.root.glob("stream-*/*.npy"))) / len(list(found.ctx.samples)))
    assert max(counts) <= 10 and counts[-1] <= 4, "values pile up"


def test_inputs_are_quantised_as_in_the_program() -> None:
    with bench(cached_export("llama"), recipe="w4a4") as found:
        stages = stages_of(found)
        scheme = ActivationScheme(bits=4, granularity="per_token")
        plain = {str(stage.x.name): whole(found, str(stage.x.name)) for stage in stages}
        activations = {name: scheme for name in plain}
        with Stream(found.ctx, found.model, stages, activations) as stream:
            for place, stage in enumerate(stages):
                stream.advance()
                rows = list(stream.rows())
                assert all(len(np.unique(row)) <= 16 for x in rows for row in x)
                off = max(float(np.abs(a - b).max()) for a, b in zip(rows, plain[str(stage.x.name)], strict=True))
                spread = max(float(np.ptp(b)) for b in plain[str(stage.x.name)])
                assert off > 0.01 * spread
                if place == 0:
                    assert off <= spread / 15 / 2 * 1.01, "only rounding, before anything came before"


def test_samples_that_say_nothing_are_refused_by_name() -> None:
    bad = inputs(2)
    bad[1].feeds["x"][0, 3, 3] = np.nan
    for samples, reason in ((bad, "holds NaN"), ([Sample({"x": np.zeros((1, 0, 32), np.float32)})], "no calibration")):
        with bench(normed(*outlier_norm()), samples) as found:
            stages = stages_of(found)
            with Stream(found.ctx, found.model, stages, {}) as stream, pytest.raises(UserError, match=reason) as caught:
                stream.advance()
                gather(stream.rows)
            assert "'normed'" in str(caught.value)


def test_moments_are_the_mean_and_a_sink_token_does_not_own_them() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 12)).astype(np.float32)
    x[0] *= 1e3
    other = x + 0.1 * generator.standard_normal(x.shape).astype(np.float32)
    parts = np.split(x, [50, 51]), np.split(other, [50, 51])
    found = gather(lambda: iter(parts[0]), lambda: iter(parts[1]))
    squares = np.square(x, dtype=np.float64).sum(axis=1)
    weights = 1 / (squares + np.median(squares)) + 1 / squares.mean()
    np.testing.assert_allclose(found.h, (x.T * weights) @ x / 200, rtol=1e-4, atol=1e-6)
    assert found.all.change is not None and found.halves is not None
    np.testing.assert_allclose(found.all.change, (x.T * weights) @ (other - x) / 200, rtol=1e-3, atol=1e-5)
    kept = np.delete(np.arange(200), 50)  # the first and the third sequence
    np.testing.assert_allclose(found.halves[0].h, (x.T * weights)[:, kept] @ x[kept] / 200, rtol=1e-4, atol=1e-6)
    sink = np.outer(x[0], x[0]) * weights[0] / 200
    assert 0.3 < np.trace(sink) / np.trace(found.h) < 0.8
    plain = gather(lambda: iter(parts[0]))
    both = plain + plain
    np.testing.assert_allclose(both.h, 2 * plain.h)
    assert plain.all.change is None and both.all.change is None
