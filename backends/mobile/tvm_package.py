"""A phone's package without a runtime: kernels by TVM in a library, a plan, parameters, and a loader in C.

rewrite:  nodes -> kernels (``backends/tvm``), calls -> steps of a plan
needs:    LLVM's linker; no NDK, no Xcode
ensures:  the library needs the system's C and math libraries and nothing else
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform as host
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.backends.base import Kernel, Program
from qcompile.backends.mobile import apple, headers
from qcompile.backends.mobile import folder as package
from qcompile.backends.mobile.link import ANDROID, IOS, System, find_linker
from qcompile.backends.tvm.require import check_installed, require_translation
from qcompile.pipeline import Arrays, Context

PLAN, PARAMETERS = "program.plan", "program.parameters"
ABIS = {"aarch64": "arm64-v8a", "x86_64": "x86_64"}
NATIVE = {
    "native/qcompile_program.h": "the interface: open, run, close",
    "native/qcompile_program.c": "the loader, to be compiled into the app: C99, libc and dlopen",
    "native/qcompile_plan.c": "of the loader: the plan, read and checked",
    "native/qcompile_shapes.c": "of the loader: inputs checked, shapes computed",
    "native/main.c": "a command-line program around it, with `native/CMakeLists.txt`",
}
_PARTS = {"android": {"android_tvm": "android"}, "ios": {"ios_swift": ".", "ios_tvm": "."}}
_LIBRARY = {  # where it is in the app, in the sample's language
    "android": '"${applicationInfo.nativeLibraryDir}/libprogram.so"',
    "ios": '(Bundle.main.privateFrameworksPath ?? "") + "/Kernels.framework/Kernels"',
}
_SAMPLES = {
    "android": {"android/": "a Gradle project in Kotlin that takes all of this from where it lies"},
    "ios": {"Package.swift": "this folder as a Swift package", "swift/Program.swift": "the loader from Swift"},
}


@dataclasses.dataclass
class TvmPackage:
    """The route of ``platform`` ("android" or "ios") through TVM. ``arch``: a key of ANDROID or IOS.

    program, kernels: of the last package, for as long as this route is held
    """

    platform: str
    arch: str = "aarch64"
    program: Program | None = dataclasses.field(default=None, init=False)
    kernels: Sequence[Kernel] = dataclasses.field(default=(), init=False)

    @property
    def system(self) -> System:
        return (ANDROID if self.platform == "android" else IOS)[self.arch]

    def ready(self) -> None:
        check_installed()
        find_linker("ld64.lld" if self.system.platform else "ld.lld")

    def lower(self, model: ir.Model, ctx: Context) -> int:
        return require_translation(model)

    def kernels_of(self, model: Path) -> list[Kernel]:
        return list(self.kernels)

    def package(self, model: ir.Model, folder: Path) -> None:
        from qcompile.backends.mobile.extract import extract
        from qcompile.backends.mobile.host import Host
        from qcompile.backends.mobile.kernels import write_library
        from qcompile.backends.mobile.plan import encode
        from qcompile.backends.tvm.package import bounds
        from qcompile.backends.tvm.schedule import schedule
        from qcompile.backends.tvm.translate import translated

        found = translated(model)
        module = schedule(found.module)
        ports = [[str(v.name) for v in values] for values in (model.graph.inputs, model.graph.outputs)]
        plan = extract(module, found.parameters, *ports)
        plan.rows, plan.longest = bounds(model)
        digest = hashlib.sha256()
        with (folder / PARAMETERS).open("wb") as file:
            for piece in plan.pieces():
                file.write(piece)
                digest.update(piece)
        (folder / PLAN).write_bytes(encode(plan, self.system.triple, digest.hexdigest()))
        write_library(module, plan.kernels, folder / self.system.library, self.system)
        if self.system.platform:
            apple.write_framework(folder, self.system)
        self._write_samples(model, folder)
        self.program, self.kernels = Host(plan, module), found.products

    def open(self, folder: Path) -> Program:
        """The program of ``package``, its kernels compiled for this machine."""
        assert self.program is not None
        return self.program

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        ship = [PLAN, PARAMETERS, self.system.library]
        here = host.machine()
        return {
            "ship": ship,
            "bytes": sum((folder / name).stat().st_size for name in ship),
            "run": [f"the same plan and kernels, compiled for {here}: the figures of this report are theirs"],
            "not_run": [_checked(headers.read(folder / self.system.library), self.system), UNBUILT[self.platform]],
            "triple": self.system.triple,
        }

    def _write_samples(self, model: ir.Model, folder: Path) -> None:
        assets, library = f'"{PLAN}", "{PARAMETERS}"', _LIBRARY[self.platform]
        words = package.words(model, abi=ABIS.get(self.arch, ""), assets=assets, library=library, needs="")
        for part in ("native", "native_tvm"):
            package.write_sample(part, folder / "native", words)
        for part, where in _PARTS[self.platform].items():
            package.write_sample(part, folder / where, words)
        header = headers.read(folder / self.system.library)
        files = {
            self.system.library: f"the kernels, for {self.system.triple}",
            PLAN: "which kernel runs when, on what",
            PARAMETERS: "the weights",
            **NATIVE,
            **_SAMPLES[self.platform],
            package.SUMS: "`sha256sum --check SHA256SUMS`",
        }
        notes = {
            "The program": [f"inputs: {words['inputs']}", f"outputs: {words['outputs']}"],
            "What the phone needs besides": ["nothing: no TVM, no ONNX Runtime. The loader is part of the app."],
            "On a command line": [_COMMANDS[self.platform]],
            "What was checked": [
                f"run on {host.machine()}: the same plan with the same kernels; manifest.json has the figures",
                f"not run: {_checked(header, self.system)}",
                f"not run: {UNBUILT[self.platform]}",
            ],
        }
        package.finish(folder, f"A program for {self.platform}", package.LEAD, files, notes)


_COMMANDS = {
    "android": "`$NDK/toolchains/llvm/prebuilt/*/bin/aarch64-linux-android24-clang native/*.c "
    "-o run`, push the folder with `adb`, then `./run . ./libprogram.so`",
    "ios": "none: add this folder to an Xcode project as a local package, and embed and sign `Kernels.xcframework`",
}
UNBUILT = {
    "android": "the Gradle project and its C code are text that was not built with an NDK here",
    "ios": "the Swift package is text that was not built with Xcode here, and the framework is not signed",
}


def _checked(header: headers.Header, system: System) -> str:
    """What the header of the library says, in a sentence."""
    needs = ", ".join(header.needed) or "nothing"
    page = f", segments aligned to {header.page} bytes" if header.page else ""
    names = f" ({', '.join(header.undefined)})" if header.undefined else ""
    built = f"{header.format}, {header.machine}{', ' + header.platform if header.platform else ''}"
    return f"{system.library} is compiled and linked ({built}); it needs {needs}{names}{page}"
