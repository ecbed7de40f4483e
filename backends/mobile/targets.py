"""The targets ``android`` and ``ios``: folders that an app builds against."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

from qcompile.backends.base import Routed, spelled
from qcompile.backends.mobile.gpu_package import MetalPackage, OpenClPackage
from qcompile.backends.mobile.ort_package import OrtPackage
from qcompile.backends.mobile.tvm_package import TvmPackage
from qcompile.backends.ort.weight_only import Level
from qcompile.errors import UserError
from qcompile.pipeline import Target


class _Phone(Routed):
    """What both have in common: everything is done by the route that the options choose."""

    name: ClassVar[str]
    runtime: str
    arch: str
    accuracy_level: Level
    gpu: str

    def __post_init__(self) -> None:
        if self.gpu != "none" and self.runtime != "tvm":
            raise UserError(f"gpu={self.gpu} is of runtime=tvm", hint="leave out one of runtime and gpu")

    @functools.cached_property
    def route(self) -> OrtPackage | TvmPackage | OpenClPackage | MetalPackage:
        if self.runtime != "tvm":
            return OrtPackage(self.name, self.accuracy_level)
        if self.gpu == "none":
            return TvmPackage(self.name, self.arch)
        return OpenClPackage(self.arch) if self.gpu == "opencl" else MetalPackage()

    @property
    def target(self) -> Target:
        ort = isinstance(self.route, OrtPackage)
        of_gpu = self.route.kernels if isinstance(self.route, OpenClPackage | MetalPackage) else ()
        return Target(
            name=spelled(self),
            backend="onnxruntime" if ort else "tvm",
            description=f"a folder for {self.name} apps: program, parameters, sample projects, checksums",
            kernels=("MatMulIntegerToFloat", "QGemm", "MatMulNBits") if ort else of_gpu,
        )


@dataclasses.dataclass(frozen=True)
class Android(_Phone):
    """Options:

    runtime: tvm makes a library that needs no runtime on the phone; onnxruntime an .ort file for ONNX Runtime
    arch: of the phone, for runtime=tvm; x86_64 is the emulator's
    accuracy_level: of weight-only linears, for runtime=onnxruntime: 1 multiplies floats, 4 rounds inputs to 8 bits
    gpu: for runtime=tvm: opencl makes a folder for the phone's GPU, none one for its processor
    """

    name: ClassVar[str] = "android"
    runtime: Literal["tvm", "onnxruntime"] = "tvm"
    arch: Literal["aarch64", "x86_64"] = "aarch64"
    accuracy_level: Level = 1
    gpu: Literal["none", "opencl"] = "none"


@dataclasses.dataclass(frozen=True)
class Ios(_Phone):
    """Options:

    runtime: tvm makes a framework that needs no runtime on the phone; onnxruntime an .ort file for ONNX Runtime
    arch: for runtime=tvm: of the phone, or of the simulator on a Mac
    accuracy_level: of weight-only linears, for runtime=onnxruntime: 1 multiplies floats, 4 rounds inputs to 8 bits
    gpu: for runtime=tvm: metal makes a folder for the phone's GPU, none one for its processor
    """

    name: ClassVar[str] = "ios"
    runtime: Literal["tvm", "onnxruntime"] = "tvm"
    arch: Literal["aarch64", "simulator"] = "aarch64"
    accuracy_level: Level = 1
    gpu: Literal["none", "metal"] = "none"
