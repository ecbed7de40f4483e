"""A compiled folder as a program: the library, its parameters bound, behind the methods of an ONNX Runtime session."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.backends.base import Kernel
from qcompile.backends.tvm import parameters
from qcompile.backends.tvm.require import require_tvm
from qcompile.errors import UserError

FILE, LIBRARY, PARAMETERS = "program.json", "program.so", "parameters.safetensors"
FORMAT = 2
_KINDS = {
    "float32": "float", "float64": "double", "float16": "float16", "int64": "int64", "int32": "int32", "int8": "int8",
    "uint8": "uint8", "bool": "bool",
}  # fmt: skip

_ONNX = {"float32": "FLOAT", "float64": "DOUBLE"}


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output; dynamic dims are names. An output that the model gives no shape has None.

    rows: of the table that an input's ids are of; 0 where there is none
    """

    name: str
    dtype: str
    shape: list[int | str] | None
    rows: int = 0

    @property
    def type(self) -> str:
        """The type as ONNX Runtime spells it."""
        return f"tensor({_KINDS.get(self.dtype, self.dtype)})"


class Held:
    """A result that stays where the program made it until it is asked for."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def numpy(self) -> np.ndarray:
        found: np.ndarray = self.tensor if isinstance(self.tensor, np.ndarray) else self.tensor.numpy()
        return found


def describe(folder: Path) -> dict[str, Any]:
    """What ``program.json`` in ``folder`` says; UserError where there is none of this format."""
    path = folder / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {error}", hint="name a folder that was compiled for TVM") from error
    if found.get("format") != FORMAT:
        hint = "compile the model again with this version"
        raise UserError(f"'{path}' has format {found.get('format')}, this version reads {FORMAT}", hint=hint)
    return found


def products(folder: Path) -> list[Kernel]:
    """How each product of the program in ``folder`` runs."""
    kernels: list[Kernel] = describe(folder)["kernels"]
    return kernels


def ports(folder: Path) -> dict[str, Any]:
    """Names, types and shapes of inputs and outputs, with the types as ONNX calls them."""
    described = describe(folder)
    return {side: [_in_onnx(port) for port in described[side]] for side in ("inputs", "outputs")}


def _in_onnx(port: dict[str, Any]) -> dict[str, Any]:
    return {"name": port["name"], "type": _ONNX.get(port["dtype"], port["dtype"].upper()), "shape": port["shape"]}


class Ports(abc.ABC):
    """Inputs and outputs of a described program, with the methods of an ONNX Runtime session."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._inputs = [Port(**port) for port in described["inputs"]]
        self._outputs = [Port(**port) for port in described["outputs"]]
        self._longest: int = described["longest"]

    def get_inputs(self) -> list[Port]:
        return self._inputs

    def get_outputs(self) -> list[Port]:
        return self._outputs

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs ``names`` (all, in order, for None) of one set of inputs."""
        return [value.numpy() for value in self.run_with_ort_values(names, feeds)]

    def run_with_ort_values(self, names: Sequence[str] | None, values: Mapping[str, Any]) -> list[Held]:
        """The same without copies of what an earlier run gave."""
        made = self._made([self._given(port, values) for port in self._inputs])
        by_name = {port.name: Held(result) for port, result in zip(self._outputs, made, strict=True)}
        return list(by_name.values()) if names is None else [by_name[name] for name in names]

    @abc.abstractmethod
    def _made(self, given: list[Any]) -> Sequence[Any]:
        """The outputs in order, of inputs in order."""

    @abc.abstractmethod
    def _taken(self, array: np.ndarray) -> Any:
        """``array`` as the program takes it."""

    def _given(self, port: Port, values: Mapping[str, Any]) -> Any:
        if port.name not in values:
            names = ", ".join(p.name for p in self._inputs)
            raise UserError(f"the input '{port.name}' is missing", hint=f"the program takes {names}")
        value = values[port.name]
        if isinstance(value, Held):
            return value.tensor
        array = value if isinstance(value, np.ndarray) else value.numpy()
        shape = port.shape or []
        fits = array.ndim == len(shape) and all(
            side == real for side, real in zip(shape, array.shape, strict=True) if isinstance(side, int)
        )
        if array.dtype.name != port.dtype or not fits:
            what = f"the input '{port.name}' is {array.dtype.name} {array.shape}"
            raise UserError(what, hint=f"it must be {port.dtype} {tuple(shape)}")
        check_indices(port.name, array, port.rows, self._longest)
        return self._taken(array)


def check_indices(name: str, array: np.ndarray, rows: int, longest: int) -> None:
    """No kernel checks what it reads a table at: UserError for ids beyond ``rows`` and texts beyond ``longest``."""
    if array.ndim == 2 and array.dtype.kind == "i" and array.shape[1] > longest:
        what = f"the input '{name}' has {array.shape[1]} tokens, but the program has {longest} positions"
        raise UserError(what, hint=f"cut it to {longest} tokens")
    if rows and array.size and not 0 <= array.min() <= array.max() < rows:
        what = f"the input '{name}' has ids from {array.min()} to {array.max()}, its table {rows} rows"
        raise UserError(what, hint=f"give ids from 0 to {rows - 1}")


class Session(Ports):
    """The program in ``folder``, ready to run on this machine."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        tvm = require_tvm()
        from tvm import relax

        described = describe(folder)
        super().__init__(described)
        self._tvm, self._device = tvm, tvm.device(described["device"])
        try:
            library = tvm.runtime.load_module(str(folder / LIBRARY))
            self._machine = relax.VirtualMachine(library, self._device)
        except Exception as error:  # a library for another processor, a runtime that is not in this TVM
            what = f"TVM cannot load '{folder / LIBRARY}': {str(error).strip().splitlines()[-1][:300]}"
            hint = "was it compiled for this machine? `qcompile targets` says what runs here"
            raise UserError(what, hint=hint) from error
        tvm.get_global_func("runtime.config_threadpool")(1, threads or os.cpu_count() or 1)
        held = parameters.read(folder / PARAMETERS)
        self._parameters = [self._taken(held[name]) for name in described["parameters"]]
        self._run = self._machine["main"]

    def _made(self, given: list[Any]) -> Sequence[Any]:
        try:
            found = self._run(*given, *self._parameters)
        except Exception as error:  # a processor without the units that the program was compiled for
            what = f"TVM cannot run the program: {str(error).strip().splitlines()[-1][:300]}"
            raise UserError(what, hint="compile it again on this machine, or with --target cpu") from error
        return [found] if len(self._outputs) == 1 else list(found)

    def _taken(self, array: np.ndarray) -> Any:
        return self._tvm.runtime.tensor(np.asarray(array, order="C"), self._device)
