"""Calibration is flat: 256 samples take no more memory than 32, whatever the observer, and no session stays behind."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qcompile.calibration import ranges, runner
from qcompile.calibration.observers import MinMax
from qcompile.calibration.ranges import calibrate
from qcompile.calibration.samples import Sample
from qcompile.quant.schemes import OBSERVERS, ActivationScheme
from tests.passes.planted import WIDTH, Bench, bench, inputs, normed, outlier_norm

TOKENS = 64
FLAT = 64 << 10  # bytes; one sample's values are WIDTH * TOKENS * 4 = 8 KiB, and there are 224 more samples
SCHEMES = {name: ActivationScheme.model_validate({"bits": 8, "observer": name}) for name in OBSERVERS} | {
    "channel_group": ActivationScheme(bits=8, granularity="channel_group"),
    "outliers": ActivationScheme(bits=8, granularity="per_token", outlier_threshold=6.0),
}


class Stream:
    """``count`` samples, each made when it is asked for; NumPy owns masked rows, so they are traced."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        generator = np.random.default_rng(0)
        for _ in range(self.count):
            x = generator.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
            yield Sample({"x": x}, np.ones((1, TOKENS), bool))


def peak(found: Bench, count: int, scheme: ActivationScheme) -> int:
    """Bytes that NumPy and Python hold at most while ``count`` samples are seen."""
    tracemalloc.start()
    try:
        calibrate(found.ctx, found.model, {"normed": scheme}, ["normed"], Stream(count))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_does_not_grow_with_samples(name: str) -> None:
    with bench(normed(*outlier_norm()), inputs()) as found:
        peak(found, 2, SCHEMES[name])  # imports and caches
        few, many = (peak(found, count, SCHEMES[name]) for count in (32, 256))
    assert many - few < FLAT, f"{few} bytes for 32 samples, {many} for 256"


class Hoarder(MinMax):
    """Keeps the rows that it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def update(self, rows: np.ndarray) -> None:
        super().update(rows)
        self.kept.append(rows)


def test_the_measure_sees_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "MinMax", Hoarder)
    with bench(normed(*outlier_norm()), inputs()) as found:
        few, many = (peak(found, count, SCHEMES["minmax"]) for count in (32, 256))
    assert many - few > 10 * FLAT


def test_a_session_ends_with_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds a copy of the weights; nothing waits for the garbage collector to free it."""
    held: list[weakref.ref[Any]] = []
    open_session = runner.open_session

    def watched(*arguments: Any, **named: Any) -> Any:
        session = open_session(*arguments, **named)
        held.append(weakref.ref(session))
        return session

    monkeypatch.setattr(runner, "open_session", watched)
    gc.disable()
    try:
        with bench(normed(*outlier_norm()), inputs()) as found:
            assert found.outputs()
        assert [session() for session in held] == [None]
    finally:
        gc.enable()
