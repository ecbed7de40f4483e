"""A program made ready for the proof: read with care, functions inlined, types and shapes inferred from nothing but
the types of inputs and constants.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes

from qcompile.errors import UserError
from qcompile.graph.functions import DOMAIN
from qcompile.graph.provenance import LAYER, ORIGIN, layer_name, original_name
from qcompile.proof.floats import float_attributes_of
from qcompile.proof.intervals import Finding, finding

BOUNDS = "qcompile.bounds"  # metadata of the model: JSON, dim name -> largest size
SMALL_BYTES = 4096
_INFERENCE = "onnx_ir.passes.common.shape_inference"


@dataclasses.dataclass
class Prepared:
    """A model in one graph; ``functions``: calls by operator before inlining; ``bounds``: those it carries."""

    model: ir.Model
    functions: dict[str, int]
    foreign: dict[str, int]
    bounds: dict[str, int]
    findings: list[Finding]


def read_prepared(path: Path) -> Prepared:
    """The model of an ONNX file, ready. Raises UserError for a file that is damaged or unsafe to read."""
    from qcompile.capture.onnx_file import read_onnx

    return prepared(read_onnx(path), str(path))


def prepared(model: ir.Model, where: str) -> Prepared:
    """``model``, ready; it is changed in place."""
    found = Prepared(model, {}, {}, _own_bounds(model, where), [])
    _mark_calls(found)
    declared = {value: value.dtype for value in model.graph.outputs}
    try:
        for step in (
            onnx_passes.InlinePass(),
            onnx_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            onnx_passes.TopologicalSortPass(),
        ):
            step(model)
    except Exception as error:  # cycles, recursion and misfits have errors of the library's own
        what = f"the functions cannot be inlined: {_first_line(error)}"
        raise UserError(what, where=where, hint="check the file with `python -m onnx.checker`") from error
    forget_types(model)
    problem = infer(model)
    if problem:
        found.findings.append(finding("type", None, None, f"strict type inference fails: {problem}"))
    for value, dtype in declared.items():
        if dtype is not None and value.dtype is not None and value.dtype != dtype:
            what = f"output '{value.name}' is declared {dtype.name.lower()} but is {value.dtype.name.lower()}"
            found.findings.append(finding("type", value.producer(), value, what))
    return found


def _own_bounds(model: ir.Model, where: str) -> dict[str, int]:
    text = model.metadata_props.get(BOUNDS)
    if text is None:
        return {}
    with contextlib.suppress(ValueError):
        held = json.loads(text)
        if isinstance(held, dict) and all(type(n) is int and n > 0 for n in held.values()):
            return held
    raise UserError(
        f"the metadata '{BOUNDS}' of the model is not a JSON object of names and sizes",
        where=where,
        hint="compile the model again, or remove that entry",
    )


def _mark_calls(found: Prepared) -> None:
    """Every node of a function's body will carry the names of its call; a float that a call is given is a finding."""
    model = found.model
    for function in model.functions.values():
        for node in function.all_nodes():
            node.metadata_props.pop(LAYER, None)
            node.metadata_props.pop(ORIGIN, None)
    ours: collections.Counter[str] = collections.Counter()
    foreign: collections.Counter[str] = collections.Counter()
    for graph in model.graphs():
        for node in graph:
            if node.op_identifier() not in model.functions:
                continue
            node.metadata_props[LAYER], node.metadata_props[ORIGIN] = layer_name(node), original_name(node)
            (ours if node.domain == DOMAIN else foreign)[f"{node.domain}.{node.op_type}"] += 1
            if float_attributes_of(node):
                found.findings.append(finding("float", node, None, "the call is given a float attribute"))
    found.functions, found.foreign = dict(sorted(ours.items())), dict(sorted(foreign.items()))


def forget_types(model: ir.Model) -> None:
    """What the file says of the values in between is not believed; initializers say it by their data."""
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                value.type, value.shape = None, None
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                if value.const_value is not None:
                    value.type = ir.TensorType(value.const_value.dtype)
                    value.shape = ir.Shape(value.const_value.shape.numpy())


def _hold_small(model: ir.Model) -> None:
    """Read small constants that lie beside the file: inference computes with them, and refuses what it cannot see."""
    for graph in model.graphs():
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            held = value.const_value
            if isinstance(held, ir.ExternalTensor) and held.nbytes <= SMALL_BYTES:
                value.const_value = ir.tensor(held.numpy().copy(), name=value.name)


def infer(model: ir.Model) -> str:
    """Strict inference, which checks every operand's type; where it fails (told), what can be known without it."""
    _hold_small(model)
    with _complaints() as complaints:
        onnx_passes.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
    if complaints:
        with _complaints():
            onnx_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    return complaints[0] if complaints else ""


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """What the library logs instead of raising."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            if error is not None:
                texts.append(_first_line(error))

    logger, keep = logging.getLogger(_INFERENCE), Keep()
    propagates = logger.propagate
    logger.addHandler(keep)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(keep)
        logger.propagate = propagates


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__
