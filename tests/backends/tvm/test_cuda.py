"""The CUDA kernels: their arithmetic on a model of a GPU, and the machine code that nvcc makes of them."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.tvm.kernels import reference
from qcompile.backends.tvm.kernels.cuda import build, layout
from qcompile.errors import UserError

MODEL = Path(__file__).with_name("gpu_model")
INT8_ROWS, INT8_GEMM, W4_ROWS, W4_GEMM = range(4)
Array = np.ndarray


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("the model of a GPU needs a C++ compiler: apt install g++")
    return found


@functools.cache
def library(compiler: str, folder: Path, shape: build.Shape) -> ctypes.CDLL:
    path = folder / f"model_{shape.k}_{shape.n}_{shape.group}.so"
    folders = [f"-I{build.FOLDER}", f"-I{MODEL}"]
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas", *folders]
    subprocess.run([*command, *shape.macros(), "-o", str(path), str(MODEL / "host_main.cpp")], check=True)
    return ctypes.CDLL(str(path))


def launch(
    model: ctypes.CDLL, kernel: int, grid: tuple[int, int], threads: int, arrays: Sequence[Array], m: int
) -> None:
    rows = ctypes.c_int(m)
    places = [array.ctypes.data for array in arrays] + [0] * (5 - len(arrays)) + [ctypes.addressof(rows)]
    model.launch(kernel, *grid, threads, (ctypes.c_void_p * 6)(*places))


def drawn(dtype: str, low: int, high: int, *shape: int) -> Array:
    return np.random.default_rng(len(shape) + high).integers(low, high, shape).astype(dtype)


@pytest.mark.parametrize("rows", (1, 3))
def test_rows_of_int8(compiler: str, tmp_path: Path, rows: int) -> None:
    shape = build.Shape(k=640, n=13, group=64, rows=3)
    x, w = drawn("int8", -128, 128, rows, shape.k), drawn("int8", -128, 128, shape.k, shape.n)
    y = np.full((rows + 1, shape.n), 77, np.int32)
    launch(library(compiler, tmp_path, shape), INT8_ROWS, (2, 1), 128, [x, layout.columns_first(w), y], rows)
    assert (y[:rows] == reference.matmul_integer(x, w)).all()
    assert (y[rows] == 77).all()


@pytest.mark.parametrize(("rows", "k", "n"), ((130, 208, 72), (17, 64, 129)))
def test_tensor_cores_on_int8(compiler: str, tmp_path: Path, rows: int, k: int, n: int) -> None:
    shape = build.Shape(k=k, n=n, group=k)
    x, w = drawn("int8", -128, 128, rows, k), drawn("int8", -128, 128, k, n)
    y = np.full((rows + 1, n), 77, np.int32)
    grid = (-(-n // 128), -(-rows // 128))
    launch(library(compiler, tmp_path, shape), INT8_GEMM, grid, 256, [x, layout.columns_first(w), y], rows)
    assert (y[:rows] == reference.matmul_integer(x, w)).all()
    assert (y[rows] == 77).all()


def low_bit(k: int, n: int, group: int) -> tuple[Array, Array, Array]:
    """Codes, scales that are powers of two, zero points; with small whole x every float sum is exact."""
    scale = np.ldexp(np.float32(1), drawn("int32", -2, 3, k // group, n)).astype(np.float32)
    return drawn("uint8", 0, 16, k, n), scale, drawn("uint8", 0, 16, k // group, n)


@pytest.mark.parametrize("group", (32, 128, 1152))
def test_rows_of_4_bits(compiler: str, tmp_path: Path, group: int) -> None:
    k, n = 1152, 11
    codes, scale, zero = low_bit(k, n, group)
    x = drawn("float16", -8, 9, 1, k)
    y = np.full((2, n), 77, np.float32)
    operands = [x, layout.codes_for_rows(codes), np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T), y]
    launch(library(compiler, tmp_path, build.Shape(k, n, group)), W4_ROWS, (2, 1), 128, operands, 1)
    assert (y[0] == reference.matmul_nbits(x, codes, scale, zero, group)[0]).all()
    assert (y[1] == 77).all()


@pytest.mark.parametrize(("rows", "n", "group"), ((70, 136, 128), (5, 43, 32)))
def test_tensor_cores_on_4_bits(compiler: str, tmp_path: Path, rows: int, n: int, group: int) -> None:
    k = 256
    codes, scale, zero = low_bit(k, n, group)
    x = drawn("float16", -8, 9, rows, k)
    y = np.full((rows + 1, n), 77, np.float32)
    operands = [x, layout.codes_for_gemm(codes), np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T), y]
    grid = (-(-n // 128), -(-rows // 64))
    launch(library(compiler, tmp_path, build.Shape(k, n, group)), W4_GEMM, grid, 128, operands, rows)
    assert (y[:rows] == reference.matmul_nbits(x, codes, scale, zero, group)).all()
    assert (y[rows] == 77).all()


# --------------------------------------------------------------------------- machine code

NEEDED_PTX = {
    "int8_rows": ("dp4a.s32.s32", "ld.global.nc.v4"),
    "int8_gemm": ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "ldmatrix", "cp.async.cg.shared.global"),
    "w4_rows": ("ld.global.nc.v4", "fma.rn.f32"),
    "w4_gemm": ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "ldmatrix", "cp.async.cg.shared.global"),
}
NEEDED_SASS = {
    "int8_rows": ("IDP.4A", "LDG.E.128"),
    "int8_gemm": ("IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
    "w4_rows": ("LDG.E.128", "FFMA", "LOP3"),
    "w4_gemm": ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "LDG.E.128"),
}


def nvcc_or_skip() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip(f"there is no nvcc: {build.NVCC_HINT}")


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
@pytest.mark.parametrize("name", ("integer", "nbits"))
def test_the_compiled_kernels_use_what_they_are_written_for(name: str, architecture: str) -> None:
    nvcc_or_skip()
    shape = build.Shape(4096, 4096)
    ptx, _ = build.compile_source(name, shape, architecture, "ptx")
    found = build.ptx_instructions(ptx.decode())
    assert found
    for kernel, instructions in found.items():
        for needed in NEEDED_PTX[kernel]:
            assert any(one.startswith(needed) for one in instructions), (kernel, needed)
    cubin, said = build.compile_source(name, shape, architecture, "cubin")
    used = build.resources(said)
    assert used.keys() == found.keys()
    for kernel, one in used.items():
        assert one.spilled == 0, kernel
        assert one.shared <= 48 * 1024
    if shutil.which("nvdisasm"):
        for kernel, instructions in build.machine_code(cubin).items():
            for needed in NEEDED_SASS[kernel]:
                assert any(one.startswith(needed) for one in instructions), (kernel, needed)


def test_a_shape_that_has_no_kernel_is_refused() -> None:
    with pytest.raises(UserError, match="groups of 48"):
        build.compile_source("nbits", build.Shape(4096, 4096, group=48), "sm_80", "ptx")
    with pytest.raises(UserError, match="16-byte"):
        layout.columns_first(np.zeros((20, 8), np.int8))
    with pytest.raises(UserError, match="pieces of 128"):
        layout.codes_for_rows(np.zeros((160, 8), np.uint8))
