"""Decoders with a key/value cache on GPU targets: a prompt at once, then token by token, as in ONNX Runtime."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

import qcompile
from qcompile.backends.base import open_session
from qcompile.backends.tvm.program import Held
from qcompile.generation import Decoder
from qcompile.models.architectures import VOCAB, cached_export
from tests.backends.mobile import native
from tests.text import read

IDS = np.random.default_rng(0).integers(3, VOCAB, (2, 12))
SPLITS = ([12], [5, 1, 1, 5])
needs_compiler = pytest.mark.skipif(not native.has_compiler(), reason="there is no C compiler")


@functools.cache
def compiled(target: str) -> Path:
    """A small Llama with its cache, in whole numbers, for ``target``."""
    folder = Path(tempfile.mkdtemp(prefix="cache")) / "out"
    qcompile.compile(
        cached_export("llama", with_past=True), recipe="w8a8_static", passes="os_plus,int_only", target=target,
        max_samples=4, max_length=16, output=folder,
    ).close()  # fmt: skip
    return folder


def check(session: Any) -> None:
    """``session`` gives ONNX Runtime's bits, however the text is split."""
    reference = open_session(compiled("cpu"))
    for split in SPLITS:
        found, expected = (read(Decoder(one), IDS, split) for one in (session, reference))
        assert found.tobytes() == expected.tobytes(), split
        assert found.any()


@pytest.mark.slow
def test_on_opencl(platform: str) -> None:
    check(open_session(compiled("opencl")))


class Phone:
    """A package for a phone's GPU, run by its own loader, as a session for decoders with the ends of ``like``."""

    def __init__(self, folder: Path, like: Any) -> None:
        loader = (native.SAMPLES / "native_gpu", native.SAMPLES / "native_opencl")
        self._loaded = native.Loaded(loader, folder, "program.cl")
        self.get_inputs, self.get_outputs = like.get_inputs, like.get_outputs

    def run_with_ort_values(self, names: Sequence[str], values: Mapping[str, Any]) -> list[Held]:
        made = self._loaded.run([values[port.name].numpy() for port in self.get_inputs()])
        by_name = {port.name: Held(array) for port, array in zip(self.get_outputs(), made, strict=True)}
        return [by_name[name] for name in names]


@needs_compiler
@pytest.mark.slow
def test_in_a_package_for_a_phones_gpu(platform: str) -> None:
    check(Phone(compiled("android{gpu=opencl}"), open_session(compiled("cpu"))))
