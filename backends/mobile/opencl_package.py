"""A phone's package for its GPU: OpenCL C, a plan of launches, parameters, and a loader in C.

rewrite:  what ``backends/opencl`` does, its launches -> steps of the plan
needs:    TVM; no NDK, no OpenCL
ensures:  the interface of the loader for processors; 64 threads to a block, which every phone's GPU has room for
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.backends.gpu.program import PARAMETERS
from qcompile.backends.gpu.target import STAND_IN
from qcompile.backends.mobile import folder as package
from qcompile.backends.mobile.plan import Plan, Step, encode
from qcompile.backends.mobile.tvm_package import ABIS, NATIVE, PLAN, UNBUILT
from qcompile.backends.opencl import driver
from qcompile.backends.opencl.target import OpenCl
from qcompile.backends.tvm.program import FILE
from qcompile.errors import UserError
from qcompile.pipeline import Arrays

DEVICE = "opencl"  # whom the plan is for
_NEEDS = '\n        <uses-native-library android:name="{name}" android:required="false" />'
_LIBRARIES = ("libOpenCL.so", "libOpenCL-pixel.so", "libOpenCL-car.so")
_INSTEAD = "leave gpu=opencl out for the phone's processor, or take runtime=onnxruntime"
_UNRUN = "a phone's GPU: nothing was run on one"
_FILES = {
    driver.SOURCE: "the kernels in OpenCL C, which the phone's driver compiles when the program is opened",
    PLAN: "which kernel is launched when, on what",
    PARAMETERS: "the weights",
    FILE: "the same plan for `qcompile run`, `verify` and `bench` on a machine with OpenCL; it stays at home",
    **NATIVE,
    "native/qcompile_device.c": "of the loader: the vendor's library, found and opened; no header of OpenCL is needed",
    "android/": "a Gradle project in Kotlin that takes all of this from where it lies",
    package.SUMS: "`sha256sum --check SHA256SUMS`",
}
_COMMAND = (
    "`$NDK/toolchains/llvm/prebuilt/*/bin/aarch64-linux-android24-clang native/*.c -o run`, push the folder with "
    f"`adb`, then `LD_LIBRARY_PATH=/vendor/lib64 ./run . ./{driver.SOURCE}`"
)


@dataclasses.dataclass(frozen=True)
class OpenClPackage(OpenCl):
    """The route of target ``android`` to the phone's GPU. ``arch``: of its processor, for the sample's build."""

    arch: str = "aarch64"
    threads: ClassVar[int] = 64

    def package(self, model: ir.Model, folder: Path) -> None:
        try:
            super().package(model, folder)
        except UserError as error:
            raise UserError(error.message, hint=_INSTEAD) from error
        written = self.held["written"]
        refuse_doubles(written.source)
        digest = hashlib.sha256((folder / PARAMETERS).read_bytes()).hexdigest()
        (folder / PLAN).write_bytes(encode(_launched(written.plan, written.launches), DEVICE, digest))
        self._write_samples(model, folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        ship = [driver.SOURCE, PLAN, PARAMETERS]
        return {
            "ship": ship,
            "bytes": sum((folder / name).stat().st_size for name in ship),
            "run": [self._ran],
            "not_run": [_UNRUN, f"native/: the loader was not built for this folder; {UNBUILT['android']}"],
        }

    @property
    def _ran(self) -> str:
        device = self.held["device"] if "device" in self.held else driver.present()
        if not device:
            return f"{STAND_IN}. {driver.SOURCE} was not run, for want of an OpenCL platform: {driver.INSTALL}"
        return f"{driver.SOURCE} and its launches on {device}, followed from Python: the report's figures are theirs"

    def _write_samples(self, model: ir.Model, folder: Path) -> None:
        words = package.words(
            model,
            abi=ABIS[self.arch],
            assets=", ".join(f'"{name}"' for name in (PLAN, PARAMETERS, driver.SOURCE)),
            library=f'"$filesDir/{driver.SOURCE}"',
            needs="".join(_NEEDS.format(name=name) for name in _LIBRARIES),
        )
        for part in ("native", "native_gpu", "native_opencl"):
            package.write_sample(part, folder / "native", words)
        package.write_sample("android_tvm", folder / "android", words)
        notes = {
            "The program": [f"inputs: {words['inputs']}", f"outputs: {words['outputs']}"],
            "What the phone needs besides": [
                "OpenCL 1.2 of the GPU's vendor, which the loader looks for by the names that vendors use; from "
                "Android 12 on the app's manifest must name the library, as the sample's does",
                "where it finds none, opening fails and says so: ship the folder for the processor as well",
            ],
            "On a command line": [_COMMAND],
            "What was checked": [self._ran, f"not run: {_UNRUN}", f"not built: {UNBUILT['android']}"],
        }
        lead = "The first three files are the program. Sizes and digests of all are in SHA256SUMS and manifest.json."
        text = package.page("A program for the GPU of an Android phone", lead, _FILES, notes)
        (folder / package.PAGE).write_text(text, encoding="utf-8")
        package.write_sums(folder)


def refuse_doubles(source: str) -> None:
    """UserError that names the kernel of ``source`` that takes or computes float64."""
    for kernel in source.split("__kernel void ")[1:]:
        if re.search(r"\bdouble\b", kernel):
            what = f"kernel '{kernel.partition('(')[0]}' computes in float64, which phones' GPUs do not"
            raise UserError(what, hint=_INSTEAD)


def _launched(plan: Plan, launches: Iterable[Any]) -> Plan:
    """``plan`` with a step for each launch."""
    held = list(launches)
    kernels = list(dict.fromkeys(launch.kernel for launch in held))
    steps = [
        Step(
            kernels.index(launch.kernel),
            tuple(("dim" if kind == "int64" else kind, one) for kind, one in launch.arguments),
            launch.grid,
            launch.block,
        )
        for launch in held
    ]
    return dataclasses.replace(plan, kernels=kernels, steps=steps)
