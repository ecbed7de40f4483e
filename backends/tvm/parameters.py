"""The parameters of a program in one file: an 8-byte length, JSON, and the tensors one behind the other.

That is the safetensors layout. It needs no library to be read, cannot run code, and is mapped, so that a tensor is in
memory only while it is written or bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import UserError

_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_TYPES = {code: name for name, code in _CODES.items()}


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``arrays`` to ``path``, one at a time."""
    header: dict[str, Any] = {}
    start = 0
    for name, array in arrays.items():
        size = math.prod(array.shape) * array.dtype.itemsize
        header[name] = {
            "dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, start + size],
        }  # fmt: skip
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.asarray(array, order="C").data)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays in ``path``, mapped; UserError where the file is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        size = path.stat().st_size
        mapped = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        found = {}
        for name, entry in header.items():
            first, last = (int(offset) + 8 + length for offset in entry["data_offsets"])
            if not 0 <= first <= last <= size:
                raise ValueError(f"'{name}' lies outside of the file")
            found[name] = mapped[first:last].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the parameters in '{path}': {error}", hint="compile the model again") from error
    return found
