"""The target ``cuda`` through TVM and nvcc: a folder that a machine with an NVIDIA GPU runs.

needs:    TVM and nvcc; no GPU
ensures:  what ``backends/gpu`` does; the folder needs CUDA's driver and nothing of TVM
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.toolkit import find_nvcc
from qcompile.backends.gpu.target import KERNELS, STAND_IN, GpuTarget
from qcompile.pipeline import Arrays


class Native(GpuTarget):
    """The route of machine code for ``arch``."""

    name: ClassVar[str] = "cuda"
    description: ClassVar[str] = "a folder for NVIDIA GPUs: CUDA source, PTX, machine code, a plan of launches"
    kernels: ClassVar[tuple[str, ...]] = ("int8_gemm", "w4_gemm", *KERNELS)

    def __init__(self, arch: str) -> None:
        self.arch = arch

    @property
    def kind(self) -> dict[str, str]:
        return {"kind": self.name, "arch": self.arch}

    def ready(self) -> None:
        super().ready()
        find_nvcc()

    def write_source(self, source: str, folder: Path) -> None:
        from qcompile.backends.gpu import package

        taken = compiler.compile_source(source, self.arch, folder)
        resources = [{"kernel": name, **dataclasses.asdict(taken[name])} for name in sorted(taken)]
        package.tell(folder, {"resources": resources})

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        from qcompile.backends.cuda.forecast import GPUS, forecast, usual
        from qcompile.backends.tvm.program import describe

        described = describe(folder)
        taken = described["resources"]
        forecasts = [forecast(described, shapes, gpu) for shapes in usual(described) for gpu in GPUS.values()]
        registers = max(kernel["registers"] for kernel in taken)
        spilled = sum(kernel["spilled"] for kernel in taken)
        instructions = compiler.counted((folder / compiler.PTX).read_text(encoding="utf-8"))
        told = ", ".join(f"{count} {name}" for name, count in instructions.items())
        return self.shipped(folder, compiler.CUBIN) | {
            "run": [STAND_IN],
            "not_run": [
                f"{compiler.CUBIN}, for want of a GPU: {len(taken)} kernels compiled by nvcc for {self.arch}, "
                f"{registers} registers a thread at most, {spilled} bytes spilled; in PTX {told}",
                *(_told(one) for one in forecasts),
            ],
            "arch": self.arch,
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
