"""Random samples of a model whose positions end where no table of embeddings shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.graph.workspace import Workspace
from qcompile.intake import take_samples
from tests.backends.ground import graph


def counting(positions: int) -> ir.Model:
    """Adds what is picked from a table for each position, which is no lookup that is known."""
    text = """g (float[batch, seq] x) => (float[batch, seq] y) {
        zeros = Sub(x, x)
        ones = Add(zeros, one)
        counted = CumSum <exclusive = 1> (ones, axis)
        places = Cast <to = 7> (counted)
        sines = Neg(table)
        picked = GatherElements <axis = 1> (sines, places)
        y = Add(x, picked)
    }"""
    table = np.zeros((1, positions), np.float32)
    return graph(text, one=np.array(1, np.float32), axis=np.array(1), table=table)


@pytest.mark.parametrize(("positions", "longest"), [(200, 128), (50, 32), (1, 128)])
def test_random_samples_are_halved_until_the_model_runs(positions: int, longest: int, tmp_path: Path) -> None:
    """With one position none runs: the error that follows is about the samples as they would have been."""
    with Workspace(tmp_path) as workspace:
        samples, described = take_samples(counting(positions), None, None, 4, 512, workspace=workspace)
    assert max(sample.feeds["x"].shape[1] for sample in samples) == longest
    assert described["max_length"] == (32 if longest == 32 else 512)
    told = [text for text in samples.warnings_ if "does not run on 128 random tokens; 32 are used" in text]
    assert len(told) == (longest == 32)
