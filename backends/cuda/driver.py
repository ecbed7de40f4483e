"""CUDA's driver through its C interface: memory, one module, launches. Nothing else of CUDA is needed to run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import UserError

LIBRARY = "libcuda.so.1"
HINT = "run it on a machine with an NVIDIA GPU and its driver; --target cpu or llvm makes a program for this one"


class Driver:
    """The first GPU, with the kernels of a cubin. Pointers are addresses on the GPU."""

    def __init__(self, cubin: Path) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise UserError(f"'{cubin.parent}' needs an NVIDIA GPU: {LIBRARY} is not here", hint=HINT) from error
        device, self._context, self._module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        if self._library.cuInit(0) or self._library.cuDeviceGet(ctypes.byref(device), 0):
            raise UserError(f"'{cubin.parent}' needs an NVIDIA GPU, and the driver finds none", hint=HINT)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._do("cuCtxSetCurrent", self._context)
        self._do("cuModuleLoadData", ctypes.byref(self._module), cubin.read_bytes())
        self._functions: dict[str, ctypes.c_void_p] = {}

    def allocate(self, size: int) -> int:
        found = ctypes.c_uint64()
        self._do("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(max(size, 1)))
        return found.value

    def free(self, place: int) -> None:
        self._do("cuMemFree_v2", ctypes.c_uint64(place))

    def upload(self, place: int, array: np.ndarray) -> None:
        if array.nbytes:
            self._do("cuMemcpyHtoD_v2", ctypes.c_uint64(place), ctypes.c_void_p(array.ctypes.data), _size(array))

    def download(self, array: np.ndarray, place: int) -> None:
        if array.nbytes:
            self._do("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(place), _size(array))

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """``arguments``: values of ctypes."""
        if kernel not in self._functions:
            self._functions[kernel] = ctypes.c_void_p()
            self._do("cuModuleGetFunction", ctypes.byref(self._functions[kernel]), self._module, kernel.encode())
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        self._do("cuLaunchKernel", self._functions[kernel], grid, 1, 1, block, 1, 1, 0, None, places, None)

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"").decode() or f"error {status}"
            hint = "is the program for this GPU? sm_80 code runs on 8.x, sm_90 on 9.0"
            raise UserError(f"CUDA: {name}: {said}", hint=hint)


def _size(array: np.ndarray) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)
