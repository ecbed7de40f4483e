"""The CUDA kernels as nvcc compiles them: registers, memory, instructions, and the least time that a GPU needs.

    python -m benchmarks.cuda_kernels --out benchmarks/results/cuda_kernels

Nothing is run: the time is the longer of the bytes at the memory's rate and the operations at the units' rate, both as
the maker publishes them (A100 40 GB for sm_80, H100 SXM for sm_90; dense). Needs nvcc, and nvdisasm for machine code.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from qcompile.backends.cuda.forecast import GPUS, unit_of
from qcompile.backends.tvm.kernels.cuda import build
from qcompile.backends.tvm.kernels.cuda.products import FEW, Product

COUNTED = (
    "LDG.E.128", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "IDP.4A", "IMMA.16832", "HMMA.16816", "FFMA", "LDL", "STL",
)  # fmt: skip


CASES = (
    (Product("w4", "float32", 4096, 4096, 128), 1),
    (Product("w4", "float32", 4096, 14336, 128), 1),
    (Product("w4", "float32", 4096, 4096, 128), 512),
    (Product("int8", "int8", 4096, 4096), 1),
    (Product("int8", "uint8", 4096, 4096), 512),
)


def measured(product: Product, rows: int, architecture: str) -> dict[str, Any]:
    kernel = product.kernels[rows > FEW]
    gpu, (unit, times) = GPUS[architecture], unit_of(kernel.name)
    cubin, said = build.compile_product(product, architecture, "cubin")
    instructions = build.machine_code(cubin)[kernel.name]
    counted = Counter(name for one in instructions for name in COUNTED if one.startswith(name))
    shape = f"{rows}x{product.k}x{product.n}"
    return {
        "key": f"{kernel.name} {shape} {architecture}", "kernel": kernel.name, "shape": shape,
        "architecture": architecture, "gpu": gpu.name, "unit": unit,
        "resources": dataclasses.asdict(build.resources(said)[kernel.name]),
        "instructions": dict(counted), "size": len(instructions),
        "memory_us": 1e6 * bytes_moved(product, rows) / gpu.memory,
        "unit_us": 1e6 * 2 * times * rows * product.k * product.n / gpu.units[unit],
    }  # fmt: skip


def bytes_moved(product: Product, rows: int) -> float:
    """W, x and y once each."""
    codes = product.k * product.n
    if product.kind == "w4":
        codes = codes // 2 + product.k // product.group * product.n * 5
    return codes + rows * (product.k * (1 if product.kind == "int8" else 4) + product.n * 4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="NAME", help="NAME.json and NAME.md; rows are added")
    given = parser.parse_args(arguments)
    command = f"python -m benchmarks.cuda_kernels --out {given.out}"
    results = Results(given.out, "cuda_kernels", model="kernels", threads=1, command=command)
    for architecture in build.ARCHITECTURES:
        for product, rows in CASES:
            results.add(measured(product, rows, architecture) | {"compiler": build.compiler_version()})
    print(results.markdown())


if __name__ == "__main__":
    main()
