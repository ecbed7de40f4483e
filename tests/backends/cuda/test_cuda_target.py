"""The target cuda: what is in its folder, what its code computes, and what is refused. No GPU is used."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

import qcompile
from qcompile import backends, cli
from qcompile.backends.cuda import driver, toolkit
from qcompile.backends.gpu.program import Session, opened
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export
from qcompile.pipeline import Arrays
from tests.backends.cuda.emulated import Emulated
from tests.integer.programs import compiled as on_cpu
from tests.integer.programs import texts

PROGRAM = {"program.cu", "program.ptx", "program.cubin", "program.json", "program.parameters"}
FILES = {*PROGRAM, "manifest.json", "report.html"}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


@functools.cache
def compiled() -> Path:
    """A small BERT in whole numbers."""
    folder = Path(tempfile.mkdtemp(prefix="cuda-target")) / "out"
    qcompile.compile(
        cached_export("bert"), recipe="w8a8_static", passes="os_plus,int_only", target="cuda", max_samples=8,
        max_length=24, output=folder,
    ).close()  # fmt: skip
    return folder


@functools.cache
def emulated() -> tuple[Emulated, Session]:
    device = Emulated(compiled() / "program.cu", Path(tempfile.mkdtemp(prefix="cuda-emulated")))
    return device, Session(compiled(), device)


@needs_nvcc
def test_the_folder_holds_source_ptx_machine_code_and_a_plan() -> None:
    folder = compiled()
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "program.cubin").read_bytes()[:4] == b"\x7fELF"
    assert ".target sm_80" in (folder / "program.ptx").read_text()
    described = json.loads((folder / "program.json").read_text())
    entries = set(_entries(folder))
    assert {launch["kernel"] for launch in described["launches"]} == entries
    assert sum(kernel["low_bit"] for kernel in described["kernels"]) >= 12


def _entries(folder: Path) -> list[str]:
    lines = (folder / "program.ptx").read_text().splitlines()
    return [line.split()[2].rstrip("(") for line in lines if ".entry" in line]


@needs_nvcc
def test_the_manifest_tells_what_was_compiled_and_that_it_was_not_run() -> None:
    device = json.loads((compiled() / "manifest.json").read_text())["device"]
    assert device["kernels"] == len(_entries(compiled()))
    assert 0 < device["registers"] <= 255 and device["spilled"] == 0
    assert any("for want of a GPU" in line for line in device["not_run"])
    assert device["bytes"] == sum((compiled() / name).stat().st_size for name in device["ship"])


@needs_nvcc
@pytest.mark.skipif(shutil.which("g++") is None, reason="the source runs on a CPU through g++: apt install g++")
@pytest.mark.parametrize(("rows", "length", "padding"), [(1, 1, 0), (1, 17, 0), (2, 5, 3)])
def test_the_source_gives_onnx_runtimes_bits(rows: int, length: int, padding: int) -> None:
    feeds: Arrays = {name: np.pad(array, ((0, 0), (0, padding))) for name, array in texts(rows, length).items()}
    device, session = emulated()
    before = set(device.memory)
    found = session.run(None, feeds)
    expected = on_cpu("bert", "w8a8_static").run(feeds)
    for port, array in zip(session.get_outputs(), found, strict=True):
        assert array.dtype == expected[port.name].dtype
        assert array.tobytes() == expected[port.name].tobytes(), port.name
    assert device.launches > 0
    assert set(device.memory) == before  # what a run takes, it gives back


@needs_nvcc
def test_without_a_gpu_run_and_verify_name_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    with pytest.raises(UserError, match="needs an NVIDIA GPU") as caught:
        opened(compiled())
    assert "--target cpu" in str(caught.value.hint)
    assert cli.main(["verify", str(compiled())]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_a_machine_without_nvcc_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(toolkit, "installed", lambda tool: iter(()))
    monkeypatch.setattr("qcompile.driver.take", None)
    with pytest.raises(UserError, match="no nvcc") as caught:
        qcompile.compile(cached_export("bert"), recipe="w8a8_static", target="cuda", max_samples=2, max_length=16)
    assert str(caught.value.hint).startswith("pip install nvidia-cuda-nvcc")


def test_a_misspelt_arch_gets_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        backends.by_name("cuda{arch=sm90}")
    assert str(caught.value.hint).startswith("did you mean sm_90")


def test_targets_list_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets"]) == 0
    assert "options of cuda" in capsys.readouterr().out


def test_nvcc_of_pip_is_found_where_none_is_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert toolkit.find_nvcc() == str(tool)
