"""What a program gives for a benchmark's inputs, and how far two programs are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import protocol
from benchmarks.protocol import Arrays, Protocol
from qcompile.backends.base import open_program
from qcompile.generation import Decoder

Inputs = dict[str, list[Arrays]]  # stage -> what is read in it, one after the other


def inputs(data: Protocol, samples: int, context: int, tokens: int) -> Inputs:
    """Padded batches of sentences, or one window: ``context`` tokens at once, then ``tokens`` one at a time."""
    if isinstance(data, protocol.StsB):
        return {"sentences": protocol.padded(data.calibration(8 * samples))}
    ids = data.read_windows("test", 1)[0][: context + tokens]
    steps = [protocol.feeds([[token]]) for token in ids[context:]]
    return {"prefill": [protocol.feeds([ids[:context]])], "decode": steps}


def of(program: Path, given: Inputs) -> dict[str, list[np.ndarray]]:
    """Rows of logits, or the vectors of the tokens that are no padding."""
    if "sentences" in given:
        run = open_program(program)
        found = []
        for feeds in given["sentences"]:
            (first, *_) = run(feeds).values()
            found.append(first[feeds["attention_mask"] > 0])
        return {"sentences": found}
    decoder = Decoder.open(program)
    return {stage: [decoder.feed(feeds["input_ids"])[0] for feeds in given[stage]] for stage in given}


def difference(reference: list[np.ndarray], found: list[np.ndarray]) -> dict[str, Any]:
    """``same``: the share of rows whose largest element is at the same place."""
    pairs = list(zip(reference, found, strict=True))
    return {
        "exact": all(np.array_equal(a, b) for a, b in pairs),
        "error": max(float(np.abs(a - b).max()) for a, b in pairs),
        "reach": max(float(np.abs(a).max()) for a, _ in pairs),
        "same": float(np.mean(np.concatenate([(a.argmax(-1) == b.argmax(-1)).reshape(-1) for a, b in pairs]))),
    }
