"""Write calls of the model's functions out, each constant of a body once.

onnx_ir's own pass looks for a free name by counting up from one at every node, and repeats the tables of a body at
every call: with a thousand calls both are what a compilation spends its time on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

from qcompile.graph.edits import Constants, naming
from qcompile.graph.provenance import inherit
from qcompile.graph.workspace import Workspace


def inline(model: ir.Model, workspace: Workspace, keep: Collection[str] = ()) -> int:
    """Replace the calls in the main graph by the bodies, but those of functions named in ``keep``; returns how many."""
    with naming(model):
        return _Inliner(model, Constants(model, workspace), keep).run()


class _Inliner:
    def __init__(self, model: ir.Model, constants: Constants, keep: Collection[str]) -> None:
        self._model, self._constants = model, constants
        self._functions = {key: f for key, f in model.functions.items() if f.name not in keep}

    def run(self) -> int:
        count = 0
        for node in list(self._model.graph):
            if node.op_identifier() in self._functions:
                new, results = self._body(
                    node, list(node.inputs), dict(node.attributes), str(node.outputs[0].name), node
                )
                ir.convenience.replace_nodes_and_values(
                    self._model.graph, node, [node], list(new), list(node.outputs), results
                )
                count += 1
        return count

    def _body(
        self, call: ir.Node, inputs: list[ir.Value | None], attributes: dict[str, ir.Attr], prefix: str, like: ir.Node
    ) -> tuple[list[ir.Node], list[ir.Value]]:
        """The nodes that stand for ``call``, calls in its body written out as well, and its results."""
        function = self._functions[call.op_identifier()]
        given = attributes | {a.name: a for a in function.attributes.values() if a.name not in attributes and a.value}
        known: dict[ir.Value, ir.Value | None] = dict.fromkeys(function.inputs)
        known.update(zip(function.inputs, inputs, strict=False))
        made: list[ir.Node] = []
        results: list[ir.Value]
        for number, node in enumerate(function):
            own = dict(_resolved(node, given))
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                known[node.outputs[0]] = self._constants.get(
                    _array(next(iter(own.values()))), f"{function.name}.{node.outputs[0].name}"
                )
                continue
            values = [None if value is None else known[value] for value in node.inputs]
            name = f"{prefix}.{node.outputs[0].name or number}"
            if node.op_identifier() in self._functions:
                new, results = self._body(node, values, own, name, like)
                made += new
            else:
                copy = ir.Node(
                    node.domain, node.op_type, values, list(own.values()), overload=node.overload,
                    num_outputs=len(node.outputs), name=name,
                )  # fmt: skip
                inherit(copy, like)
                for place, result in enumerate(copy.outputs):
                    result.name = name if place == 0 else f"{name}.{place}"
                made.append(copy)
                results = list(copy.outputs)
            known.update(zip(node.outputs, results, strict=True))
        ends = [known[output] for output in function.outputs]
        return made, [value for value in ends if value is not None]


def _resolved(node: ir.Node, given: dict[str, ir.Attr]) -> Iterator[tuple[str, ir.Attr]]:
    """The attributes of ``node`` with those of the call in place of references; one that the call lacks is left out."""
    for name, attribute in node.attributes.items():
        if not attribute.is_ref():
            yield name, attribute
        elif attribute.ref_attr_name in given:
            value = given[attribute.ref_attr_name]
            yield name, ir.Attr(name, value.type, value.value)


def _array(attribute: ir.Attr) -> np.ndarray:
    if attribute.type == ir.AttributeType.TENSOR:
        return np.asarray(attribute.as_tensor().numpy())
    dtype = np.float32 if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS) else np.int64
    return np.asarray(attribute.value, dtype)
