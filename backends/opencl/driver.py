"""OpenCL through its C interface: memory, one program, launches. Nothing of Python's packages for it is needed."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import UserError

SOURCE = "program.cl"
INSTALL = "apt-get install pocl-opencl-icd ocl-icd-libopencl1 (OpenCL on the processor), or your GPU's own driver"
# Quotients and roots as IEEE rounds them, where the device can; the source itself keeps products and sums apart.
OPTIONS, EXACT = b"-cl-std=CL1.2", b" -cl-fp32-correctly-rounded-divide-sqrt"
_GPU, _EVERY = 1 << 2, 0xFFFFFFFF
_NAME, _BUILD_LOG, _READ_WRITE, _BLOCKING = 0x102B, 0x1183, 1, 1
_FLOATS, _CAN_BE_EXACT = 0x101B, 1 << 7
_Number, _Place = ctypes.c_uint32, ctypes.c_void_p


def library() -> ctypes.CDLL | None:
    """The loader of OpenCL's platforms; None where there is none."""
    name = ctypes.util.find_library("OpenCL")
    return None if name is None else ctypes.CDLL(name)


def devices(loader: ctypes.CDLL) -> list[int]:
    """The devices of all platforms, GPUs first."""
    platforms = _listed(lambda *room: loader.clGetPlatformIDs(*room))
    found: dict[int, None] = {}
    for kind in (_GPU, _EVERY):
        for one in platforms:
            given = _Place(one), ctypes.c_uint64(kind)
            found |= dict.fromkeys(_listed(lambda *room, given=given: loader.clGetDeviceIDs(*given, *room)))
    return list(found)


def present() -> str:
    """The name of the device that programs run on; empty where there is none."""
    loader = library()
    found = [] if loader is None else devices(loader)
    return _text(loader, "clGetDeviceInfo", _Place(found[0]), _NAME) if found else ""


def _text(loader: Any, ask: str, *given: Any) -> str:
    """What ``ask`` tells of ``given``, whose last is the number of the question."""
    *subject, question = given
    room = ctypes.c_size_t()
    getattr(loader, ask)(*subject, _Number(question), ctypes.c_size_t(0), None, ctypes.byref(room))
    text = ctypes.create_string_buffer(room.value + 1)
    getattr(loader, ask)(*subject, _Number(question), room, text, None)
    return text.value.decode(errors="replace")


def _listed(ask: Any) -> list[int]:
    """What a function of OpenCL's gives that is asked for a number first; none where it refuses."""
    count = _Number()
    if ask(0, None, ctypes.byref(count)) or not count.value:
        return []
    places = (_Place * count.value)()
    return [] if ask(count, places, None) else [place for place in places if place]


class Platform:
    """The first device, GPUs before processors, with the kernels of ``folder``. Pointers are buffers of OpenCL."""

    def __init__(self, folder: Path) -> None:
        loader = library()
        found = [] if loader is None else devices(loader)
        if loader is None or not found:
            lacks = "libOpenCL" if loader is None else "a platform with a device"
            raise UserError(f"'{folder}' needs OpenCL, and {lacks} is not here", hint=INSTALL)
        self._library, self._device = loader, _Place(found[0])
        self._name = _text(loader, "clGetDeviceInfo", self._device, _NAME)
        self._context = self._made("clCreateContext", None, 1, ctypes.byref(self._device), None, None)
        self._queue = self._made("clCreateCommandQueue", self._context, self._device, ctypes.c_uint64(0))
        self._program = self._built((folder / SOURCE).read_bytes())
        self._kernels: dict[str, ctypes.c_void_p] = {}

    def allocate(self, size: int) -> int:
        return self._made("clCreateBuffer", self._context, ctypes.c_uint64(_READ_WRITE), _size(size), None).value or 0

    def free(self, place: int) -> None:
        self._do("clReleaseMemObject", _Place(place))

    def upload(self, place: int, array: np.ndarray) -> None:
        self._copy("clEnqueueWriteBuffer", place, array)

    def download(self, array: np.ndarray, place: int) -> None:
        self._copy("clEnqueueReadBuffer", place, array)

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """``arguments``: values of ctypes."""
        if kernel not in self._kernels:
            self._kernels[kernel] = self._made("clCreateKernel", self._program, kernel.encode())
        found = self._kernels[kernel]
        for number, one in enumerate(arguments):
            size = ctypes.c_size_t(ctypes.sizeof(one))
            self._do("clSetKernelArg", found, _Number(number), size, ctypes.byref(one))
        every, group = ctypes.c_size_t(grid * block), ctypes.c_size_t(block)
        sizes = None, ctypes.byref(every), ctypes.byref(group)
        self._do("clEnqueueNDRangeKernel", self._queue, found, _Number(1), *sizes, _Number(0), None, None)

    def _copy(self, name: str, place: int, array: np.ndarray) -> None:
        if array.nbytes:
            size, there = ctypes.c_size_t(array.nbytes), _Place(array.ctypes.data)
            given = _Place(place), _Number(_BLOCKING), ctypes.c_size_t(0), size, there
            self._do(name, self._queue, *given, _Number(0), None, None)

    def _built(self, source: bytes) -> ctypes.c_void_p:
        text, length = ctypes.c_char_p(source), ctypes.c_size_t(len(source))
        given = _Number(1), ctypes.byref(text), ctypes.byref(length)
        program = self._made("clCreateProgramWithSource", self._context, *given)
        floats = ctypes.c_uint64()
        self._library.clGetDeviceInfo(self._device, _Number(_FLOATS), _size(8), ctypes.byref(floats), None)
        options = OPTIONS + EXACT * bool(floats.value & _CAN_BE_EXACT)
        status = self._library.clBuildProgram(program, _Number(1), ctypes.byref(self._device), options, None, None)
        if status:
            said = _text(self._library, "clGetProgramBuildInfo", program, self._device, _BUILD_LOG)
            lines = [line for line in said.splitlines() if "error" in line] or [f"error {status}"]
            what = f"{self._name} cannot compile {SOURCE}: {lines[0][:300]}"
            raise UserError(what, hint="another device may; --target cpu runs on the processor")
        return program

    def _made(self, name: str, *given: Any) -> ctypes.c_void_p:
        function, status = getattr(self._library, name), ctypes.c_int32()
        function.restype = _Place
        made = _Place(function(*given, ctypes.byref(status)))
        self._check(name, status.value)
        return made

    def _do(self, name: str, *given: Any) -> None:
        self._check(name, getattr(self._library, name)(*given))

    def _check(self, name: str, status: int) -> None:
        if status:
            hint = "fewer rows or a shorter text take less memory; --target cpu runs on the processor"
            raise UserError(f"OpenCL: {name} on {self._name}: error {status}", hint=hint)


def _size(size: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(max(size, 1))
