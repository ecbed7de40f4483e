"""The kernels on an emulated ARM processor: integers exactly, and as close to NumPy as on this machine.

A kernel is linked with a runner of its own, so that no runtime of TVM has to be there for ARM.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tvm: Any = pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.tvm.kernels import (  # noqa: E402
    features,
    matmul_integer,
    matmul_nbits,
    matmul_nbits_int8,
    matmul_w4a8,
    pack_integer,
    reference,
)  # fmt: skip
from qcompile.backends.tvm.kernels.program import compiled  # noqa: E402
from tests.backends.tvm.operands import drawn, integers, low_bit  # noqa: E402

Array = np.ndarray
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
RUNNER = Path(__file__).parents[1] / "backends/tvm/runner.c"
TARGET = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]}
CODES = {"i": 0, "u": 1, "f": 2}  # of DLPack
SUM_ERROR = 2e-6  # of the largest |y|
ROWS = (1, 3, 17)

pytestmark = pytest.mark.slow


def opened(kernel: Any, folder: Path) -> Callable[[Sequence[Array], tuple[int, int], str], Array]:
    """``kernel`` as a program for the emulated machine."""
    for tool, package in ((COMPILER, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"), (EMULATOR, "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}: apt install {package}")
    executable = compiled([kernel], TARGET)
    executable.mod.write_to_file(str(folder / "kernel.o"), "o")
    program, name = folder / "runner", f"-DKERNEL=__tvm_ffi_{kernel.attrs['global_symbol']}"
    files = [str(RUNNER), str(folder / "kernel.o")]
    subprocess.run([COMPILER, "-O1", "-static", name, *files, "-o", str(program)], check=True)

    def run(operands: Sequence[Array], shape: tuple[int, int], dtype: str) -> Array:
        with (folder / "tensors").open("wb") as file:
            for array in (*operands, np.full(shape, 77, dtype)):
                head = [CODES[array.dtype.kind], 8 * array.itemsize, array.ndim, *array.shape]
                file.write(np.array(head, np.int64).tobytes() + np.ascontiguousarray(array).tobytes())
        command = [EMULATOR, "-cpu", "cortex-a76", str(program), str(folder / "tensors")]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        return np.frombuffer(done.stdout, dtype).reshape(shape)

    return run


def test_the_dot_product_is_in_the_machine_code() -> None:
    assert features(TARGET).unit == "sdot"
    code = compiled([matmul_integer(64, 32, "int8", TARGET)], TARGET).mod.inspect_source("asm")
    assert code.count("sdot") >= 8


def close(found: Array, expected: Array) -> bool:
    return bool(np.abs(found - expected).max() <= SUM_ERROR * np.abs(expected).max())


@pytest.mark.parametrize("x_dtype", ("int8", "uint8"))
def test_integers_are_exact(x_dtype: str, tmp_path: Path) -> None:
    k, n = 67, 33
    run, weight = opened(matmul_integer(k, n, x_dtype, TARGET), tmp_path), integers("int8", k, n)
    for rows in ROWS:
        x = integers(x_dtype, rows, k, seed=rows)
        y = run((x, pack_integer(weight)), (rows, n), "int32")
        assert (y == reference.matmul_integer(x, weight)).all()


@pytest.mark.parametrize(("bits", "group"), ((4, 32), (3, 64), (2, None), (8, 32)))
@pytest.mark.parametrize("kind", (matmul_nbits, matmul_nbits_int8))
def test_low_bit_weights(kind: Callable[..., Any], bits: int, group: int | None, tmp_path: Path) -> None:
    k, n = 96, 20
    held = low_bit(k, n, bits, group, symmetric=False)
    run = opened(kind(k, n, bits, group, TARGET), tmp_path)
    expected = getattr(reference, kind.__name__)
    for rows in ROWS:
        x = drawn(rows).standard_normal((rows, k)).astype(np.float32)
        y = run((x, *held.packed()), (rows, n), "float32")
        assert close(y, expected(x, held.codes, held.scale, held.zero, held.rows))


def test_codes_on_both_sides(tmp_path: Path) -> None:
    k, n, bits, group = 96, 20, 4, 32
    held = low_bit(k, n, bits, group, symmetric=True)
    run = opened(matmul_w4a8(k, n, bits, group, TARGET, x_dtype="uint8", zero_points=False), tmp_path)
    for rows in ROWS:
        x, step = integers("uint8", rows, k, seed=rows), drawn(rows).uniform(0.1, 1, rows).astype(np.float32)
        zero = drawn(rows).integers(0, 256, rows).astype(np.int32)
        y = run((x, step, zero, *held.packed(sums=True)), (rows, n), "float32")
        assert close(y, reference.matmul_w4a8(x, step, zero, held.codes, held.scale, held.zero, held.rows))
