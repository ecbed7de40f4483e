"""TVM on CPU: the whole program as one shared library and its parameters.

rewrite:  none in the IR; the program is translated, kernel by kernel, when it is packaged
needs:    the canonical or quantised form, or the integer-only one
ensures:  integers exactly as ONNX computes them, floats up to rounding; dynamic dims stay dynamic
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qcompile.backends.base import Kernel, spelled
from qcompile.backends.tvm.require import require_translation, require_tvm
from qcompile.errors import UserError
from qcompile.pipeline import Context, Target

KERNELS = ("matmul_integer", "matmul_nbits", "matmul_nbits_int8", "matmul_w4a8")  # of ``kernels``


@dataclasses.dataclass(frozen=True)
class TvmLlvm:
    """Machine code of LLVM. Options:

    mcpu: the processor to compile for, as LLVM names it; native is this machine's
    accuracy_level: of weight-only linears: 1 multiplies floats, 4 rounds their inputs to 8 bits, block by block
    """

    name: ClassVar[str] = "llvm"
    mcpu: str = "native"
    accuracy_level: Literal[1, 4] = 1

    @property
    def target(self) -> Target:
        return Target(
            name=spelled(self),
            backend="tvm",
            description="TVM, machine code for CPUs: one library that TVM's runtime loads",
            kernels=(*KERNELS, "integer_linear", "weight_only_linear"),
        )

    def lower(self, model: ir.Model, ctx: Context) -> int:
        require_tvm()
        from qcompile.backends.tvm import written

        if self.accuracy_level == 4 and written.unit(self.machine()) not in written.ROUNDING_UNITS:
            hint = "leave accuracy_level out, or name a processor with AVX-512 VNNI: llvm{mcpu=icelake-server}"
            raise UserError("accuracy_level=4 has no kernel for this processor", where=self.name, hint=hint)
        return require_translation(model)

    def kernels_of(self, model: Path) -> list[Kernel]:
        from qcompile.backends.tvm.program import products

        return products(model.parent)

    def package(self, model: ir.Model, folder: Path) -> None:
        require_tvm()
        from qcompile.backends.tvm import package

        package.write(model, folder, self.machine(), accuracy_level=self.accuracy_level)

    def machine(self) -> Any:
        """What TVM compiles for."""
        from tvm import target

        from qcompile.backends.tvm.kernels import native_target

        return native_target() if self.mcpu == "native" else target.Target({"kind": "llvm", "mcpu": self.mcpu})
