"""How long random samples may be where only running the model shows it, as with a table of sines that is too short."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompile.calibration.runner import OrtRunner, Run
from qcompile.calibration.samples import SampleSet
from qcompile.errors import UserError

SHORTEST = 2
Load = Callable[[int], SampleSet]  # tokens at most -> random samples


def runnable(model: ir.Model, load: Load, length: int, runner: OrtRunner) -> tuple[SampleSet, int]:
    """Random samples that ``model`` runs, and tokens in them at most: ``length``, or a half, a quarter, ... of it.

    Where it runs none they are those of ``length``. Raises UserError for a model that does not load.
    """
    first = samples = load(length)
    longest = tokens = _tokens(first)
    with runner.opened(model, [str(value.name) for value in model.graph.outputs]) as run:
        while not _runs(run, samples):
            if tokens < 2 * SHORTEST:
                return first, length
            samples = load(tokens // 2)
            if _tokens(samples) == tokens:  # no input has a free length
                return first, length
            tokens = _tokens(samples)
    if tokens == longest:
        return first, length
    samples.warnings_.append(f"the model does not run on {longest} random tokens; {tokens} are used")
    return samples, tokens


def _runs(run: Run, samples: SampleSet) -> bool:
    try:
        run(next(iter(samples)).feeds)
    except UserError:
        return False
    return True


def _tokens(samples: SampleSet) -> int:
    """The longest second axis of the first sample, which is as long as can be."""
    feeds = next(iter(samples)).feeds.values()
    return max((array.shape[1] for array in feeds if array.ndim > 1), default=0)
