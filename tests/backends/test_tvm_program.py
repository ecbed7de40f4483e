"""Folders compiled for TVM: what is in them, how they run, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile import backends, cli
from qcompile.backends import legality
from qcompile.backends.base import open_program
from qcompile.backends.tvm import parameters, require
from qcompile.backends.tvm.program import Session
from qcompile.calibration.runner import run_session
from qcompile.errors import UserError
from qcompile.generation import Decoder
from qcompile.models.architectures import cached_export
from qcompile.recipe import RECIPES, by_name
from tests.integer.programs import texts

FILES = {"program.so", "program.json", "parameters.safetensors", "manifest.json", "report.html"}


@pytest.fixture(scope="module")
def model() -> Path:
    return cached_export("llama")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA with static codes."""
    out = tmp_path_factory.mktemp("tvm") / "out"
    qcompile.compile(model, recipe="w8a8", target="llvm", max_samples=4, max_length=16, output=out).close()
    return out


def test_a_folder_holds_a_library_parameters_and_their_description(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    described = json.loads((folder / "program.json").read_text())
    assert [port["name"] for port in described["inputs"]] == ["input_ids", "attention_mask"]
    assert described["parameters"] == list(parameters.read(folder / "parameters.safetensors"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["end_to_end"]["sqnr_db"] > 15
    linears = [k for k in manifest["kernels"] if k["kernel"] in ("matmul_integer", "integer_linear")]
    assert len(linears) >= 14 and all(k["low_bit"] for k in linears)


def test_batch_and_length_are_dynamic(folder: Path) -> None:
    program = open_program(folder)
    alone = program(texts(1, 9))
    together = program({name: np.repeat(array, 3, axis=0) for name, array in texts(1, 9).items()})
    for name, array in alone.items():
        assert together[name].shape == (3, *array.shape[1:])
        np.testing.assert_allclose(together[name][1:2], array, rtol=0, atol=1e-4)


def test_verify_and_bench(folder: Path, model: Path) -> None:
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["verify", str(folder), "--model", str(model), "--length", "16"]) == 0
    assert cli.main(["bench", str(folder), "--against", str(model), "--seq", "8", "--rounds", "2"]) == 0


def test_compiling_twice_gives_identical_bytes(model: Path, folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    qcompile.compile(model, recipe="w8a8", target="llvm", max_samples=4, max_length=16, output=again).close()
    for name in ("program.so", "program.json", "parameters.safetensors"):
        digests = [hashlib.sha256((path / name).read_bytes()).hexdigest() for path in (folder, again)]
        assert digests[0] == digests[1], name


def test_a_wrong_input_is_named(folder: Path) -> None:
    program, feeds = open_program(folder), texts(1, 4)
    with pytest.raises(UserError, match="attention_mask"):
        program({"input_ids": feeds["input_ids"]})
    with pytest.raises(UserError, match="float32"):
        program({**feeds, "input_ids": feeds["input_ids"].astype(np.float32)})


def test_a_processor_that_refuses_the_program_is_told_as_such() -> None:
    """Not as a failure of ONNX Runtime, which has no part in it."""

    def refuse(*given: Any) -> None:
        raise RuntimeError("AMX tiles are refused here")

    session = object.__new__(Session)  # without the program that this machine could run
    session.__dict__.update(_inputs=[], _outputs=[], _parameters=[], _run=refuse)
    with pytest.raises(UserError, match=r"^TVM cannot run the program: AMX tiles are refused here") as error:
        run_session(session, None, {})
    assert "compile it again on this machine" in str(error.value.hint)


def test_what_would_be_read_beyond_a_table_is_refused_and_verify_asks_for_none(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    qcompile.compile(cached_export("bert"), recipe="float", target="llvm", max_samples=2, max_length=16, output=folder)
    described = json.loads((folder / "program.json").read_text())
    rows = next(port["rows"] for port in described["inputs"] if port["name"] == "input_ids")
    assert described["longest"] == 64 and rows > 64
    with pytest.raises(UserError, match="has 65 tokens, but the program has 64 positions"):
        open_program(folder)(texts(1, 65))
    with pytest.raises(UserError, match=f"ids from {rows} to {rows}, its table {rows} rows"):
        open_program(folder)({**texts(1, 1), "input_ids": np.array([[rows]])})
    assert cli.main(["verify", str(folder)]) == 0


def test_a_decoder_with_its_cache_says_what_it_says_without(tmp_path: Path) -> None:
    path, out = cached_export("llama", with_past=True), tmp_path / "past"
    qcompile.compile(path, recipe="w4a16_g32", target="llvm", max_samples=2, max_length=16, output=out).close()
    ids = texts(1, 7)["input_ids"]
    steps = Decoder.open(out)
    stepped = [steps.feed(ids[:, n : n + 1]) for n in range(7)]
    whole = Decoder.open(out).feed(ids)
    np.testing.assert_allclose(np.concatenate(stepped, axis=1), whole, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------- what is legal


def test_a_scheme_that_the_target_cannot_run_is_refused_with_the_nearest(model: Path) -> None:
    with pytest.raises(UserError) as error:
        qcompile.compile(model, recipe="w4a8_g32", target="android")
    assert "int4 g32 symmetric" in error.value.message
    assert "linear: int4 per_channel symmetric x uint8 per_token" in str(error.value.hint)
    with pytest.raises(UserError) as error:
        qcompile.compile(model, recipe="w8a8kv4", target="llvm")
    assert "cache" in error.value.message and "leave cache out" in str(error.value.hint)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_target_takes_every_named_recipe_but_those_with_a_quantised_cache(name: str) -> None:
    for target in backends.TARGETS:
        complaint = legality.complaint(by_name(name), target)
        assert (complaint is not None) == ("kv" in name and target not in legality.LENIENT), (target, complaint)


def test_the_nearest_scheme_is_one_that_is_legal() -> None:
    for name in ("w4a8_g32", "w8a8_static_g64", "w3a4_g128"):
        for rule in by_name(name).rules:
            if legality.refused(rule, "llvm"):
                found = legality.nearest(rule, "llvm")
                assert found is not None and not legality.refused(found, "llvm")


def test_targets_are_listed_without_importing_a_runtime() -> None:
    code = "import sys; from qcompile.cli import main; sys.argv = ['qcompile', 'targets']\n"
    code += "try: main()\nexcept SystemExit: pass\nprint(sorted({'tvm', 'onnxruntime', 'torch'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "in low bits on llvm" in shown and "in low bits on cuda, opencl, metal, android, ios" in shown
    assert shown.splitlines()[-1] == "[]"


def test_without_tvm_the_command_that_installs_it_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(require, "is_installed", lambda: False)
    with pytest.raises(UserError) as error:
        backends.by_name("llvm").package(None, Path())  # type: ignore[arg-type]
    assert error.value.hint == "pip install 'qcompile-nn[tvm]'"


# --------------------------------------------------------------------------- the file of parameters


def test_parameters_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.array(3.5, np.float32), "c": np.array([True, False]),
        "d": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    }  # fmt: skip
    parameters.write(tmp_path / "p", arrays)
    found = parameters.read(tmp_path / "p")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_damaged_file_of_parameters_is_refused(tmp_path: Path) -> None:
    parameters.write(tmp_path / "p", {"a": np.zeros(64, np.float32)})
    whole = (tmp_path / "p").read_bytes()
    for text in (whole[:-4], whole[:20], b"", b"\xff" * 64):
        (tmp_path / "p").write_bytes(text)
        with pytest.raises(UserError, match="parameters"):
            parameters.read(tmp_path / "p")
