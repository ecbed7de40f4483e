"""TVM on CPU: the whole program as one shared library and its parameters.

rewrite:  none in the IR; the program is translated, kernel by kernel, when it is packaged
needs:    the canonical or quantised form, or the integer-only one
ensures:  integers exactly as ONNX computes them, floats up to rounding; dynamic dims stay dynamic
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.backends.base import Kernel
from qcompile.backends.tvm.require import require_tvm
from qcompile.pipeline import Context, Target


@dataclasses.dataclass(frozen=True)
class TvmLlvm:
    """Machine code of LLVM. Options:

    mcpu: the processor to compile for, as LLVM names it; native is this machine's
    """

    name: ClassVar[str] = "llvm"
    mcpu: str = "native"

    @property
    def target(self) -> Target:
        return Target(
            name=self.name + (f"{{mcpu={self.mcpu}}}" if self.mcpu != "native" else ""),
            backend="tvm",
            description="TVM, machine code for CPUs: one library that TVM's runtime loads",
            kernels=("integer_linear", "weight_only_linear"),
        )

    def lower(self, model: ir.Model, ctx: Context) -> int:
        require_tvm()
        from qcompile.backends.tvm.translate import check

        model.graph.sort()
        check(model)
        return 0

    def kernels_of(self, model: Path) -> list[Kernel]:
        from qcompile.backends.tvm.program import describe

        kernels: list[Kernel] = describe(model.parent)["kernels"]
        return kernels

    def package(self, model: ir.Model, folder: Path) -> None:
        require_tvm()
        from qcompile.backends.tvm import package

        package.write(model, folder, self._machine())

    def _machine(self) -> Any:
        """What TVM compiles for."""
        from tvm import target

        if self.mcpu != "native":
            return target.Target({"kind": "llvm", "mcpu": self.mcpu})
        return target.Target({"kind": "llvm", "mcpu": target.codegen.llvm_get_system_cpu()})
