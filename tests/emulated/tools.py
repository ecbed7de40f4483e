"""LLVM's linker and a C compiler for ARM: those of this machine, or Debian's, unpacked into the cache."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from qcompile.backends.mobile import link
from qcompile.errors import UserError
from qcompile.models.cache import cache_root, cached_folder
from tests.emulated.aarch64 import Missing, unpack

_LIBRARIES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_GLIBC = ("libc.so*", "libm.so*", "libmvec.so*", "libpthread.so*", "libdl.so*", "librt.so*", "ld-linux*")
CROSS = "aarch64-linux-gnu-gcc"
SYSROOT = Path("/usr/aarch64-linux-gnu")


def put_linker_on_path() -> None:
    """Make ``ld.lld`` and ``ld64.lld`` callable. Raises Missing where that is impossible."""
    try:
        link.find_linker("ld.lld"), link.find_linker("ld64.lld")
    except UserError:
        folder = _unpacked("lld", ["lld"])
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"


def cross_compiler() -> tuple[str, Path]:
    """A C compiler for aarch64 Linux, and the folder with its ``lib`` for the emulator."""
    if shutil.which(CROSS) and (SYSROOT / "lib/libc.so.6").exists():
        return CROSS, SYSROOT
    folder = _unpacked("cross", ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"])
    return str(folder / "bin" / CROSS), folder / "files/usr/aarch64-linux-gnu"


def _unpacked(name: str, packages: list[str]) -> Path:
    """``packages`` of Debian and what they need, with a folder ``bin`` of scripts that start their programs."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise Missing(f"Debian's packages are unpacked for x86_64 and aarch64, and this is {machine}")

    final = cache_root() / f"tools-{name}"

    def make(folder: Path) -> None:
        files = folder / "files"
        unpack(_ARCHITECTURES[machine], packages, files)
        for pattern in _GLIBC:  # this machine has its own
            for path in files.glob(f"lib/{_LIBRARIES[machine]}/{pattern}"):
                path.unlink()
        for name in ("libc.so", "libm.so"):  # texts for the linker, with absolute paths
            text = files / "usr/aarch64-linux-gnu/lib" / name
            if text.is_file() and text.stat().st_size < 4096:
                text.write_text(text.read_text().replace("/usr/aarch64", f"{final}/files/usr/aarch64"))
        (folder / "bin").mkdir()
        for program in (folder / "files/usr/bin").iterdir():
            script = folder / "bin" / program.name
            script.write_text(_script(program.name, _LIBRARIES[machine]))
            script.chmod(0o755)

    return cached_folder(final, make)


def _script(program: str, libraries: str) -> str:
    """Starts ``program`` with the libraries that lie beside it, glibc excepted."""
    return (
        '#!/bin/sh\nfiles=$(dirname "$(dirname "$(readlink -f "$0")")")/files\n'
        f"places=$files/usr/lib/{libraries}:$files/lib/{libraries}:$files/usr/lib/llvm-14/lib\n"
        f'PATH=$files/usr/bin:$PATH LD_LIBRARY_PATH=$places exec "$files/usr/bin/{program}" "$@"\n'
    )
