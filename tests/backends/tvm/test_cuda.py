"""The CUDA kernels: their arithmetic on a model of a GPU, and the machine code that nvcc makes of them."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.cuda.toolkit import find_nvcc
from qcompile.backends.tvm.kernels import reference
from qcompile.backends.tvm.kernels.cuda import build, layout
from qcompile.backends.tvm.kernels.cuda.products import Kernel, Product, library
from qcompile.errors import UserError
from tests.backends.cuda.emulated import Emulated

Array = np.ndarray


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if shutil.which("g++") is None:
        pytest.skip("the model of a GPU needs a C++ compiler: apt install g++")
    folder = tmp_path_factory.mktemp("model")
    (folder / "program.cu").write_text(library(PRODUCTS) + "".join(product.source for product in PRODUCTS))
    return Emulated(folder / "program.cu", folder)


def launched(
    device: Emulated, product: Product, kernel: Kernel, arrays: Sequence[Array], sizes: Sequence[int], batch: int = 1
) -> Array:
    """The last of ``arrays``, which the kernel writes. ``sizes``: m, then n and k where they are arguments."""
    columns = sizes[1] if len(sizes) > 1 else product.n
    grid = batch * -(-sizes[0] // kernel.rows) * -(-columns // kernel.columns)
    arguments = [ctypes.c_void_p(array.ctypes.data) for array in arrays] + [ctypes.c_int(size) for size in sizes]
    device.launch(kernel.name, grid, kernel.threads, arguments)
    return arrays[-1]


def drawn(dtype: str, low: int, high: int, *shape: int) -> Array:
    return np.random.default_rng(len(shape) + high).integers(low, high, shape).astype(dtype)


FIXED, TALL, FREE = Product("int8", "uint8", 640, 13), Product("int8", "int8", 208, 129), Product("int8", "int8")
GROUPS, WHOLE = Product("w4", "float32", 1152, 43, 32), Product("w4", "float32", 160, 136, 160)
WIDE = Product("w4", "float32", 4256, 9, 128)  # more than is staged at once
PRODUCTS = [FIXED, TALL, FREE, GROUPS, WHOLE, WIDE]


@pytest.mark.parametrize("many", (False, True))
@pytest.mark.parametrize(("product", "rows"), ((FIXED, 3), (TALL, 130)))
def test_products_of_int8(device: Emulated, product: Product, rows: int, many: bool) -> None:
    rows = rows if many else 3
    low = np.iinfo(product.x).min
    x, w = drawn(product.x, low, low + 256, rows, product.k), drawn("int8", -128, 128, product.k, product.n)
    y = np.full((rows + 1, product.n), 77, np.int32)
    launched(device, product, product.kernels[many], [x, layout.columns_first(w), y], [rows])
    assert (y[:rows] == reference.matmul_integer(x, w)).all()
    assert (y[rows] == 77).all()


@pytest.mark.parametrize(("many", "sizes"), ((False, (2, 19, 48)), (True, (17, 35, 80))))
def test_batches_of_products_of_int8(device: Emulated, many: bool, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    x, w = drawn("int8", -128, 128, 3, m, k), drawn("int8", -127, 128, 3, n, k)
    y = np.full((4, m, n), 77, np.int32)
    launched(device, FREE, FREE.kernels[many], [x, w, y], sizes, batch=3)
    assert (y[:3] == x.astype(np.int32) @ w.astype(np.int32).transpose(0, 2, 1)).all()
    assert (y[3] == 77).all()


@pytest.mark.parametrize("many", (False, True))
@pytest.mark.parametrize(("product", "rows"), ((GROUPS, 5), (WHOLE, 37), (WIDE, 2)))
def test_products_of_4_bits(device: Emulated, product: Product, rows: int, many: bool) -> None:
    """Scales are powers of two, so sums of small numbers are exact; one x has 20 bits, which all count."""
    k, n, group = product.k, product.n, product.group
    count = -(-k // group)
    codes, zero = drawn("uint8", 0, 16, k, n), drawn("uint8", 0, 16, count, n)
    scale = np.ldexp(np.float32(1), drawn("int32", -2, 3, count, n)).astype(np.float32)
    x = drawn("float32", -8, 9, rows, k)
    x[-1], x[-1, 47] = 0, np.ldexp(2**20 - 1, -12)
    y = np.full((rows + 1, n), 77, np.float32)
    pack = layout.codes_for_gemm if many else layout.codes_for_rows
    operands = [x, pack(codes), np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T), y]
    launched(device, product, product.kernels[many], operands, [rows])
    assert (y[:rows] == exact(x, codes, scale, zero, group)).all()
    assert (y[rows] == 77).all()


def exact(x: Array, codes: Array, scale: Array, zero: Array, group: int) -> Array:
    place = np.arange(codes.shape[0]) // group
    weights = (codes.astype(np.float64) - zero[place]) * scale[place]
    found: Array = (x.astype(np.float64) @ weights).astype(np.float32)
    return found


# --------------------------------------------------------------------------- machine code

NEEDED = {
    "int8_rows": ("IDP.4A", "LDG.E.128"),
    "int8_gemm": ("IMMA.16832", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
    "w4_rows": ("LDG.E.128", "LDS.128", "FFMA", "LOP3"),
    "w4_gemm": ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDG.E.128"),
}
NEEDED_PTX = {
    "int8_rows": ("dp4a.", "ld.global.nc.v4"),
    "int8_gemm": ("mma.sync.aligned.m16n8k32.row.col.s32.", "ldmatrix", "cp.async.cg.shared.global"),
    "w4_rows": ("ld.global.nc.v4", "fma.rn.f32"),
    "w4_gemm": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "cp.async.cg.shared.global"),
}


@pytest.mark.parametrize(
    ("product", "architecture"),
    (
        (Product("int8", "uint8", 4096, 4096), "sm_80"),
        (Product("int8", "int8"), "sm_90"),
        (Product("w4", "float32", 4096, 4096, 128), "sm_90"),
        (Product("w4", "float32", 576, 1536, 576), "sm_80"),
    ),
)
def test_the_compiled_kernels_use_what_they_are_written_for(product: Product, architecture: str) -> None:
    try:
        find_nvcc()
    except UserError as error:
        pytest.skip(str(error))
    ptx, _ = build.compile_product(product, architecture, "ptx")
    found = build.ptx_instructions(ptx.decode())
    cubin, said = build.compile_product(product, architecture, "cubin")
    used = build.resources(said)
    assert used.keys() == found.keys() == {kernel.name for kernel in product.kernels}
    for kernel in product.kernels:
        short = f"{product.kind}_{'rows' if kernel.few else 'gemm'}"
        for needed in NEEDED_PTX[short]:
            assert any(one.startswith(needed) for one in found[kernel.name]), (kernel.name, needed)
        assert used[kernel.name].spilled == 0, kernel.name
        assert used[kernel.name].shared <= 48 * 1024
        if shutil.which("nvdisasm"):
            code = build.machine_code(cubin)[kernel.name]
            for needed in NEEDED[short]:
                assert any(one.startswith(needed) for one in code), (kernel.name, needed)


def test_a_shape_that_has_no_kernel_is_refused() -> None:
    with pytest.raises(UserError, match="groups of 48"):
        build.check(Product("w4", "float32", 4096, 4096, 48))
    with pytest.raises(UserError, match="16-byte"):
        layout.columns_first(np.zeros((20, 8), np.int8))
    with pytest.raises(UserError, match="pieces of 32"):
        layout.codes_for_rows(np.zeros((150, 8), np.uint8))
