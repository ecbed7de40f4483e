"""SHA-256 of what ONNX Runtime computes: run here, and as a script on another processor.

    python digests.py model.onnx feeds.npz

prints one digest for each output. It needs NumPy and ONNX Runtime alone, since nothing else is installed there.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray


def digest(arrays: Iterable[Array]) -> str:
    """Of types, shapes and contents."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@functools.cache
def session(model: Path, optimised: bool, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    level = "ORT_ENABLE_ALL" if optimised else "ORT_DISABLE_ALL"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def outputs(model: Path, feeds: Mapping[str, Array], *, optimised: bool = True, threads: int = 1) -> dict[str, Array]:
    """The outputs of ``model`` by name."""
    opened = session(model, optimised, threads)
    names = [port.name for port in opened.get_outputs()]
    known = {port.name for port in opened.get_inputs()}
    return dict(zip(names, opened.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))


def main(model: str, feeds: str) -> None:
    with np.load(feeds) as held:
        for name, array in outputs(Path(model), dict(held)).items():
            print(name, digest([array]))


if __name__ == "__main__":
    main(*sys.argv[1:3])
