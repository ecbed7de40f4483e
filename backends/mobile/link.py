"""Linking for phones without an NDK or Xcode: LLVM's linker, and stubs of the few system functions that kernels call.

A name that no stub has fails the link, so what comes out needs the system's C and math libraries and nothing else.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qcompile.errors import UserError

PAGE = 16384  # bytes: Android's larger pages; the smaller ones divide them
MATH = tuple(
    name + suffix
    for name in (
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "copysign", "cos", "cosh", "erf",
        "erfc", "exp", "exp2", "exp10", "expm1", "fabs", "floor", "fma", "fmax", "fmin", "fmod", "frexp", "hypot",
        "ldexp", "log", "log10", "log1p", "log2", "modf", "nearbyint", "nextafter", "pow", "remainder", "rint",
        "round", "roundeven", "sin", "sinh", "sqrt", "tan", "tanh", "tgamma", "trunc",
    )
    for suffix in ("", "f")
)  # fmt: skip
MEMORY = ("bzero", "free", "malloc", "memcpy", "memmove", "memset")
APPLE = ("dyld_stub_binder", "memset_pattern4", "memset_pattern8", "memset_pattern16")  # of libSystem besides


@dataclasses.dataclass(frozen=True)
class System:
    """What a library is linked for. ``triple``: LLVM's name; ``math``, ``memory``: names of the system's libraries.

    library: where it lies in the package; name: what others load it by
    """

    triple: str
    arch: Literal["aarch64", "x86_64"]
    math: str = "libm.so"
    memory: str = "libc.so"
    platform: tuple[str, str, str] | None = None  # of Apple: platform, lowest version, SDK

    @property
    def library(self) -> str:
        if self.platform is None:
            return "libprogram.so"
        return f"Kernels.xcframework/{self.slice}/Kernels.framework/Kernels"

    @property
    def slice(self) -> str:
        """What Apple's tools call the folder for this platform."""
        return "ios-arm64-simulator" if self.triple.endswith("simulator") else "ios-arm64"

    @property
    def name(self) -> str:
        return "libprogram.so" if self.platform is None else "@rpath/Kernels.framework/Kernels"


ANDROID = {
    "aarch64": System("aarch64-linux-android", "aarch64"),
    "x86_64": System("x86_64-linux-android", "x86_64"),
}
IOS = {
    "aarch64": System("arm64-apple-ios15.0", "aarch64", platform=("ios", "15.0", "17.0")),
    "simulator": System("arm64-apple-ios15.0-simulator", "aarch64", platform=("ios-simulator", "15.0", "17.0")),
}
LINUX = {
    arch: System(f"{arch}-linux-gnu", arch, "libm.so.6", "libc.so.6")
    for arch in ("aarch64", "x86_64")
}
_EMULATIONS = {"aarch64": "aarch64linux", "x86_64": "elf_x86_64"}


def find_linker(name: str) -> str:
    """The linker ``name``, or a version of it such as ``ld.lld-16``; UserError where there is none."""
    for candidate in (name, *(f"{name}-{version}" for version in range(25, 13, -1))):
        if shutil.which(candidate):
            return candidate
    raise UserError(
        f"linking for phones needs LLVM's linker '{name}', and there is none",
        where="PATH",
        hint="apt-get install lld (Debian, Ubuntu), dnf install lld (Fedora) or brew install lld (macOS)",
    )


def link(objects: Sequence[Path], output: Path, system: System) -> None:
    """Link ``objects`` into the library ``output``; UserError where they need what the system does not have."""
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        arguments = _apple(Path(scratch), output, system) if system.platform else _elf(Path(scratch), output, system)
        _run([*arguments[:1], *map(str, objects), *arguments[1:]], system)


def _elf(scratch: Path, output: Path, system: System) -> list[str]:
    linker = find_linker("ld.lld")
    base = [linker, "-m", _EMULATIONS[system.arch], "-shared"]
    stubs = []
    (scratch / "empty").touch()
    for soname, names in ((system.math, MATH), (system.memory, MEMORY)):
        stub = scratch / soname
        defined = [f"--defsym={name}=0" for name in names]
        _run([*base, "-soname", soname, *defined, "-b", "binary", str(scratch / "empty"), "-o", str(stub)], system)
        stubs.append(str(stub))
    page = ["-z", f"max-page-size={PAGE}", "-z", "relro", "-z", "now", "--hash-style=both", "--build-id=none"]
    kept = ["-z", "defs", "--as-needed", "--gc-sections", "-s"]
    return [*base, *page, *kept, "-soname", system.name, "-o", str(output), *stubs]


def _apple(scratch: Path, output: Path, system: System) -> list[str]:
    assert system.platform is not None
    platform, lowest, sdk = system.platform
    stub = scratch / "libSystem.tbd"
    names = ", ".join(f"_{name}" for name in (*APPLE, *MATH, *MEMORY))
    target = "arm64-ios-simulator" if platform == "ios-simulator" else "arm64-ios"
    stub.write_text(
        f"--- !tapi-tbd\ntbd-version: 4\ntargets: [ {target} ]\ninstall-name: '/usr/lib/libSystem.B.dylib'\n"
        f"exports:\n  - targets: [ {target} ]\n    symbols: [ dyld_stub_binder, {names} ]\n...\n"
    )
    place = ["-dylib", "-arch", "arm64", "-platform_version", platform, lowest, sdk]
    return [find_linker("ld64.lld"), *place, "-install_name", system.name, "-o", str(output), str(stub)]


def _run(command: Sequence[str], system: System) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        hint = "take runtime=onnxruntime, and report this"
        raise UserError(f"{command[0]} cannot link for {system.triple}: {lines[0][:300]}", hint=hint)
