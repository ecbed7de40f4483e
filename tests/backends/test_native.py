"""Programs with kernels of their own: the same results bit for bit, and no library is loaded that is not known."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile import cli, manifest
from qcompile.backends.base import open_program
from qcompile.backends.onnxruntime_cpu import OnnxRuntimeCpu
from qcompile.backends.ort.native import build, chains
from qcompile.backends.ort.native.source import SOURCE, source
from qcompile.calibration.library import LIBRARY, library_beside
from qcompile.calibration.runner import open_session
from qcompile.errors import UserError
from qcompile.graph.integer import BODIES
from qcompile.graph.workspace import Workspace
from qcompile.models.architectures import cached_export
from qcompile.proof.prove import prove
from tests.backends.ground import graph


def compiled(name: str, recipe: str = "w8a8_static", passes: str = "os_plus,int_only", **options: Any) -> Any:
    return qcompile.compile(
        str(cached_export(name)), recipe=recipe, passes=passes, max_samples=2, max_length=16, **options
    )


def needs_compiler() -> None:
    try:
        build.find_compiler()
    except UserError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module", params=("bert w8a8_static", "llama w8a8"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model, compiled without and with kernels."""
    needs_compiler()
    name, recipe = request.param.split()
    folders = tmp_path_factory.mktemp("plain") / "out", tmp_path_factory.mktemp("native") / "out"
    for folder, target in zip(folders, ("cpu", "cpu{kernels=1}"), strict=True):
        compiled(name, recipe, target=target, output=folder).close()
    return folders


def test_every_integer_operator_has_a_kernel() -> None:
    assert sorted(re.findall(r'\{FACE, "(\w+)"', source())) == sorted(BODIES)


def test_kernels_give_what_bodies_give(pair: tuple[Path, Path]) -> None:
    native = pair[1]
    programs = [open_program(folder) for folder in pair]
    inputs = ir.load(native / "model.onnx").graph.inputs
    generator = np.random.default_rng(0)
    for tokens in (1, 7, 40):
        ids = generator.integers(0, 90, (2, tokens))
        drawn = {"input_ids": ids, "attention_mask": np.arange(tokens) < np.array([[tokens], [tokens // 2 + 1]])}
        feeds = {str(v.name): drawn.get(str(v.name), np.zeros_like(ids)).astype(np.int64) for v in inputs}
        first, second = (program(feeds) for program in programs)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    bare = open_session(native / "model.onnx", threads=1)  # without the library: the bodies of the same file
    for found, expected in zip(bare.run(None, feeds), programs[1](feeds).values(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_threads_share_the_work(tmp_path: Path) -> None:
    needs_compiler()
    text = """g (int32[b, s, 256] x, bool[b, 1, 256] flags) => (uint8[b, s, 256] codes, int32[b, s, 1] total) {
        normal = qcompile.IntegerLayerNorm <epsilon = 5> (x)
        gelu = qcompile.IntegerGelu <unit = 1048576> (normal)
        turned = qcompile.RequantizeSigned <low = -500000, high = 500000> (gelu, m, s)
        product = qcompile.MultiplyWide <narrow = 64, divisor = 1, low = -500000, high = 500000> (turned, gelu)
        codes, total = qcompile.IntegerSoftmax <lift = 1> (product, flags, period)
    }"""
    m = np.random.default_rng(0).integers(-(2**15) + 1, 2**15, 256).astype(np.int32)
    constants = {"m": m, "s": np.asarray(2, np.int32), "period": np.asarray(2**14, np.int32)}
    model = graph(text, **constants)
    feeds = {
        "x": np.random.default_rng(1).integers(-(2**24), 2**24, (2, 300, 256)).astype(np.int32),
        "flags": np.random.default_rng(2).random((2, 1, 256)) < 0.7,
    }
    build.write_library(tmp_path)
    program = ir.to_proto(model).SerializeToString()
    expected = open_session(program, threads=1).run(None, feeds)
    for threads in (1, 3):
        found = open_session(program, threads=threads, library=tmp_path / LIBRARY).run(None, feeds)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_proof_holds_with_functions_in_the_file(pair: tuple[Path, Path]) -> None:
    grades = [prove(folder / "model.onnx", levels=("basic",)) for folder in pair]
    assert [proof.grade for proof in grades] == ["A", "B"]
    assert [proof.all_findings for proof in grades] == [[], []]


def test_the_manifest_lists_the_library_and_its_compiler(pair: tuple[Path, Path]) -> None:
    plain, native = (manifest.load(folder) for folder in pair)
    assert plain["files"].keys() == {"model.onnx"}
    assert native["files"].keys() == {"model.onnx", LIBRARY, SOURCE}
    assert native["target"]["name"] == "cpu{kernels=1}"
    assert native["passes"][-1]["facts"]["kernels compiler"] == build.compiler_version()
    assert native["end_to_end"] == plain["end_to_end"]
    assert (pair[1] / SOURCE).read_text().startswith("/* Kernels of the integer operators of qcompile")


def test_an_unknown_library_is_not_loaded(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pair[1], folder)
    model = folder / "model.onnx"
    assert library_beside(model) == folder / LIBRARY
    (folder / LIBRARY).write_bytes((folder / LIBRARY).read_bytes() + b"\0")
    with pytest.raises(UserError, match="is not the library that was compiled with the program; it is not loaded"):
        open_program(folder)
    assert cli.main(["verify", str(folder)]) == 1
    assert f"{LIBRARY} is not the file that was written" in capsys.readouterr().out
    record = json.loads((folder / manifest.FILE).read_text())
    del record["files"][LIBRARY]
    (folder / manifest.FILE).write_text(json.dumps(record))
    assert library_beside(model) is None
    (folder / manifest.FILE).unlink()
    assert library_beside(model) is None


def test_a_file_that_is_no_library_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / LIBRARY
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot load the model"):
        open_session(pair[1] / "model.onnx", threads=1, library=broken)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="the kernels need a C compiler, and there is none") as caught:
        compiled("bert", target="cpu{kernels=1}")
    assert "apt install gcc" in caught.value.hint


def test_what_the_compiler_refuses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_compiler()
    monkeypatch.setattr(build, "source", lambda: "#error no such thing")
    build._compiled.cache_clear()
    with pytest.raises(UserError, match=r"cannot compile the kernels: .*no such thing"):
        build.write_library(tmp_path)
    build._compiled.cache_clear()


def test_a_program_without_integer_operators_gets_no_library(capsys: pytest.CaptureFixture[str]) -> None:
    needs_compiler()
    with compiled("bert", passes="os_plus", target="cpu{kernels=1}") as result:
        assert result.manifest["files"].keys() == {"model.onnx"}
    assert "kernels=1 changed nothing" in capsys.readouterr().err


def test_the_target_is_named_with_its_options() -> None:
    assert OnnxRuntimeCpu().target.name == "cpu"
    assert OnnxRuntimeCpu(kernels=1).target.name == "cpu{kernels=1}"
    assert OnnxRuntimeCpu(accuracy_level=4, kernels=1).target.name == "cpu{accuracy_level=4 kernels=1}"


# --------------------------------------------------------------------------- chains

VECTOR = np.arange(8, dtype=np.int32)
LIFTS = (2**VECTOR * 2**16).astype(np.int32)
CHAINS = {
    # before, clip, lift, after, clip, cast: all in one
    "a = Add (x, v) b = Max (a, low) c = Min (b, high) d = Mul (c, two) e = R (d, m, s) f = Add (e, two) "
    "g = Cast <to = 2> (f) y = Cast <to = 6> (g)": ["RescaleToUint8", "Cast"],
    "a = Sub (x, v) e = R (a, m, s) y = Cast <to = 6> (e)": ["Rescale"],
    # each column lifted by its own, and clipped where that needs it; an end beyond is another clip
    "a = Max (x, low) b = Min (a, high) c = Max (b, lows) d = Min (c, highs) e = Mul (d, lifts) y = R (e, m, s)": [
        "Rescale"
    ],
    "a = Add (x, v) b = Mul (a, few) y = R (b, m, s)": ["Rescale"],
    "a = Max (x, lows) b = Min (a, v) c = Mul (b, lifts) y = R (c, m, s)": ["Max", "Min", "Rescale"],
    "a = Mul (x, v) y = R (a, m, s)": ["Mul", "Rescale"],
    "e = R (x, m, s) f = Add (x, e) g = Max (f, low) y = Min (g, high)": ["Rescale"],
    # two readers: what lies between stays
    "a = Add (x, v) e = R (a, m, s) y = Sub (e, a)": ["Add", "Rescale", "Sub"],
    "e = R (x, m, s) f = Add (e, e) y = Max (f, low)": ["Rescale", "Add", "Max"],
    # two that meet: the first takes the sum
    "e = R (x, m, s) f = R (x, m, s) y = Add (e, f)": ["Rescale", "Rescale"],
    # a constant less x is no sum with its negative
    "a = Sub (v, x) y = R (a, m, s)": ["Sub", "Rescale"],
}


TURNS = {
    "a = Transpose <perm = [0, 2, 1, 3]> (x) b = Add (a, v) y = R (b, m, s)": ["RescaleTurned"],
    "a = R (x, m, s) b = Add (a, v) c = Cast <to = 2> (b) d = Transpose <perm = [0, 2, 1, 3]> (c) y = Cast <to = 6> (d)"
    : ["RescaleToUint8Turned", "Cast"],
    "a = Transpose <perm = [0, 2, 1, 3]> (x) b = Add (a, w) c = R (b, m, s) y = Transpose <perm = [0, 2, 1, 3]> (c)": [
        "Rescale"
    ],
    # turned otherwise, or with an operand that is not known
    "a = Transpose <perm = [0, 3, 1, 2]> (x) y = R (a, m, s)": ["Transpose", "Rescale"],
    "b = R (x, m, s) c = Add (b, x) y = Transpose <perm = [0, 2, 1, 3]> (c)": ["Rescale", "Transpose"],
}  # fmt: skip


@pytest.mark.parametrize("text", TURNS)
def test_a_turn_of_heads_and_tokens_is_taken_in(text: str, tmp_path: Path) -> None:
    needs_compiler()
    build.write_library(tmp_path)
    body = text.replace("R (", "qcompile.RequantizeSigned <low = -100, high = 100> (")
    draw = np.random.default_rng(0).integers
    constants = {"v": draw(0, 99, (1, 3, 1, 8)), "w": draw(0, 99, (5, 1)), "m": draw(-999, 999, (1, 3, 1, 8))}
    if any(part in text for part in ("perm = [0, 3, 1, 2]", "(a, w)", "(b, x)")):
        constants["m"] = np.asarray(999)
    if text.startswith("a = R"):
        constants |= {name: constants[name].transpose(0, 2, 1, 3) for name in ("v", "m")}
    held = {name: array.astype(np.int32) for name, array in constants.items()} | {"s": np.asarray(2, np.int32)}
    model = graph(f"g (int32[b, 5, 3, 8] x) => (int32[b, n, k, l] y) {{ {body} }}", **held)
    x = draw(-1000, 1000, (2, 5, 3, 8)).astype(np.int32)
    before = open_session(ir.to_proto(model).SerializeToString(), threads=1).run(None, {"x": x})
    with Workspace() as workspace:
        chains.rewrite(model, workspace)
        made = ir.to_proto(model).SerializeToString()
    assert [node.op_type for node in model.graph] == TURNS[text]
    for library in (None, tmp_path / LIBRARY):
        np.testing.assert_array_equal(open_session(made, threads=1, library=library).run(None, {"x": x})[0], before[0])


@pytest.mark.parametrize("text", CHAINS)
def test_chains(text: str) -> None:
    body = text.replace("R (", "qcompile.Requantize <low = -100, high = 100> (")
    constants = {
        "v": VECTOR,
        "two": np.asarray(2, np.int32),
        "low": np.asarray(-300, np.int32),
        "high": np.asarray(300, np.int32),
        "lifts": LIFTS,
        "few": LIFTS // 2**16,
        "lows": -((2**30 - 1) // LIFTS),
        "highs": (2**30 - 1) // LIFTS,
    }
    constants |= {"m": np.asarray(2**14, np.int32), "s": np.asarray(2, np.int32)}
    model = graph(f"g (int32[t, 8] x) => (int32[t, 8] y) {{ {body} }}", **constants)
    x = np.random.default_rng(0).integers(-1000, 1000, (5, 8)).astype(np.int32)
    before = open_session(ir.to_proto(model).SerializeToString(), threads=1).run(None, {"x": x})
    with Workspace() as workspace:
        assert chains.rewrite(model, workspace) == text.count("R (")
        after = open_session(ir.to_proto(model).SerializeToString(), threads=1).run(None, {"x": x})
    found = [node.op_type for node in model.graph]
    assert found == CHAINS[text]
    np.testing.assert_array_equal(before[0], after[0])
