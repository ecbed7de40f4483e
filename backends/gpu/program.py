"""A folder for a GPU as a program: its plan is followed, launch by launch. Needs NumPy and a device."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qcompile.backends.mobile.plan import evaluate
from qcompile.backends.tvm.program import Port, describe
from qcompile.errors import UserError

PARAMETERS = "program.parameters"
_SCALARS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "uint32": ctypes.c_uint32, "uint64": ctypes.c_uint64}


class Device(Protocol):
    """Where kernels run; places are what it names memory by."""

    def allocate(self, size: int) -> int: ...
    def free(self, place: int) -> None: ...
    def upload(self, place: int, array: np.ndarray) -> None: ...
    def download(self, array: np.ndarray, place: int) -> None: ...
    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None: ...


class Result:
    """An output, as ONNX Runtime gives them."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array


def opened(folder: Path) -> Session:
    """The program in ``folder``, on the device of its target; UserError where that is not here."""
    device = describe(folder)["device"]
    if device == "cuda":
        from qcompile.backends.cuda.compiler import CUBIN
        from qcompile.backends.cuda.driver import Driver

        return Session(folder, Driver(folder / CUBIN))
    if device == "opencl":
        from qcompile.backends.opencl.driver import Platform

        return Session(folder, Platform(folder))
    what = f"'{folder}' holds the source of a program for {device}, which nothing here compiles or runs"
    raise UserError(what, hint="compile with --target opencl for a GPU of this machine, or with --target cpu")


class Session:
    """The program in ``folder`` with the methods of an ONNX Runtime session, on ``device``."""

    def __init__(self, folder: Path, device: Device) -> None:
        self._described = described = describe(folder)
        self._inputs = [Port(**port) for port in described["inputs"]]
        self._outputs = [Port(**port) for port in described["outputs"]]
        self._slots: list[dict[str, Any]] = described["slots"]
        self._device = device
        self._parameters = self._uploaded(np.fromfile(folder / PARAMETERS, np.uint8))
        self._last: dict[int, list[int]] = {}
        for number, slot in enumerate(self._slots):
            if slot["place"] == "temporary":
                self._last.setdefault(slot["last"], []).append(number)

    def get_inputs(self) -> list[Port]:
        return self._inputs

    def get_outputs(self) -> list[Port]:
        return self._outputs

    def run_with_ort_values(self, names: Sequence[str] | None, values: Mapping[str, Any]) -> list[Result]:
        feeds = {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in values.items()}
        return [Result(array) for array in self.run(names, feeds)]

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs ``names`` (all, in order, for None) of one set of inputs."""
        given = [self._given(port, feeds) for port in self._inputs]
        variables = [given[number].shape[axis] for number, axis in self._described["variables"]]
        dims = [evaluate(code, variables) for code in self._described["expressions"]]
        held: dict[int, int] = {}
        try:
            for slot, array in zip(self._described["input_slots"], given, strict=True):
                self._check(slot, array, dims)
                held[slot] = self._on_device(array)
            self._follow(held, dims)
            ends = zip(self._outputs, self._described["output_slots"], strict=True)
            made = [self._fetched(slot, held, dims).astype(port.dtype, copy=False) for port, slot in ends]
        finally:
            for place in held.values():
                self._device.free(place)
        by_name = dict(zip((port.name for port in self._outputs), made, strict=True))
        return made if names is None else [by_name[name] for name in names]

    def _follow(self, held: dict[int, int], dims: Sequence[int]) -> None:
        launches = self._described["launches"]
        for number, launch in enumerate(launches):
            arguments = [
                ctypes.c_uint64(self._place(one, held, dims)) if kind == "tensor" else _SCALARS[kind](dims[one])
                for kind, one in launch["arguments"]
            ]
            if dims[launch["grid"]]:
                self._device.launch(launch["kernel"], dims[launch["grid"]], launch["block"], arguments)
            if number + 1 == len(launches) or launches[number + 1]["step"] != launch["step"]:
                for slot in self._last.get(launch["step"], ()):
                    if slot in held:
                        self._device.free(held.pop(slot))

    def _place(self, number: int, held: dict[int, int], dims: Sequence[int]) -> int:
        slot = self._slots[number]
        if slot["place"] == "view":
            return self._place(slot["source"], held, dims)
        if slot["place"] in ("parameter", "derived"):
            return self._parameters[number]
        if number not in held:
            held[number] = self._device.allocate(_bytes(slot, dims))
        return held[number]

    def _fetched(self, number: int, held: dict[int, int], dims: Sequence[int]) -> np.ndarray:
        slot = self._slots[number]
        array = np.empty([dims[dim] for dim in slot["dims"]], slot["dtype"])
        self._device.download(array, self._place(number, held, dims))
        return array

    def _uploaded(self, content: np.ndarray) -> dict[int, int]:
        """The parameters on the device, by slot."""
        found: dict[int, int] = {}
        shared: dict[int, int] = {}  # by the place in the file
        for number, slot in enumerate(self._slots):
            if slot["place"] not in ("parameter", "derived"):
                continue
            dims = {dim: evaluate(self._described["expressions"][dim], []) for dim in slot["dims"]}
            if slot["place"] == "derived":
                rows, columns = (dims[dim] for dim in slot["dims"])
                begin = self._slots[slot["source"]]["source"]
                table = content[begin : begin + rows * columns].reshape(columns, rows)
                found[number] = self._on_device(np.ascontiguousarray(table.T + np.uint8(slot["addend"])))
            else:
                begin = slot["source"]
                if begin not in shared:
                    shared[begin] = self._on_device(content[begin : begin + _bytes(slot, dims)])
                found[number] = shared[begin]
        return found

    def _on_device(self, array: np.ndarray) -> int:
        place = self._device.allocate(array.nbytes)
        self._device.upload(place, array)
        return place

    def _given(self, port: Port, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        if port.name not in feeds:
            names = ", ".join(p.name for p in self._inputs)
            raise UserError(f"the input '{port.name}' is missing", hint=f"the program takes {names}")
        array = np.ascontiguousarray(feeds[port.name])
        if array.dtype.name != port.dtype or array.ndim != len(port.shape or []):
            what = f"the input '{port.name}' is {array.dtype.name} {array.shape}"
            raise UserError(what, hint=f"it must be {port.dtype} {tuple(port.shape or [])}")
        return array

    def _check(self, slot: int, array: np.ndarray, dims: Sequence[int]) -> None:
        shape = tuple(dims[dim] for dim in self._slots[slot]["dims"])
        if array.shape != shape:
            name = self._inputs[self._slots[slot]["source"]].name
            what = f"input '{name}' has the shape {array.shape}, not {shape}"
            raise UserError(what, hint="give all inputs the same batch and length")


def _bytes(slot: Mapping[str, Any], dims: Sequence[int] | Mapping[int, int]) -> int:
    item: int = np.dtype(slot["dtype"]).itemsize
    return int(math.prod(dims[dim] for dim in slot["dims"])) * item
