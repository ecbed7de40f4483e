"""The target ``cuda`` through TVM and nvcc: a folder that a machine with an NVIDIA GPU runs.

rewrite:  nodes -> kernels (``backends/tvm``), loops -> threads, calls -> launches of a plan
needs:    TVM and nvcc; no GPU
ensures:  integers exactly as ONNX computes them; the folder needs CUDA's driver and nothing of TVM
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.backends.base import Kernel, Program, open_program
from qcompile.backends.cuda import compiler
from qcompile.backends.tvm.require import require_tvm
from qcompile.pipeline import Arrays, Context


class Native:
    """The route of machine code for ``arch``."""

    description: ClassVar[str] = "a folder for NVIDIA GPUs: CUDA source, PTX, machine code, a plan of launches"
    kernels: ClassVar[tuple[str, ...]] = ("int8_gemm", "w4_gemm", "integer_linear", "weight_only_linear")

    def __init__(self, arch: str) -> None:
        self._arch = arch
        self._model: ir.Model | None = None  # what was packaged

    def lower(self, model: ir.Model, ctx: Context) -> int:
        require_tvm()
        from qcompile.backends.tvm.kernels.cuda.build import find_nvcc
        from qcompile.backends.tvm.translate import check

        find_nvcc()  # rather now than after the search for ranges

        model.graph.sort()
        check(model)
        return 0

    def kernels_of(self, model: Path) -> list[Kernel]:
        from qcompile.backends.tvm.program import describe

        kernels: list[Kernel] = describe(model.parent)["kernels"]
        return kernels

    def package(self, model: ir.Model, folder: Path) -> None:
        from qcompile.backends.cuda import package

        self._model = model
        package.write(model, folder, self._arch)

    def open(self, folder: Path) -> Program:
        """The same translation, compiled for this machine's processor."""
        from qcompile.backends.tvm import package
        from qcompile.backends.tvm.backend import TvmLlvm

        assert self._model is not None
        with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
            package.write(self._model, Path(scratch), TvmLlvm().machine())
            return open_program(Path(scratch))

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        from qcompile.backends.cuda.forecast import GPUS, forecast, usual
        from qcompile.backends.cuda.program import PARAMETERS
        from qcompile.backends.tvm.program import FILE, describe

        described = describe(folder)
        taken = described["resources"]
        forecasts = [forecast(described, shapes, gpu) for shapes in usual(described) for gpu in GPUS.values()]
        ship = [compiler.CUBIN, FILE, PARAMETERS]
        registers = max(kernel["registers"] for kernel in taken)
        spilled = sum(kernel["spilled"] for kernel in taken)
        instructions = compiler.counted((folder / compiler.PTX).read_text(encoding="utf-8"))
        told = ", ".join(f"{count} {name}" for name, count in instructions.items())
        return {
            "ship": ship,
            "bytes": sum((folder / name).stat().st_size for name in ship),
            "run": [f"the same operators, compiled by LLVM for {platform.machine()}: the report's figures are theirs"],
            "not_run": [
                f"{compiler.CUBIN}, for want of a GPU: {len(taken)} kernels compiled by nvcc for {self._arch}, "
                f"{registers} registers a thread at most, {spilled} bytes spilled; in PTX {told}",
                *(_told(one) for one in forecasts),
            ],
            "arch": self._arch,
            "kernels": len(taken),
            "registers": registers,
            "spilled": spilled,
            "instructions": instructions,
            "forecasts": forecasts,
        }


def _told(one: dict[str, Any]) -> str:
    """A forecast in words."""
    name, shape = next(iter(one["shapes"].items()))
    return (
        f"a prediction, no measurement: {name} {'x'.join(map(str, shape))} on {one['gpu']}: {one['predicted_us']} us "
        f"of bytes and operations in {one['launches']} launches, which add about {one['launches_us']} us"
    )
