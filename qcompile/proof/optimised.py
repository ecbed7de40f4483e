"""The graph that ONNX Runtime really runs: its optimisers may insert floats and Casts, so that it is checked too."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import onnx_ir as ir

from qcompile.errors import UserError
from qcompile.proof.floats import Crossing, check_types
from qcompile.proof.intervals import Finding, finding
from qcompile.proof.prepared import infer

LEVELS = ("basic", "extended", "all")
_TYPES = {
    "tensor(float)": ir.DataType.FLOAT, "tensor(double)": ir.DataType.DOUBLE, "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16, "tensor(bool)": ir.DataType.BOOL,
    **{f"tensor({t.name.lower()})": t for t in ir.DataType if t.name.startswith(("INT", "UINT"))},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimisedGraph:
    """What ONNX Runtime makes of the program at one level of optimisation.

    ``extensions``: its own operators in it whose operands are all integer, with their number.
    """

    level: str
    nodes: int
    kinds: dict[str, int]
    boundary: list[Crossing]
    extensions: dict[str, int]
    findings: list[Finding]


def optimised_graph(path: Path, level: str) -> OptimisedGraph:
    """Check the types in the graph that ONNX Runtime makes of the program at ``path``."""
    from qcompile.calibration.runner import open_session

    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        target = Path(folder) / "optimised.onnx"
        try:
            open_session(path, threads=1, optimised_path=target, level=level)
            model = ir.load(target)
            _add_types(model, target.with_name("typed.onnx"))
        except UserError as error:
            problem = finding("runtime", None, None, f"{error.message} (optimised, {level})", error.hint)
            return OptimisedGraph(level, 0, {}, [], {}, [problem])
        types = check_types(model, optimised=True)
        nodes = sum(1 for graph in model.graphs() for _ in graph)
    findings = [dataclasses.replace(one, text=f"{one.text} (optimised, {level})") for one in types.findings]
    return OptimisedGraph(level, nodes, types.kinds, types.boundary, types.extensions, findings)


def _add_types(model: ir.Model, scratch: Path) -> None:
    """Inference knows no types of the runtime's own operators; the runtime says them of values that it returns."""
    from qcompile.calibration.runner import open_session

    infer(model)
    unknown = {str(v.name): v for node in model.graph for v in node.outputs if v.dtype is None and v.name}
    if not unknown:
        return
    outputs = list(model.graph.outputs)
    model.graph.outputs.extend(value for value in unknown.values() if value not in outputs)
    ir.save(model, scratch)
    model.graph.outputs[:] = outputs
    for port in open_session(scratch, threads=1, level="basic").get_outputs():
        if port.name in unknown and port.type in _TYPES:
            unknown[port.name].type = ir.TensorType(_TYPES[port.type])
