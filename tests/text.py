"""What tests of language models share: logits of a text that is read in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcompile.generation import Decoder


def logits(program: Path, ids: np.ndarray, split: Sequence[int]) -> np.ndarray:
    """The logits (batch, tokens, vocabulary) of ``ids``, read ``split[0]`` tokens at first, then ``split[1]`` ..."""
    return read(Decoder.open(program), ids, split)


def read(decoder: Decoder, ids: np.ndarray, split: Sequence[int]) -> np.ndarray:
    """The same of a decoder that has read nothing yet."""
    ends = np.cumsum(split)
    assert ends[-1] == ids.shape[1]
    return np.concatenate([decoder.feed(ids[:, end - n : end]) for n, end in zip(split, ends, strict=True)], axis=1)
