"""A program for an NVIDIA GPU as files: source, PTX, machine code, parameters, and the plan of its launches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tvm
from tvm.target import Target

from qcompile.backends.base import Kernel
from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.launches import Launch, compiled, launches_of
from qcompile.backends.cuda.program import PARAMETERS
from qcompile.backends.cuda.schedule import schedule
from qcompile.backends.mobile.extract import extract
from qcompile.backends.mobile.plan import Plan
from qcompile.backends.tvm.kernels.cuda.build import Resources
from qcompile.backends.tvm.package import port_of
from qcompile.backends.tvm.program import FILE, FORMAT
from qcompile.backends.tvm.translate import translated
from qcompile.errors import UserError
from qcompile.progress import step


def write(model: ir.Model, folder: Path, architecture: str) -> None:
    """Compile ``model`` into ``folder``."""
    target = Target({"kind": "cuda", "arch": architecture}, host="llvm")
    found = translated(model, tiles=False, target=target)
    module = schedule(found.module)
    ports = [[str(value.name) for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    try:
        plan = extract(module, found.parameters, *ports)
    except UserError as error:
        raise UserError(error.message, hint="--target cpu runs every program") from error
    with step(f"compiling {len(plan.kernels)} kernels for {architecture}"):
        source, host = compiled(module, plan.kernels, target)
        launches = launches_of(plan, module, host)
        taken = compiler.compile_source(source, architecture, folder)
    with (folder / PARAMETERS).open("wb") as file:
        for piece in plan.pieces():
            file.write(piece)
    _describe(model, folder, architecture, found.products, plan, launches, taken)


def _describe(
    model: ir.Model, folder: Path, architecture: str, products: Sequence[Kernel], plan: Plan, launches: list[Launch],
    taken: dict[str, Resources],
) -> None:  # fmt: skip
    described: dict[str, Any] = {
        "format": FORMAT,
        "device": "cuda",
        "arch": architecture,
        "tvm": tvm.__version__,
        "inputs": [port_of(value) for value in model.graph.inputs],
        "outputs": [port_of(value) for value in model.graph.outputs],
        "kernels": list(products),
        "variables": plan.variables,
        "expressions": plan.expressions,
        "slots": [dataclasses.asdict(slot) for slot in plan.slots],
        "input_slots": [slot for _, slot in plan.inputs],
        "output_slots": [slot for _, slot in plan.outputs],
        "resources": [{"kernel": name, **dataclasses.asdict(taken[name])} for name in sorted(taken)],
        "launches": [dataclasses.asdict(launch) for launch in launches],
    }
    lines = [f' "{key}": {_text(described[key])}' for key in sorted(described)]
    (folder / FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _text(value: Any) -> str:
    """JSON with an entry of a list a line."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(one, sort_keys=True)}" for one in value) + "\n ]"
    return json.dumps(value)
