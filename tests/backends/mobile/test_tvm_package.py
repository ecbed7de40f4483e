"""Packages without a runtime: what is in them, what is said of them, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import qcompile
from qcompile.backends import by_name
from qcompile.backends.mobile import headers, link
from qcompile.driver import CompiledModel
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export
from qcompile.pipeline import Arrays
from tests.backends.mobile import native

FEEDS: Arrays = {"input_ids": np.array([[5, 6, 7, 8]]), "attention_mask": np.ones((1, 4), np.int64)}
LIBRARIES = {
    "android": "libprogram.so",
    "android{arch=x86_64}": "libprogram.so",
    "ios": "Kernels.xcframework/ios-arm64/Kernels.framework/Kernels",
}
SAMPLES = {
    "android": ["android/app/build.gradle.kts", "android/app/src/main/cpp/sample.c"],
    "ios": ["Package.swift", "swift/Program.swift", "Kernels.xcframework/Info.plist"],
}


@functools.cache
def compiled(target: str) -> CompiledModel:
    return qcompile.compile(cached_export("llama"), recipe="w4a16_g32", target=target, max_samples=2, max_length=16)


@pytest.mark.parametrize("platform", ("android", "ios"))
def test_the_folder_holds_the_program_its_loader_and_a_sample(platform: str) -> None:
    folder = compiled(platform).folder
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shipped = ["program.plan", "program.parameters", LIBRARIES[platform]]
    loader = {f"native/{name}" for name in ("qcompile_program.c", "qcompile_plan.c", "qcompile_shapes.c", "main.c")}
    assert found >= {*shipped, *loader, "README.md", *SAMPLES[platform]}
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in found - {"SHA256SUMS", "manifest.json", "report.html"}:
        data = (folder / name).read_bytes()
        assert listed[name] == hashlib.sha256(data).hexdigest()
        assert name in shipped or b"{{" not in data, f"{name} has a place that nothing filled"


def test_the_report_tells_what_was_linked_and_what_was_run() -> None:
    made = compiled("android")
    device = made.manifest["device"]
    assert device["triple"] == "aarch64-linux-android"
    assert device["bytes"] == sum((made.folder / name).stat().st_size for name in device["ship"])
    assert any("compiled and linked (elf, aarch64)" in line for line in device["not_run"])
    assert any("not built with an NDK" in line for line in device["not_run"])
    assert "libprogram.so" in (made.folder / "README.md").read_text()
    assert sum(kernel["low_bit"] for kernel in made.manifest["kernels"]) >= 14  # 7 linears in each of two layers


def test_four_bit_weights_take_four_bits() -> None:
    made = compiled("android")
    assert (made.folder / "program.parameters").stat().st_size < made.manifest["sizes"]["before"] / 4


def test_a_package_for_another_machine_says_so() -> None:
    with pytest.raises(UserError, match=r"is a package for aarch64-linux-android, and this machine is"):
        compiled("android").run(FEEDS)


@pytest.mark.skipif(not native.has_compiler() or sys.platform != "linux", reason="the emulator's library needs Linux")
def test_the_emulators_library_runs_here_and_computes_what_the_proof_did(tmp_path: Path) -> None:
    made = compiled("android{arch=x86_64}")
    header = headers.read(made.folder / "libprogram.so")
    assert header.machine == "x86_64"
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in header.needed:  # Android's names of what glibc calls libm.so.6
        (libraries / name).symlink_to(f"/lib/x86_64-linux-gnu/{name}.6")
    command = [str(native.runner()), str(made.folder), str(made.folder / "libprogram.so")]
    inputs = native.write_inputs(tmp_path, list(FEEDS.values()))
    done = subprocess.run(
        [*command, *inputs], env={"LD_LIBRARY_PATH": str(libraries)}, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith("logits [1, 4, 256] ")


@pytest.mark.parametrize(
    ("target", "hint"),
    (
        ("android{arch=aarch46}", "did you mean aarch64?"),
        ("android{arch=x86-64}", "did you mean x86_64?"),
        ("ios{arch=simulater}", "did you mean simulator?"),
    ),
)
def test_a_misspelt_arch_gets_the_nearest(target: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        by_name(target)
    assert caught.value.hint == hint


def test_a_missing_linker_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise UserError(f"no {name}", hint="apt-get install lld")

    monkeypatch.setattr(link, "find_linker", missing)
    monkeypatch.setattr("qcompile.backends.mobile.tvm_package.find_linker", missing)
    monkeypatch.setattr("qcompile.driver.take", None)
    with pytest.raises(UserError, match=r"no ld\.lld"):
        qcompile.compile(cached_export("llama"), recipe="w4a16_g32", target="android", max_samples=2, max_length=16)
