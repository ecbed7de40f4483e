"""The target opencl: what is in its folder, what its code computes on a device, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from qcompile.models.architectures import cached_export
from tests.backends.gpu import small
from tests.integer.programs import compiled as on_cpu
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe", "passes"), [("bert", "w8a8_static", "os_plus,int_only")])
def test_an_integer_program_gives_onnx_runtimes_bits(
    platform: str, name: str, recipe: str, passes: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    options: dict[str, Any] = {"max_samples": 8, "max_length": 24}
    path = cached_export(name)
    qcompile.compile(path, recipe=recipe, passes=passes, target="opencl", output=folder, **options).close()
    device = json.loads((folder / "manifest.json").read_text())["device"]
    assert platform in device["run"][0] and device["not_run"] == []
    session = open_session(folder)
    for rows, length, padding in ((1, 1, 0), (1, 17, 0), (3, 9, 5)):
        given = {name: np.pad(array, ((0, 0), (0, padding))) for name, array in texts(rows, length).items()}
        found = dict(zip((port.name for port in session.get_outputs()), session.run(None, given), strict=True))
        assert same_bits(found, on_cpu(name, recipe, passes).run(given))
    assert cli.main(["verify", str(folder)]) == 0


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
