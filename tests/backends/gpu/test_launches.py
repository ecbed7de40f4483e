"""What a plan for a GPU launches: nothing of a program is left for a processor to loop over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.base import open_session
from qcompile.backends.cuda.native import Native
from qcompile.backends.gpu import package
from qcompile.backends.gpu.target import GpuTarget
from qcompile.backends.metal.target import Metal
from qcompile.backends.opencl.target import OpenCl
from qcompile.backends.webgpu.target import WebGpu
from tests.backends import ground

GROWN = (
    "agraph (float[b, 3, p, 8] past, float[b, 3, n, 8] x) => (float[b, 3, t, 8] present)"
    " { present = Concat <axis = 2> (past, x) }"
)


@pytest.mark.parametrize("target", [Native("sm_80"), OpenCl(), Metal(), WebGpu()], ids=lambda target: target.name)
def test_a_cache_and_what_it_grows_by_are_a_launch(target: GpuTarget, tmp_path: Path) -> None:
    made = package.write(ground.graph(GROWN), tmp_path, target.kind, target.threads)
    assert [launch.kernel for launch in made.launches] == ["concat_kernel"]


def test_a_device_grows_a_cache(platform: str, tmp_path: Path) -> None:
    OpenCl().package(ground.graph(GROWN), tmp_path)
    session = open_session(tmp_path)
    for before, length in ((5, 1), (0, 4), (60, 7)):
        parts = [np.random.default_rng(n).standard_normal((2, 3, n, 8)).astype(np.float32) for n in (before, length)]
        (present,) = session.run(None, dict(zip(("past", "x"), parts, strict=True)))
        np.testing.assert_array_equal(present, np.concatenate(parts, axis=2))
