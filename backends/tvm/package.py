"""A program as files: one shared library, its parameters, and a description that a loader in any language can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm

from qcompile.backends.base import Kernel
from qcompile.backends.tvm import parameters
from qcompile.backends.tvm.operation import DTYPES
from qcompile.backends.tvm.pipeline import build
from qcompile.backends.tvm.program import FILE, FORMAT, LIBRARY, PARAMETERS
from qcompile.backends.tvm.translate import translated
from qcompile.calibration.inputs import model_inputs
from qcompile.calibration.positions import position_limits
from qcompile.errors import UserError
from qcompile.progress import step


def write(
    model: ir.Model, folder: Path, target: Any, *, link: Callable[..., Any] | None = None, tiles: bool = True,
    accuracy_level: int = 1,
) -> list[Kernel]:  # fmt: skip
    """Compile ``model`` for ``target`` (a ``tvm.target.Target``) into ``folder``; the kernel of each product.

    ``link``: what makes a library of object files, TVM's own for None; ``accuracy_level``: of weight-only linears
    """
    found = translated(model, tiles=tiles, target=target if tiles else None, accuracy_level=accuracy_level)
    with step(f"compiling {len(found.module.functions) - 1} kernels"):
        executable = build(found.module, target)
    with step("writing the library"):
        _export(executable, folder / LIBRARY, link)
        parameters.write(folder / PARAMETERS, found.parameters)
    _describe(model, folder, target, found.parameters, found.products)
    return found.products


def _export(executable: Any, path: Path, link: Callable[..., Any] | None) -> None:
    try:
        executable.export_library(str(path), **({} if link is None else {"fcompile": link}))
    except (RuntimeError, OSError) as error:
        what = f"the library cannot be linked: {str(error).strip().splitlines()[-1][:300]}"
        raise UserError(what, hint="a C++ compiler is needed: apt-get install g++") from error


def _describe(
    model: ir.Model, folder: Path, target: Any, held: dict[str, np.ndarray], products: Sequence[Kernel]
) -> None:
    described = {
        **common(model),
        "target": {key: value for key, value in target.export().items() if key != "tag"},
        "device": {"llvm": "cpu"}.get(target.kind.name, target.kind.name),
        "function": "main",
        "parameters": list(held),
        "kernels": list(products),
    }
    text = json.dumps(described, indent=1, sort_keys=True, default=str)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def common(model: ir.Model) -> dict[str, Any]:
    """What every ``program.json`` has; ``longest`` and ``rows`` as ``bounds`` gives them."""
    rows, longest = bounds(model)
    return {
        "format": FORMAT,
        "tvm": tvm.__version__,
        "inputs": [{**port_of(value), "rows": rows[str(value.name)]} for value in model.graph.inputs],
        "outputs": [port_of(value) for value in model.graph.outputs],
        "longest": longest,
    }


def bounds(model: ir.Model) -> tuple[dict[str, int], int]:
    """By input, the rows of the table that its ids are of, 0 for none; and the tokens that there are positions for."""
    return {item.name: item.vocabulary for item in model_inputs(model)}, position_limits(model)[0]


def port_of(value: ir.Value) -> dict[str, Any]:
    """Name, type and shape of an input or output, as ``program.json`` has them."""
    assert value.dtype is not None
    shape = None
    if value.shape is not None:
        shape = [side if isinstance(side, int) else side.value or "?" for side in value.shape]
    return {"name": value.name, "dtype": DTYPES[value.dtype], "shape": shape}
