"""The kernels of a plan as a library for one processor: LLVM through TVM, then ``link``.

needs:    PrimFuncs that are scheduled, or not: loops that no schedule has touched still compile
ensures:  nothing of TVM's runtime but pointers to three functions (workspaces, threads), which the loader sets
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import ir
from tvm.target import Target

from qcompile.backends.mobile.link import System, link

FEATURES = {"aarch64": ("+neon",), "x86_64": ()}


def target_of(system: System, features: Sequence[str] | None = None) -> Any:
    """LLVM's target for ``system``."""
    chosen = list(FEATURES[system.arch] if features is None else features)
    return Target({"kind": "llvm", "mtriple": system.triple, **({"mattr": chosen} if chosen else {})})


def write_library(
    module: ir.IRModule, kernels: Sequence[str], output: Path, system: System, features: Sequence[str] | None = None
) -> None:
    """Compile ``kernels`` of ``module`` and link them into ``output``."""
    functions = {name: module[name].with_attr("global_symbol", name) for name in kernels}
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        # The shapes were checked when the plan was made, and the inputs are when it runs.
        with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
            made = tvm.compile(ir.IRModule(functions), target=target_of(system, features))

        def linked(name: str, objects: Sequence[str], **_: object) -> None:
            link([Path(one) for one in objects], Path(name), system)

        place = Path(scratch) / "library.so"
        linked.output_format = "so"  # type: ignore[attr-defined]
        made.export_library(str(place), fcompile=linked)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(place.read_bytes())
