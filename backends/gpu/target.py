"""What every target for a GPU does: the program as source and a plan, checked on this machine one way or the other.

rewrite:  nodes -> kernels (``backends/tvm``), loops -> threads, calls -> launches of a plan
needs:    TVM; no GPU
ensures:  integers exactly as ONNX computes them; the folder needs nothing of TVM
"""

from __future__ import annotations

import abc
import functools
import platform
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.backends.base import Kernel, Program, open_program, spelled
from qcompile.backends.gpu.program import PARAMETERS
from qcompile.backends.tvm.require import require_translation
from qcompile.pipeline import Context, Target

KERNELS = ("integer_linear", "weight_only_linear")


class GpuTarget(abc.ABC):
    """A target for GPUs; frozen dataclasses with its options below."""

    name: ClassVar[str]
    description: ClassVar[str]
    kernels: ClassVar[tuple[str, ...]] = KERNELS
    threads: ClassVar[int] = 256  # of a block, at most

    @property
    def kind(self) -> dict[str, str]:
        """What TVM calls the target."""
        return {"kind": self.name}

    @property
    def target(self) -> Target:
        return Target(name=spelled(self), backend="tvm", description=self.description, kernels=self.kernels)

    @functools.cached_property
    def held(self) -> dict[str, Any]:
        """What is known only while a package is made: ``model``, what was ``written``, and what targets put there."""
        return {}

    def lower(self, model: ir.Model, ctx: Context) -> int:
        return require_translation(model)

    def kernels_of(self, model: Path) -> list[Kernel]:
        from qcompile.backends.tvm.program import products

        return products(model.parent)

    def package(self, model: ir.Model, folder: Path) -> None:
        from qcompile.backends.gpu import package

        self.held["model"] = model
        self.held["written"] = written = package.write(model, folder, self.kind, self.threads)
        self.write_source(written.source, folder)

    @abc.abstractmethod
    def write_source(self, source: str, folder: Path) -> None:
        """Write the ``source`` of the kernels into ``folder``, and what is made of it."""

    def open(self, folder: Path) -> Program:
        """The same translation, compiled for this machine's processor."""
        from qcompile.backends.tvm import package
        from qcompile.backends.tvm.kernels import native_target

        with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
            package.write(self.held["model"], Path(scratch), native_target())
            return open_program(Path(scratch))

    def shipped(self, folder: Path, *source: str) -> dict[str, Any]:
        """The files for the device, ``source`` among them, and their size."""
        from qcompile.backends.tvm.program import FILE

        ship = [*source, FILE, PARAMETERS]
        return {"ship": ship, "bytes": sum((folder / name).stat().st_size for name in ship)}


STAND_IN = f"the same operators, compiled by LLVM for {platform.machine()}: the report's figures are theirs"
