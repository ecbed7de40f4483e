"""What tests of language models share: logits of a text that is read in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcompile.generation import Decoder


def logits(program: Path, ids: np.ndarray, split: Sequence[int]) -> np.ndarray:
    """The logits (batch, tokens, vocabulary) of ``ids``, read ``split[0]`` tokens at first, then ``split[1]`` ..."""
    decoder = Decoder.open(program)
    ends = np.cumsum(split)
    assert ends[-1] == ids.shape[1]
    return np.concatenate([decoder.feed(ids[:, end - n : end]) for n, end in zip(split, ends, strict=True)], axis=1)
