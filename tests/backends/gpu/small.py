"""A program of a few kernels for the tests of GPU targets: a product of bytes, a mask, and bytes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.gpu.target import GpuTarget
from qcompile.calibration.runner import open_session
from tests.backends import ground

TEXT = """agraph (uint8[rows, 40] x, bool[rows, 1] keep) => (int32[rows, 24] y, uint8[rows, 24] codes) {
    sums = MatMulInteger(x, w)
    zero = Constant<value = int32 {0}>()
    y = Where(keep, sums, zero)
    divided = Div(y, step)
    least = Constant<value = int32 {0}>()
    most = Constant<value = int32 {255}>()
    clipped = Clip(divided, least, most)
    codes = Cast<to = 2>(clipped)
}"""


def model() -> ir.Model:
    w = np.random.default_rng(0).integers(-128, 128, (40, 24), np.int8)
    return ground.graph(TEXT, w=w, step=np.array(7, np.int32))


def written(target: GpuTarget, folder: Path) -> Path:
    """``folder``, with the program for ``target``."""
    folder.mkdir()
    target.package(model(), folder)
    return folder


def check(session: Any, scratch: Path) -> None:
    """``session`` gives the bits of ONNX Runtime, within one block of threads and over several."""
    ir.save(model(), scratch / "model.onnx")
    reference = open_session(scratch / "model.onnx")
    for rows in (1, 300):
        drawn = np.random.default_rng(rows)
        feeds = {"x": drawn.integers(0, 256, (rows, 40), np.uint8), "keep": drawn.integers(0, 2, (rows, 1)) > 0}
        for found, expected in zip(session.run(None, feeds), reference.run(None, feeds), strict=True):
            assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
            assert found.any()
