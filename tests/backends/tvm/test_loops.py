"""The loops for GPUs on this processor, scheduled for a GPU as far as its source, and a library without TVM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from qcompile.backends.tvm.kernels import generic, host_target, matmul_integer, matmul_nbits, pack_integer, reference
from qcompile.backends.tvm.kernels.api import layout_of
from qcompile.backends.tvm.kernels.program import write_library
from tests.backends.tvm.operands import drawn, integers, low_bit, opened, tvm

GPU = {"kind": "cuda", "arch": "sm_80"}


def test_integer_loops() -> None:
    k, n, rows = 67, 33, 5
    x, weight = integers("uint8", rows, k), integers("int8", k, n)
    y = opened(generic.matmul_integer(k, n, "uint8", "loops"), "llvm")((x, pack_integer(weight)), (rows, n), "int32")
    assert (y == reference.matmul_integer(x, weight)).all()


def test_low_bit_loops() -> None:
    rows = 3
    for bits, symmetric in ((4, True), (3, False), (2, False), (8, True)):
        held = low_bit(96, 20, bits, 32, symmetric=symmetric)
        middle = 2 ** (bits - 1) if symmetric else None
        kernel = generic.matmul_nbits(layout_of(96, 20, bits, 32), middle, "loops")
        x = drawn(bits).standard_normal((rows, 96)).astype(np.float32)
        y = opened(kernel, "llvm")((x, *held.packed()), (rows, 20), "float32")
        expected = reference.matmul_nbits(x, held.codes, held.scale, held.zero, 32)
        assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max()


def test_the_loops_become_a_gpu_kernel() -> None:
    target = tvm.target.Target(GPU, host="llvm")
    kernels = [matmul_integer(128, 64, "int8", target), matmul_nbits(128, 64, 4, 32, target, zero_points=False)]
    module = tvm.IRModule({str(kernel.attrs["global_symbol"]): kernel for kernel in kernels})
    with target:
        made = tvm.compile(generic.scheduled(module, target), target=target)
    source = made.mod.imports[0].inspect_source("cuda")
    assert source.count("__global__") >= 2
    assert "threadIdx.x" in source


def test_a_library_runs_without_tvm(tmp_path: Path) -> None:
    k, n, rows = 64, 32, 4
    x, weight = integers("uint8", rows, k), integers("int8", k, n)
    write_library([matmul_integer(k, n, "uint8", host_target())], host_target(), tmp_path / "product.so")
    np.savez(tmp_path / "operands.npz", allow_pickle=False, x=x, w=pack_integer(weight))
    script = (
        "import sys; sys.modules['tvm'] = None\n"
        "import numpy as np, tvm_ffi\n"
        "held = np.load(sys.argv[1] + '/operands.npz'); y = np.zeros((4, 32), np.int32)\n"
        "product = tvm_ffi.load_module(sys.argv[1] + '/product.so')['matmul_integer']\n"
        "product(*(tvm_ffi.from_dlpack(a) for a in (held['x'].copy(), held['w'].copy(), y)))\n"
        "np.save(sys.argv[1] + '/y.npy', y)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert (np.load(tmp_path / "y.npy") == reference.matmul_integer(x, weight)).all()
