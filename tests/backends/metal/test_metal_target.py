"""The target metal: its source through a C++ compiler, and what it says of itself. No Apple machine is used."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.base import open_session
from qcompile.backends.gpu.program import Session
from qcompile.backends.metal import target
from qcompile.errors import UserError
from tests.backends.cuda.emulated import Emulated
from tests.backends.gpu import small
from tests.backends.metal.shim import shared


class OnShim(Emulated):
    """``gpu.program.Device`` in memory of this process: g++ compiles the very source, and loops stand for threads."""

    def __init__(self, source: Path, scratch: Path) -> None:
        self._library = ctypes.CDLL(str(shared(source, scratch)))
        self.memory: dict[int, Any] = {}

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """Tensors come first; the numbers behind them lie in one buffer, 8 bytes each."""
        tensors = [one.value for one in arguments if isinstance(one, ctypes.c_uint64)]
        numbers = (ctypes.c_int64 * 8)(*(one.value for one in arguments[len(tensors) :]))
        places = (ctypes.c_void_p * (len(tensors) + 1))(*tensors, ctypes.addressof(numbers))
        getattr(self._library, f"launch_{kernel}")(places, grid, block)


def test_the_source_gives_onnx_runtimes_bits(tmp_path: Path) -> None:
    folder = small.written(target.Metal(), tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {target.SOURCE, "program.json", "program.parameters"}
    assert (folder / target.SOURCE).read_text().count("#include") == 1
    small.check(Session(folder, OnShim(folder / target.SOURCE, tmp_path)), tmp_path)


def test_it_is_called_source_and_cannot_be_opened(tmp_path: Path) -> None:
    metal = target.Metal()
    folder = small.written(metal, tmp_path / "out")
    assert "source only, neither compiled nor run" in metal.facts(folder, [])["not_run"][0]
    with pytest.raises(UserError, match="source of a program for metal, which nothing here compiles or runs"):
        open_session(folder)


def test_a_kernel_of_too_many_buffers_is_refused() -> None:
    tensors = [["tensor", number] for number in range(31)]
    target._check([{"kernel": "joined", "arguments": tensors}])
    with pytest.raises(UserError, match="'joined' reads and writes more than Metal's 31 buffers"):
        target._check([{"kernel": "joined", "arguments": [*tensors, ["int64", 0]]}])
