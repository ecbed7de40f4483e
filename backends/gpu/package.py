"""A program for a GPU as files: parameters, and the plan of its launches; its source is for the target to write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tvm.target import Target

from qcompile.backends.base import Kernel
from qcompile.backends.gpu.launches import Launch, compiled, launches_of
from qcompile.backends.gpu.program import PARAMETERS
from qcompile.backends.gpu.schedule import schedule
from qcompile.backends.mobile.extract import extract
from qcompile.backends.mobile.plan import Plan
from qcompile.backends.tvm.package import bounds, common
from qcompile.backends.tvm.program import FILE, describe
from qcompile.backends.tvm.translate import translated
from qcompile.errors import UserError
from qcompile.progress import step


@dataclasses.dataclass(frozen=True)
class Written:
    """The source of a program's kernels, and what it says of them."""

    source: str
    plan: Plan
    launches: Sequence[Launch]


def write(model: ir.Model, folder: Path, kind: Mapping[str, str], threads: int) -> Written:
    """Write ``model`` into ``folder``, but for its source. ``kind``: TVM's target; ``threads``: of a block."""
    target = Target(dict(kind), host="llvm")
    found = translated(model, tiles=False, target=target)
    module = schedule(found.module, rows=kind["kind"] == "cuda", threads=threads)
    ports = [[str(value.name) for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    try:
        plan = extract(module, found.parameters, *ports)
        plan.rows, plan.longest = bounds(model)
    except UserError as error:
        raise UserError(error.message, hint="--target cpu runs every program") from error
    with step(f"writing {len(plan.kernels)} kernels for {kind['kind']}"):
        source, host = compiled(module, plan.kernels, target)
        launches = launches_of(plan, module, host)
    with (folder / PARAMETERS).open("wb") as file:
        for piece in plan.pieces():
            file.write(piece)
    _describe(model, folder, kind, found.products, plan, launches)
    return Written(source, plan, launches)


def tell(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add ``facts`` to program.json."""
    save({**describe(folder), **facts}, folder)


def _describe(
    model: ir.Model, folder: Path, kind: Mapping[str, str], products: Sequence[Kernel], plan: Plan,
    launches: Sequence[Launch],
) -> None:  # fmt: skip
    described = {
        **common(model),
        "device": kind["kind"],
        "arch": kind.get("arch", ""),
        "kernels": list(products),
        "variables": plan.variables,
        "expressions": plan.expressions,
        "slots": [dataclasses.asdict(slot) for slot in plan.slots],
        "input_slots": [slot for _, slot in plan.inputs],
        "output_slots": [slot for _, slot in plan.outputs],
        "launches": [dataclasses.asdict(launch) for launch in launches],
    }
    save(described, folder)


def save(described: Mapping[str, Any], folder: Path) -> None:
    """Write ``described``, what a loader must know, into ``folder``."""
    lines = [f' "{key}": {_text(described[key])}' for key in sorted(described)]
    (folder / FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _text(value: Any) -> str:
    """JSON with an entry of a list a line."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(one, sort_keys=True)}" for one in value) + "\n ]"
    return json.dumps(value)
