"""Packages for phones' GPUs: what is in them, what their loader in C computes on PoCL, and what is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

import qcompile
from qcompile.backends import by_name
from qcompile.backends.mobile.gpu_package import MetalPackage, OpenClPackage
from qcompile.calibration.runner import open_session
from qcompile.driver import CompiledModel
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export
from qcompile.pipeline import Arrays
from tests.backends import ground
from tests.backends.gpu import small
from tests.backends.metal.shim import shared
from tests.backends.mobile import native
from tests.integer.programs import texts

SOURCE, LOADER = "program.cl", (native.SAMPLES / "native_gpu", native.SAMPLES / "native_opencl")
RUNTIME = Path(__file__).parents[1] / "metal/runtime"  # stands for Metal's classes
METAL = (native.SAMPLES / "native_gpu", native.SAMPLES / "native_metal", RUNTIME)
SANITIZED = ("cc", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
OPTIONS: dict[str, Any] = {"recipe": "w8a8_static", "max_samples": 8, "max_length": 24}
needs_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the stand-in jumps as x86-64 does")
needs_compiler = pytest.mark.skipif(not native.has_compiler(), reason="there is no C compiler")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small.written(OpenClPackage(), tmp_path / "out")


@pytest.fixture
def metal(tmp_path: Path) -> Path:
    return small.written(MetalPackage(), tmp_path / "out")


def printed(folder: Path, *arguments: str, **variables: str) -> tuple[str, str]:
    """What the package's own program prints, and what it complains of."""
    command = [str(native.runner(*SANITIZED, loader=LOADER)), str(folder), str(folder / SOURCE), *arguments]
    return run(command, ASAN_OPTIONS="detect_leaks=0", **variables)  # PoCL's own leaks


def printed_by_metal(folder: Path, *arguments: str, **variables: str) -> tuple[str, str]:
    """The same of a package for Metal, on the stand-in for its classes."""
    command = [str(native.runner(*SANITIZED, loader=METAL)), str(folder), str(folder / "program.metal"), *arguments]
    return run(command, **variables)


def run(command: list[str], **variables: str) -> tuple[str, str]:
    variables = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    return done.stdout, done.stderr


def test_the_folder_holds_source_plan_loader_and_sample(folder: Path) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    loader = {f"native/{name}" for name in ("qcompile_program.h", "qcompile_device.c", "qcompile_plan.c", "main.c")}
    assert found >= {SOURCE, "program.plan", "program.parameters", "README.md", "SHA256SUMS", *loader}
    for name in found - {"program.plan", "program.parameters"}:
        assert "{{" not in (folder / name).read_text(), f"{name} has a place that nothing filled"
    assert 'android:name="libOpenCL.so"' in (folder / "android/app/src/main/AndroidManifest.xml").read_text()
    assert SOURCE in (folder / "android/app/src/main/kotlin/MainActivity.kt").read_text()
    assert "nothing was run on one" in (folder / "README.md").read_text()


def expected(scratch: Path) -> tuple[list[str], str]:
    """Inputs of the small program, and what a loader must print for them: the bits of ONNX Runtime."""
    ir.save(small.model(), scratch / "model.onnx")
    feeds = {"x": np.full((300, 40), 200, np.uint8), "keep": np.arange(300)[:, None] % 3 > 0}
    results = open_session(scratch / "model.onnx").run(None, feeds)
    text = native.digests(dict(zip(("y", "codes"), results, strict=True)))
    return native.write_inputs(scratch, list(feeds.values())), text


@needs_compiler
def test_the_loader_gives_onnx_runtimes_bits_in_memory_that_it_may_use(platform: str, folder: Path) -> None:
    inputs, text = expected(folder)
    assert printed(folder, *inputs) == (text, "")


@needs_compiler
@needs_x86
def test_the_loader_for_metal_on_a_stand_in_for_its_classes(metal: Path, tmp_path: Path) -> None:
    kernels = {"KERNELS": str(shared(metal / "program.metal", tmp_path))}
    inputs, text = expected(tmp_path)
    assert printed_by_metal(metal, *inputs, **kernels) == (text, "")  # no leak, nothing released too often
    for variables, what in (
        ({"NO_METAL": "1"}, "Metal has no device here"),
        ({"FEW": "1"}, "a stand-in runs kernel 'matmul_kernel' in blocks of 8 threads at most, not 256"),
        ({"FAILS": "1"}, "Metal: it was lost"),
    ):
        assert what in printed_by_metal(metal, *inputs, **kernels, **variables)[1]
    (metal / "program.metal").write_text("broken")
    assert "a stand-in cannot compile the kernels: use of undeclared" in printed_by_metal(metal, *inputs, **kernels)[1]


def test_the_folder_for_metal_is_a_swift_package(metal: Path) -> None:
    found = {path.relative_to(metal).as_posix() for path in metal.rglob("*") if path.is_file()}
    shipped = {"program.metal", "program.plan", "native/qcompile_device.c"}
    assert found >= {*shipped, "Package.swift", "swift/Program.swift"}
    assert "{{" not in "".join((metal / name).read_text() for name in found - {"program.plan", "program.parameters"})
    assert '.linkedFramework("Metal")' in (metal / "Package.swift").read_text()
    assert "program.metal was neither compiled nor run" in (metal / "README.md").read_text()


@needs_compiler
def test_the_loader_says_what_is_wrong(platform: str, folder: Path) -> None:
    assert "OpenCL has no device here" in printed(folder, OCL_ICD_VENDORS="/nowhere/")[1]
    source = (folder / SOURCE).read_text()
    (folder / SOURCE).write_text("__kernel void broken(__global int* y) { y[0] = nowhere; }")
    error = printed(folder)[1]
    assert "cannot compile the kernels: " in error and "use of undeclared identifier 'nowhere'" in error
    (folder / SOURCE).write_text("__kernel void other(__global int* y) { y[0] = 1; }")
    assert "the source has no kernel 'matmul_kernel': it belongs to another plan" in printed(folder)[1]
    (folder / SOURCE).unlink()
    assert "cannot read '" in printed(folder)[1]
    (folder / SOURCE).write_text(source)
    plan = (folder / "program.plan").read_bytes()
    (folder / "program.plan").write_bytes(plan.replace(b"opencl\0\0", b"aarch64\0"))
    assert "this is opencl" in printed(folder)[1]


def test_what_phones_gpus_cannot_do_is_refused(tmp_path: Path) -> None:
    model = ground.graph("agraph (double[rows, 4] x) => (double[rows, 4] y) { y = Add(x, x) }")
    with pytest.raises(UserError, match="computes in float64") as caught:
        OpenClPackage().package(model, tmp_path)
    assert "leave gpu out" in str(caught.value.hint)
    for target in ("android{gpu=opencl runtime=onnxruntime}", "ios{gpu=metal runtime=onnxruntime}"):
        with pytest.raises(UserError, match=r"gpu=\w+ is of runtime=tvm"):
            by_name(target)


def compiled(folder: Path, passes: str, target: str = "android{gpu=opencl}") -> tuple[CompiledModel, CompiledModel]:
    """A small BERT as a package in ``folder``, and for ONNX Runtime."""
    made = [qcompile.compile(cached_export("bert"), target=one, passes=passes, **OPTIONS) for one in (target, "cpu")]
    made[0].save(folder)
    return made[0], made[1]


def given() -> list[Arrays]:
    """Texts of several sizes, the last one again."""
    sizes = ((1, 1, 0), (3, 9, 5), (1, 17, 0), (3, 9, 5))
    return [
        {name: np.pad(array, ((0, 0), (0, padding))) for name, array in texts(rows, length).items()}
        for rows, length, padding in sizes
    ]


@needs_compiler
@pytest.mark.slow
def test_an_integer_program_gives_onnx_runtimes_bits_at_every_size(platform: str, tmp_path: Path) -> None:
    package, cpu = compiled(tmp_path / "out", "os_plus,int_only")
    loaded = native.Loaded(LOADER, tmp_path / "out", SOURCE)
    sizes = []
    for feeds in given():
        expected = list(cpu.run(feeds).values())
        found = loaded.run(list(feeds.values()))
        assert [array.tobytes() for array in found] == [array.tobytes() for array in expected]
        sizes.append(loaded.memory)
    with pytest.raises(RuntimeError, match=r"input 'input_ids' has the id -1, its table \d+ rows"):
        loaded.run([np.full_like(array, -1) for array in given()[0].values()])
    loaded.close()
    device = package.manifest["device"]
    assert platform in device["run"][0] and any("a phone's GPU" in line for line in device["not_run"])
    assert sizes[0] < sizes[1] == sizes[3]


@needs_compiler
@needs_x86
@pytest.mark.slow
def test_an_integer_program_for_metal_gives_onnx_runtimes_bits_on_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, cpu = compiled(tmp_path / "out", "os_plus,int_only", "ios{gpu=metal}")
    monkeypatch.setenv("KERNELS", str(shared(tmp_path / "out/program.metal", tmp_path)))
    loaded = native.Loaded(METAL, tmp_path / "out", "program.metal")
    for feeds in given()[1:3]:
        found = loaded.run(list(feeds.values()))
        assert [array.tobytes() for array in found] == [array.tobytes() for array in cpu.run(feeds).values()]
    loaded.close()
    assert "neither compiled nor run" in package.manifest["device"]["run"][0]


@needs_compiler
@pytest.mark.slow
def test_a_program_of_floats_is_as_close_as_its_sums(platform: str, tmp_path: Path) -> None:
    _, cpu = compiled(tmp_path / "out", "os_plus")
    loaded = native.Loaded(LOADER, tmp_path / "out", SOURCE)
    for feeds in given()[:2]:
        for found, expected in zip(loaded.run(list(feeds.values())), cpu.run(feeds).values(), strict=True):
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    loaded.close()
