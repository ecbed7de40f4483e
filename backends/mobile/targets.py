"""The targets ``android`` and ``ios``: folders that an app builds against."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qcompile.backends.base import Kernel, spelled
from qcompile.backends.mobile.ort_package import OrtPackage
from qcompile.backends.ort.weight_only import Level
from qcompile.pipeline import Arrays, Context, Target


@dataclasses.dataclass(frozen=True)
class _Phone:
    """What both have in common."""

    name: ClassVar[str]
    runtime: Literal["onnxruntime"] = "onnxruntime"
    accuracy_level: Level = 1

    @property
    def _route(self) -> OrtPackage:
        return OrtPackage(self.name, self.accuracy_level)

    @property
    def target(self) -> Target:
        return Target(
            name=spelled(self),
            backend=self.runtime,
            description=f"a folder for {self.name} apps: program, parameters, sample projects, checksums",
            kernels=("MatMulIntegerToFloat", "QGemm", "MatMulNBits"),
        )

    def lower(self, model: ir.Model, ctx: Context) -> int:
        return self._route.lower(model, ctx)

    def kernels_of(self, model: Path) -> list[Kernel]:
        return self._route.kernels_of(model)

    def package(self, model: ir.Model, folder: Path) -> None:
        self._route.package(model, folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        return self._route.facts(folder, feeds)


@dataclasses.dataclass(frozen=True)
class Android(_Phone):
    """Options:

    runtime: what runs the program on the phone
    accuracy_level: of weight-only linears: 1 multiplies floats, 4 rounds their inputs to 8 bits, block by block
    """

    name: ClassVar[str] = "android"


@dataclasses.dataclass(frozen=True)
class Ios(_Phone):
    """Options:

    runtime: what runs the program on the phone
    accuracy_level: of weight-only linears: 1 multiplies floats, 4 rounds their inputs to 8 bits, block by block
    """

    name: ClassVar[str] = "ios"
