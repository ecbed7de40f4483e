"""The mean key of each head: what a cache of few bits leaves out of its codes.

A softmax does not change when one number is added to all scores of a query, and q (k - m) differs from q k by q m for
every k alike. So keys may be stored without their mean m, which takes most of their range: rotary embeddings leave the
channels of low frequency nearly constant, and some models have biases there. The longer the text, the more of those
channels turn: a mean over samples shorter than the text fits it less well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.samples import first_samples
from qcompile.graph.caches import find_caches, is_of_keys
from qcompile.pipeline import Context

TOKENS = 4096  # enough for a mean


def key_means(
    ctx: Context, model: ir.Model, names: Iterable[str], samples: Iterable[Any] | None = None
) -> dict[str, np.ndarray]:
    """The mean (1, heads, 1, width) over real tokens of what joins each cache of keys in ``names``, by its name."""
    wanted = set(names)
    values = {str(c.new.name): c.name for c in find_caches(model.graph) if c.name in wanted and is_of_keys(c)}
    sums = {name: np.zeros(()) for name in values}
    count = 0
    some = first_samples(ctx.samples if samples is None else samples, tokens=TOKENS)
    for sample, arrays in ctx.runner.stream(model, some, list(values), label="keys"):
        for name, keys in arrays.items():  # (batch, heads, tokens, width)
            real = np.ones((keys.shape[0], keys.shape[2]), bool) if sample.mask is None else sample.mask
            sums[name] = sums[name] + np.einsum("bhtd,bt->hd", keys, real[:, -keys.shape[2] :], dtype=np.float64)
        count += int(real.sum())
    return {cache: (sums[name] / count)[None, :, None].astype(np.float32) for name, cache in values.items()}
