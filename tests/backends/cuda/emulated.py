"""A device that runs ``program.cu`` on this processor: g++ compiles the very source, on a model of a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODEL = Path(__file__).parent.parent / "tvm" / "gpu_model"
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^;{]*\) (?={)')
_WAITS = re.compile(r"__syncthreads|__shfl|(?:integer|nbits)::")


class Emulated:
    """``gpu.program.Device`` in memory of this process. ``scratch``: where the library is built."""

    def __init__(self, source: Path, scratch: Path) -> None:
        (scratch / "cuda.h").write_text("")
        text = source.read_text()
        _, *parts = _KERNEL.split(text)
        doors = [
            f'extern "C" void launch_{name}(void **a, unsigned g, int b) '
            f"{{ launch<{str(bool(_WAITS.search(body))).lower()}, {name}>({name}, a, g, b); }}"
            for name, body in zip(parts[::2], parts[1::2], strict=True)
        ]
        (scratch / "all.cpp").write_text(f'#include "host.h"\n{text}\n' + "\n".join(doors))
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]
        command += [f"-I{scratch}", f"-I{MODEL}", "-o", str(scratch / "all.so"), str(scratch / "all.cpp")]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(scratch / "all.so"))
        self.memory: dict[int, Any] = {}
        self.launches = 0

    def allocate(self, size: int) -> int:
        held = np.full(size + 64, 0xA5, np.uint8)
        self.memory[held.ctypes.data] = held
        return held.ctypes.data

    def free(self, place: int) -> None:
        del self.memory[place]

    def upload(self, place: int, array: np.ndarray) -> None:
        ctypes.memmove(place, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, place: int) -> None:
        ctypes.memmove(array.ctypes.data, place, array.nbytes)

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        getattr(self._library, f"launch_{kernel}")(places, grid, block)
        self.launches += 1
