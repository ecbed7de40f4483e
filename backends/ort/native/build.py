"""Compiles the kernels with the C compiler that is at hand."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from qcompile.backends.ort.native.source import SOURCE, command, source
from qcompile.calibration.library import LIBRARY
from qcompile.errors import UserError

_COMPILERS = ("cc", "gcc", "clang")
_HINT = "install one (`apt install gcc` on Debian and Ubuntu), or leave out kernels=1: the program runs without them"


def find_compiler() -> str:
    """The name of a C compiler; UserError where there is none."""
    for name in _COMPILERS:
        if shutil.which(name):
            return name
    raise UserError("the kernels need a C compiler, and there is none", where="kernels", hint=_HINT)


def compiler_version() -> str:
    """How the compiler names itself."""
    told = subprocess.run([find_compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return told.splitlines()[0].strip() if told else find_compiler()


def write_library(folder: Path) -> None:
    """Write the library and its source into ``folder``."""
    (folder / SOURCE).write_text(source(), encoding="utf-8")
    (folder / LIBRARY).write_bytes(_compiled(find_compiler()))


@functools.cache
def _compiled(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        place = Path(scratch)
        (place / SOURCE).write_text(source(), encoding="utf-8")
        done = subprocess.run(command(compiler), cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
            raise UserError(f"{compiler} cannot compile the kernels: {lines[0][:300]}", where="kernels", hint=_HINT)
        return (place / LIBRARY).read_bytes()
