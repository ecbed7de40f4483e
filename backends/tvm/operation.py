"""One node as converters see it: its attributes as plain values, its inputs as values of the translator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.tvm.values import Dim, Known, Tensor, Value
from qcompile.errors import UserError

DTYPES = {
    ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT16: "float16",
    ir.DataType.INT8: "int8", ir.DataType.INT16: "int16", ir.DataType.INT32: "int32", ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8", ir.DataType.UINT16: "uint16", ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64", ir.DataType.BOOL: "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """A node. ``where``: the name of its layer in the user's model, for errors."""

    kind: str
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    outputs: int
    where: str

    def whole(self, name: str, default: int = 0) -> int:
        return int(self.attributes.get(name, default))

    def real(self, name: str, default: float = 0.0) -> float:
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str = "") -> str:
        found = self.attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else str(found)

    def ints(self, name: str) -> list[int] | None:
        found = self.attributes.get(name)
        return None if found is None else [int(value) for value in found]

    def has(self, place: int) -> bool:
        return len(self.inputs) > place and self.inputs[place] is not None

    def value(self, place: int) -> Value:
        """Input ``place``, which must be there."""
        found = self.inputs[place] if len(self.inputs) > place else None
        if found is None:
            raise self.unsupported(f"it has no input {place}")
        return found

    def known(self, place: int) -> Known:
        """Input ``place``, which must be a constant or computed from dims."""
        found = self.value(place)
        if not isinstance(found, Known):
            raise self.unsupported(f"input {place} is computed from data")
        return found

    def dims(self, place: int) -> list[Dim]:
        return self.known(place).ints()

    def axes(self, rank: int, place: int = 1) -> list[int] | None:
        """The axes of an input or attribute, counted from the front; None where neither is given."""
        found = self.dims(place) if self.has(place) else self.ints("axes")
        return None if found is None else [int(axis) % rank for axis in found]

    def unsupported(self, why: str) -> UserError:
        return UserError(
            f"TVM: no translation of {self.kind}: {why}",
            where=self.where,
            hint="take --target cpu, which runs every ONNX operator, or export the model without it",
        )


def attributes_of(node: ir.Node, given: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of ``node`` as plain values; those that refer to the call's are looked up in ``given``."""
    found: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            if attribute.ref_attr_name is not None and attribute.ref_attr_name in given:
                found[name] = given[attribute.ref_attr_name]
        elif attribute.type == ir.AttributeType.TENSOR:
            found[name] = attribute.as_tensor().numpy()
        else:
            found[name] = attribute.value
    return found


def constant_of(attributes: Mapping[str, Any]) -> np.ndarray:
    """The content of a Constant node."""
    (name, value), = attributes.items()
    if name == "value":
        return np.asarray(value)
    return np.asarray(value, np.float32 if name in ("value_float", "value_floats") else np.int64)


def rank_of(value: Value) -> int:
    return value.rank if isinstance(value, Tensor) else value.array.ndim


def type_of(value: Value) -> str:
    return value.dtype
