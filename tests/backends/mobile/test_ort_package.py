"""Packages for ONNX Runtime on phones: what is in them, what is said of them, what they compute."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys

import numpy as np
import onnxruntime as ort
import pytest

import qcompile
from qcompile.backends import by_name
from qcompile.backends.mobile.ort_convert import ASK
from qcompile.backends.mobile.ort_format import read_verdicts
from qcompile.driver import CompiledModel
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export

SAMPLES = {
    "android": ["android/app/build.gradle.kts", "android/app/src/main/kotlin/MainActivity.kt", "android/cpp/main.cc"],
    "ios": ["ios/Package.swift", "ios/Podfile", "ios/Sources/Program/Program.swift"],
}


# Elsewhere, and where a sandbox forbids fixed addresses, the order in an .ort file is drawn by chance.
ORDERED = ["model.ort"] if sys.platform == "linux" and ctypes.CDLL(None).personality(ASK) >= 0 else []


@functools.cache
def compiled(platform: str) -> CompiledModel:
    target = f"{platform}{{runtime=onnxruntime}}"
    return qcompile.compile(cached_export("llama"), recipe="w4a16_g32", target=target, max_samples=2, max_length=16)


@pytest.mark.parametrize("platform", ("android", "ios"))
def test_the_folder_holds_the_program_what_it_needs_and_a_sample(platform: str) -> None:
    folder = compiled(platform).folder
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = ["model.ort", "model.onnx", "required_operators_and_types.config", "README.md", "SHA256SUMS"]
    assert found >= {*expected, *SAMPLES[platform]}
    for name in found - {"model.ort", "model.onnx", "report.html"}:
        assert "{{" not in (folder / name).read_text(), f"{name} has a place that nothing filled"
    operators = (folder / "required_operators_and_types.config").read_text()
    assert "com.microsoft;1;MatMulNBits" in operators
    assert str(folder.parent) not in operators


@pytest.mark.parametrize("platform", ("android", "ios"))
def test_the_checksums_are_those_of_the_files(platform: str) -> None:
    folder = compiled(platform).folder
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    unlisted = {"SHA256SUMS", "manifest.json", "report.html"}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - unlisted
    assert listed == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}


def test_the_program_keeps_its_interface_and_computes_the_same() -> None:
    folder = compiled("android").folder
    sessions = [ort.InferenceSession(str(folder / name)) for name in ("model.onnx", "model.ort")]
    ports = [[(p.name, p.type, p.shape) for p in (*s.get_inputs(), *s.get_outputs())] for s in sessions]
    assert ports[0] == ports[1]
    ids = np.random.default_rng(0).integers(3, 90, (2, 11))
    results = [s.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0] for s in sessions]
    assert results[0].tobytes() == results[1].tobytes()


def test_the_report_tells_what_was_run_and_what_was_not() -> None:
    made = compiled("android")
    device = made.manifest["device"]
    assert device["ship"] == ["model.ort"]
    assert device["bytes"] == (made.folder / "model.ort").stat().st_size
    assert any("the same bits as model.onnx" in line for line in device["run"])
    assert any("not built here" in line for line in device["not_run"])
    assert device["usability"]["NNAPI"]["as_is"] == "NO"
    html = (made.folder / "report.html").read_text()
    assert "On the device" in html
    assert "CoreML MLProgram" in html


def test_the_same_program_gives_the_same_bytes() -> None:
    again = qcompile.compile(
        cached_export("llama"), recipe="w4a16_g32", target="android{runtime=onnxruntime}", max_samples=2, max_length=16
    )
    with again:
        for name in ("model.onnx", *ORDERED, "required_operators_and_types.config", "README.md"):
            assert (again.folder / name).read_bytes() == (compiled("android").folder / name).read_bytes()


def test_verdicts_are_read_from_the_words_of_the_check() -> None:
    lines = [
        "6 partitions with a total of 69/78 nodes can be handled by the NNAPI EP.",
        "Model should perform well with NNAPI as is: NO",
        "2 partitions with a total of 75/78 nodes can be handled by the NNAPI EP.",
        "Model should perform well with NNAPI if modified to have fixed input shapes: MAYBE",
    ]
    expected = {"as_is": "NO", "fixed_shapes": "MAYBE", "nodes": "75/78", "partitions": 2}
    assert read_verdicts(lines) == {"NNAPI": expected}


@pytest.mark.parametrize(
    ("target", "hint"),
    (
        ("androd", "did you mean android?"),
        ("android{runtime=onxruntime}", "did you mean onnxruntime?"),
        ("ios{runtme=onnxruntime}", "did you mean runtime?"),
    ),
)
def test_a_misspelt_target_or_option_gets_the_nearest(target: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        by_name(target)
    assert caught.value.hint == hint
