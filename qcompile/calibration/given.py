"""Calibration given in Python: a list of ``{input name: array}``, each with its batch axis."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from qcompile.calibration.arrays import check_feeds
from qcompile.calibration.inputs import complete, model_inputs
from qcompile.calibration.positions import longest_sequence
from qcompile.calibration.samples import Sample, mask_input
from qcompile.errors import UserError


class GivenSamples:
    """Samples that the caller holds; inputs that can be made (masks, positions) may be left out."""

    def __init__(self, given: Iterable[Mapping[str, np.ndarray]], model: ir.Model) -> None:
        inputs = model_inputs(model)
        by_name, masked = {item.name: item for item in inputs}, mask_input(inputs)
        longest = longest_sequence(model, inputs)
        self._samples = []
        for index, feeds in enumerate(given):
            if not isinstance(feeds, Mapping):
                raise UserError(
                    f"calibration sample {index} is a {type(feeds).__name__}",
                    hint="give a path, or a list of {input name: array}",
                )
            where, arrays = f"calibration sample {index}", {k: np.asarray(v) for k, v in feeds.items()}
            check_feeds(arrays, by_name, where, longest)  # what is made below follows them
            done = complete(arrays, inputs)
            check_feeds(done, by_name, where, longest)
            mask = done[masked].astype(bool) if masked is not None else None
            self._samples.append(Sample(done, mask))
        if not self._samples:
            raise UserError("the calibration list is empty", hint="give at least one {input name: array}")

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def digest(self) -> str:
        """sha256 over the names, types, shapes and bytes of every array."""
        total = hashlib.sha256()
        for sample in self._samples:
            for name, array in sorted(sample.feeds.items()):
                total.update(f"{name}{array.dtype}{array.shape}".encode())
                total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()
