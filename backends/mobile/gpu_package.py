"""A phone's package for its GPU: kernels as source, a plan of launches, parameters, and a loader in C.

rewrite:  what ``backends/opencl`` and ``backends/metal`` do, their launches -> steps of the plan
needs:    TVM; no NDK, no Xcode, no GPU
ensures:  the loader's interface is that of the one for processors
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from qcompile.backends.gpu.program import PARAMETERS
from qcompile.backends.gpu.target import STAND_IN, GpuTarget
from qcompile.backends.metal import target as metal
from qcompile.backends.mobile import folder as package
from qcompile.backends.mobile.plan import Plan, Step, encode
from qcompile.backends.mobile.tvm_package import ABIS, NATIVE, PLAN, UNBUILT
from qcompile.backends.opencl import driver
from qcompile.backends.opencl.target import OpenCl
from qcompile.backends.tvm.program import FILE
from qcompile.errors import UserError
from qcompile.pipeline import Arrays

if TYPE_CHECKING:
    from qcompile.backends.gpu.launches import Launch

_INSTEAD = "leave gpu out for the phone's processor, or take runtime=onnxruntime"
_UNRUN = "a phone's GPU: nothing was run on one"
_NEEDS = '\n        <uses-native-library android:name="{name}" android:required="false" />'
_LIBRARIES = ("libOpenCL.so", "libOpenCL-pixel.so", "libOpenCL-car.so")


class _GpuPackage(GpuTarget):
    """What both GPUs have in common.

    platform: android or ios; source: the file of the kernels; parts: where each folder of samples goes
    files: what those are; needs: what the phone must have; command: how to run the program on a command line
    """

    platform: ClassVar[str]
    source: ClassVar[str]
    parts: ClassVar[Mapping[str, str]]
    needs: ClassVar[Sequence[str]]
    files: ClassVar[Mapping[str, str]]
    command: ClassVar[str]

    @property
    @abc.abstractmethod
    def ran(self) -> str:
        """What was run on this machine, in a sentence."""

    @property
    @abc.abstractmethod
    def words(self) -> Mapping[str, str]:
        """What words in the samples mean."""

    def package(self, model: ir.Model, folder: Path) -> None:
        try:
            super().package(model, folder)
        except UserError as error:
            raise UserError(error.message, hint=_INSTEAD) from error
        written = self.held["written"]
        refuse_doubles(written.source)
        digest = hashlib.sha256((folder / PARAMETERS).read_bytes()).hexdigest()
        (folder / PLAN).write_bytes(encode(_launched(written.plan, written.launches), self.name, digest))
        self._write_samples(model, folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        ship = [self.source, PLAN, PARAMETERS]
        built = f"native/: the loader was not built for this folder; {UNBUILT[self.platform]}"
        size = sum((folder / name).stat().st_size for name in ship)
        return {"ship": ship, "bytes": size, "run": [self.ran], "not_run": [_UNRUN, built]}

    def _write_samples(self, model: ir.Model, folder: Path) -> None:
        words = package.words(model, **self.words)
        for part, where in {"native": "native", "native_gpu": "native", **self.parts}.items():
            package.write_sample(part, folder / where, words)
        files = {
            self.source: "the kernels as source, which the phone compiles when the program is opened",
            PLAN: "which kernel is launched when, on what",
            PARAMETERS: "the weights",
            FILE: "the same plan for other loaders; it stays at home",
            **NATIVE,
            "native/qcompile_device.c": f"of the loader: {self.name}",
            **self.files,
            package.SUMS: "`sha256sum --check SHA256SUMS`",
        }
        notes = {
            "The program": [f"inputs: {words['inputs']}", f"outputs: {words['outputs']}"],
            "What the phone needs besides": self.needs,
            "On a command line": [self.command],
            "What was checked": [self.ran, f"not run: {_UNRUN}", f"not built: {UNBUILT[self.platform]}"],
        }
        package.finish(folder, f"A program for the GPU of a phone: {self.platform}", package.LEAD, files, notes)


@dataclasses.dataclass(frozen=True)
class OpenClPackage(_GpuPackage, OpenCl):
    """The route of target ``android`` to the phone's GPU. ``arch``: of its processor, for the sample's build."""

    arch: str = "aarch64"
    threads: ClassVar[int] = 64  # every phone's GPU has room for as many
    platform: ClassVar[str] = "android"
    source: ClassVar[str] = driver.SOURCE
    parts: ClassVar[Mapping[str, str]] = {"native_opencl": "native", "android_tvm": "android"}
    files: ClassVar[Mapping[str, str]] = {
        "android/": "a Gradle project in Kotlin that takes all of this from where it lies"
    }
    needs: ClassVar[Sequence[str]] = (
        "OpenCL 1.2 of the GPU's vendor, which the loader looks for by the names that vendors use; from Android 12 on "
        "the app's manifest must name the library, as the sample's does",
        "where it finds none, opening fails and says so: ship the folder for the processor as well",
    )
    command: ClassVar[str] = (
        "`$NDK/toolchains/llvm/prebuilt/*/bin/aarch64-linux-android24-clang native/*.c -o run`, push the folder with "
        f"`adb`, then `LD_LIBRARY_PATH=/vendor/lib64 ./run . ./{driver.SOURCE}`"
    )

    @property
    def ran(self) -> str:
        device = self.held["device"] if "device" in self.held else driver.present()
        if not device:
            return f"{STAND_IN}. {driver.SOURCE} was not run, for want of an OpenCL platform: {driver.INSTALL}"
        return f"{driver.SOURCE} and its launches on {device}, followed from Python: the report's figures are theirs"

    @property
    def words(self) -> Mapping[str, str]:
        return {
            "abi": ABIS[self.arch],
            "assets": ", ".join(f'"{name}"' for name in (PLAN, PARAMETERS, driver.SOURCE)),
            "library": f'"$filesDir/{driver.SOURCE}"',
            "needs": "".join(_NEEDS.format(name=name) for name in _LIBRARIES),
        }


@dataclasses.dataclass(frozen=True)
class MetalPackage(_GpuPackage, metal.Metal):
    """The route of target ``ios`` to the phone's GPU."""

    platform: ClassVar[str] = "ios"
    source: ClassVar[str] = metal.SOURCE
    parts: ClassVar[Mapping[str, str]] = {"native_metal": "native", "ios_swift": ".", "ios_metal": "."}
    files: ClassVar[Mapping[str, str]] = {
        "Package.swift": "this folder as a Swift package",
        "swift/Program.swift": "the loader from Swift",
    }
    needs: ClassVar[Sequence[str]] = ("nothing: Metal is part of the system",)
    command: ClassVar[str] = "none: add this folder to an Xcode project as a local package"

    @property
    def ran(self) -> str:
        return f"{STAND_IN}. {metal.SOURCE} was neither compiled nor run: no Apple machine"

    @property
    def words(self) -> Mapping[str, str]:
        return {"abi": "arm64", "library": 'Bundle.module.path(forResource: "program", ofType: "metal") ?? ""'}


def refuse_doubles(source: str) -> None:
    """UserError that names the kernel of ``source`` that takes or computes float64."""
    for kernel in source.split("kernel void ")[1:]:
        if re.search(r"\bdouble\b", kernel):
            what = f"kernel '{kernel.partition('(')[0]}' computes in float64, which phones' GPUs do not"
            raise UserError(what, hint=_INSTEAD)


def _launched(plan: Plan, launches: Sequence[Launch]) -> Plan:
    """``plan`` with a step for each launch."""
    kernels = list(dict.fromkeys(launch.kernel for launch in launches))
    steps = [
        Step(
            kernels.index(launch.kernel),
            tuple(("dim" if kind == "int64" else kind, one) for kind, one in launch.arguments),
            launch.grid,
            launch.block,
        )
        for launch in launches
    ]
    return dataclasses.replace(plan, kernels=kernels, steps=steps)
