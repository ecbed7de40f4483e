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
from qcompile.backends.tvm.kernels.cuda import build

COUNTED = (
    "LDG.E.128", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "IDP.4A", "IMMA.16832", "HMMA.16816", "FFMA", "LDL", "STL",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rates: bytes a second, and operations a second by unit."""

    name: str
    memory: float
    units: dict[str, float]


GPUS = {
    "sm_80": Gpu("A100 40 GB", 1.555e12, {"int8": 624e12, "float16": 312e12, "float32": 19.5e12, "dp4a": 78e12}),
    "sm_90": Gpu("H100 SXM", 3.35e12, {"int8": 1979e12, "float16": 989e12, "float32": 66.9e12, "dp4a": 134e12}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel on (m, k, n); ``unit``: what multiplies."""

    source: str
    kernel: str
    unit: str
    m: int
    k: int
    n: int

    @property
    def weight_bytes(self) -> float:
        codes = self.k * self.n
        return codes if self.source == "integer" else codes / 2 + self.k // build.Shape(1, 1).group * self.n * 5

    @property
    def bytes_moved(self) -> float:
        """W, x and y once each."""
        x = self.m * self.k * (1 if self.source == "integer" else 2)
        return self.weight_bytes + x + self.m * self.n * 4

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.k * self.n


CASES = (
    Case("nbits", "w4_rows", "float32", 1, 4096, 4096),
    Case("nbits", "w4_rows", "float32", 1, 4096, 14336),
    Case("nbits", "w4_gemm", "float16", 512, 4096, 4096),
    Case("integer", "int8_rows", "dp4a", 1, 4096, 4096),
    Case("integer", "int8_gemm", "int8", 512, 4096, 4096),
)


def measured(case: Case, architecture: str) -> dict[str, Any]:
    gpu = GPUS[architecture]
    cubin, said = build.compile_source(case.source, build.Shape(case.k, case.n), architecture, "cubin")
    used = build.resources(said)[case.kernel]
    instructions = build.machine_code(cubin)[case.kernel]
    counted = Counter(name for one in instructions for name in COUNTED if one.startswith(name))
    shape = f"{case.m}x{case.k}x{case.n}"
    return {
        "key": f"{case.kernel} {shape} {architecture}", "kernel": case.kernel, "shape": shape,
        "architecture": architecture, "gpu": gpu.name, "unit": case.unit, "resources": dataclasses.asdict(used),
        "instructions": dict(counted), "size": len(instructions),
        "memory_us": 1e6 * case.bytes_moved / gpu.memory, "unit_us": 1e6 * case.operations / gpu.units[case.unit],
    }  # fmt: skip


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
        for case in CASES:
            results.add(measured(case, architecture) | {"compiler": build.compiler_version()})
    print(results.markdown())


if __name__ == "__main__":
    main()
