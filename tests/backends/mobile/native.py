"""The package's own loader, compiled from its C source, and the inputs and outputs of its command-line program."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Array = np.ndarray
SAMPLES = Path(__file__).parents[3] / "backends/mobile/samples"
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror")


@functools.cache
def runner(compiler: str = "cc", *options: str, loader: str = "native_tvm") -> Path:
    """The command-line program, by ``compiler``, with the loader of the folder ``loader``."""
    folder = Path(tempfile.mkdtemp(prefix="runner"))
    for path in (*(SAMPLES / "native").iterdir(), *(SAMPLES / loader).iterdir()):
        (folder / path.name).write_text(path.read_text().replace("{{length}}", "8"))
    sources = map(str, folder.glob("*.c"))
    command = [compiler, *WARNINGS, "-O1", *options, *sources, "-ldl", "-o", str(folder / "run")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "run"


def has_compiler() -> bool:
    return shutil.which("cc") is not None


def write_inputs(folder: Path, feeds: Sequence[Array]) -> list[str]:
    """``feeds`` as the program reads them: rank, extents, elements."""
    paths = [folder / f"{number}.raw" for number in range(len(feeds))]
    for path, array in zip(paths, feeds, strict=True):
        path.write_bytes(np.array([array.ndim, *array.shape], "<i8").tobytes() + np.asarray(array, order="C").tobytes())
    return [str(path) for path in paths]


def digests(outputs: Mapping[str, Array]) -> str:
    """What the program prints for ``outputs``."""
    return "".join(f"{name} {list(array.shape)} {_fnv(array.tobytes())}\n" for name, array in outputs.items())


def _fnv(data: bytes) -> str:
    found = 14695981039346656037
    for byte in data:
        found = (found ^ byte) * 1099511628211 % 2**64
    return f"{found:016x}"
