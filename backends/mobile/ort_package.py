"""A phone's package for ONNX Runtime: what ``ort_format`` writes, with sample projects around it."""

from __future__ import annotations

import dataclasses
import platform as host
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.backends.base import Kernel, Program, open_program
from qcompile.backends.mobile import folder as package
from qcompile.backends.mobile import ort_format
from qcompile.backends.onnxruntime_cpu import OnnxRuntimeCpu
from qcompile.backends.ort.weight_only import Level
from qcompile.environment import require_onnxruntime
from qcompile.pipeline import Arrays, Context

_FILES = {
    ort_format.PROGRAM: "the program: the one file that goes into the app",
    ort_format.OPERATORS: "what a reduced build of ONNX Runtime must hold (`--include_ops_by_config`)",
    ort_format.MODEL: "the same program for a desktop, with its data where it is large; it stays at home",
    package.SUMS: "`sha256sum --check SHA256SUMS`",
}
_SAMPLES = {
    "android": (
        "`android/`: a Gradle project in Kotlin (`gradle :app:installDebug`) that takes `model.ort` as an asset",
        "`android/cpp/`: the same in C++, with CMake",
    ),
    "ios": (
        "`ios/Podfile` (CocoaPods) or `ios/Package.swift` (Swift Package Manager): two ways to ONNX Runtime",
        "`ios/Sources/Program/Program.swift`: loads `model.ort` and runs it",
    ),
}
NOT_RUN = {
    "android": "the Gradle and CMake projects are text that was not built here: no Android device, no NDK",
    "ios": "the Swift sources are text that was not built here: no Apple machine, no Xcode",
}


@dataclasses.dataclass(frozen=True)
class OrtPackage:
    """The route of ``platform`` ("android" or "ios") through ONNX Runtime."""

    platform: str
    accuracy_level: Level = 1

    @property
    def _cpu(self) -> OnnxRuntimeCpu:
        return OnnxRuntimeCpu(accuracy_level=self.accuracy_level)

    def lower(self, model: ir.Model, ctx: Context) -> int:
        return self._cpu.lower(model, ctx)

    def kernels_of(self, model: Path) -> list[Kernel]:
        return self._cpu.kernels_of(model)

    def package(self, model: ir.Model, folder: Path) -> None:
        self._cpu.package(model, folder)
        ort_format.convert(folder)
        words = package.words(model, abi="arm64-v8a", version=require_onnxruntime().__version__)
        package.write_sample(f"{self.platform}_onnxruntime", folder / self.platform, words)
        notes = {
            "The program": [f"inputs: {words['inputs']}", f"outputs: {words['outputs']}"],
            "Sample projects": [*_SAMPLES[self.platform], NOT_RUN[self.platform]],
            "What was run": [f"`{ort_format.PROGRAM}` beside `{ort_format.MODEL}` on the machine that made them; "
                             "manifest.json (`device`) has the difference, and what is said of NNAPI and CoreML"],
        }  # fmt: skip
        lead = f"For ONNX Runtime {words['version']} or newer, on any processor that it supports."
        package.finish(folder, f"A program for {self.platform}", lead, _FILES, notes)

    def open(self, folder: Path) -> Program:
        return open_program(folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        apart = ort_format.difference(folder, feeds)
        words = "the same bits" if apart == 0 else f"at most {apart:.2g} apart"
        version = require_onnxruntime().__version__
        return {
            "ship": [ort_format.PROGRAM],
            "bytes": (folder / ort_format.PROGRAM).stat().st_size,
            "run": [f"model.ort in ONNX Runtime {version} on {host.machine()}: {words} as model.onnx"],
            "not_run": [NOT_RUN[self.platform]],
            "usability": ort_format.usability(folder / ort_format.MODEL),
        }
