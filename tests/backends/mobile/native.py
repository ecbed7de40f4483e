"""The package's own loader, compiled from its C source, and the inputs and outputs of its command-line program."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qcompile.backends.mobile.plan import RANK, type_of

Array = np.ndarray
SAMPLES = Path(__file__).parents[3] / "backends/mobile/samples"
NAMES = ("int8", "int32", "int64", "uint8", "float32", "bool")
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror")


@functools.cache
def runner(compiler: str = "cc", *options: str, loader: Sequence[Path] = (SAMPLES / "native_tvm",)) -> Path:
    """The command-line program, by ``compiler``, with the loader of the folders ``loader``."""
    folder = Path(tempfile.mkdtemp(prefix="runner"))
    for path in (path for part in (SAMPLES / "native", *loader) for path in part.iterdir()):
        (folder / path.name).write_text(path.read_text().replace("{{length}}", "8"))
    sources = map(str, sorted(folder.glob("*.c")))
    command = [compiler, *WARNINGS, "-O1", *options, *sources, "-ldl", "-o", str(folder / "run")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "run"


class Tensor(ctypes.Structure):
    """``qc_tensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("shape", ctypes.c_int64 * RANK), ("rank", ctypes.c_int32), ("code", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    )  # fmt: skip

    @classmethod
    def of(cls, array: Array) -> Tensor:
        code, bits = type_of(array.dtype.name)
        shape = (ctypes.c_int64 * RANK)(*array.shape)
        return cls(array.ctypes.data, shape, array.ndim, code, bits)

    def array(self) -> Array:
        dtype = next(name for name in NAMES if type_of(name) == (self.code, self.bits))
        shape = self.shape[: self.rank]
        size = int(np.prod(shape)) * self.bits // 8
        return np.frombuffer(ctypes.string_at(self.data, size), dtype).reshape(shape)


class Loaded:
    """A package opened once by the loader of the folders ``loader``, in this process."""

    def __init__(self, loader: Sequence[Path], folder: Path, library: str) -> None:
        self._c = ctypes.CDLL(str(runner("cc", "-shared", "-fPIC", loader=loader)))
        self._c.qc_open.restype, self._c.qc_error.restype = ctypes.c_void_p, ctypes.c_char_p
        self._c.qc_memory.restype = ctypes.c_size_t
        files = [str(folder / name).encode() for name in (library, "program.plan", "program.parameters")]
        error = ctypes.create_string_buffer(256)
        opened = self._c.qc_open(*files, error, ctypes.c_size_t(256))
        if not opened:
            raise RuntimeError(error.value.decode())
        self._program = ctypes.c_void_p(opened)

    def run(self, feeds: Sequence[Array]) -> list[Array]:
        given = [np.ascontiguousarray(array) for array in feeds]
        made = (Tensor * self._c.qc_output_count(self._program))()
        if self._c.qc_run(self._program, (Tensor * len(given))(*map(Tensor.of, given)), made):
            raise RuntimeError(self._c.qc_error(self._program).decode())
        return [one.array() for one in made]

    @property
    def memory(self) -> int:
        return int(self._c.qc_memory(self._program))

    def close(self) -> None:
        self._c.qc_close(self._program)


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
