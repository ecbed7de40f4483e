"""The target ``cuda``: a folder that a machine with an NVIDIA GPU runs.

needs:    TVM and nvcc; no GPU
ensures:  what ``backends/gpu`` does; the folder needs CUDA's driver and nothing of TVM
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qcompile.backends.cuda import compiler
from qcompile.backends.gpu.target import STAND_IN, GpuTarget
from qcompile.pipeline import Arrays, Context


@dataclasses.dataclass(frozen=True)
class Cuda(GpuTarget):
    """Options:

    arch: of the GPU: sm_80 for Ampere and Ada (A100, RTX 30 and 40), sm_90 for Hopper (H100, H200)
    """

    name: ClassVar[str] = "cuda"
    description: ClassVar[str] = "a folder for NVIDIA GPUs: CUDA source, PTX, machine code, a plan of launches"
    arch: Literal["sm_80", "sm_90"] = "sm_80"

    @property
    def kind(self) -> dict[str, str]:
        return {"kind": self.name, "arch": self.arch}

    def lower(self, model: ir.Model, ctx: Context) -> int:
        from qcompile.backends.tvm.kernels.cuda.build import find_nvcc

        find_nvcc()  # rather now than after the search for ranges
        return super().lower(model, ctx)

    def write_source(self, source: str, folder: Path) -> None:
        self.held["resources"] = compiler.compile_source(source, self.arch, folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        taken = self.held["resources"]
        registers = max(kernel.registers for kernel in taken.values())
        spilled = sum(kernel.spilled for kernel in taken.values())
        instructions = compiler.counted((folder / compiler.PTX).read_text(encoding="utf-8"))
        told = ", ".join(f"{count} {name}" for name, count in instructions.items())
        return self.shipped(folder, compiler.CUBIN) | {
            "run": [STAND_IN],
            "not_run": [
                f"{compiler.CUBIN}, for want of a GPU: {len(taken)} kernels compiled by nvcc for {self.arch}, "
                f"{registers} registers a thread at most, {spilled} bytes spilled; in PTX {told}"
            ],
            "arch": self.arch,
            "kernels": len(taken),
            "registers": registers,
            "spilled": spilled,
            "instructions": instructions,
        }
