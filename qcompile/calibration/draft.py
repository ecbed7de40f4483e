"""A plan of what is quantised how, and the graph that follows from it: built again for every trial.

A trial is a clone of the float model (tensors are references to files, so a clone is small) with one choice of
schemes; weights are quantised once and reused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.calibration.ranges import Ranges, outlier_columns
from qcompile.errors import ContractError
from qcompile.graph.edits import constant_array
from qcompile.graph.provenance import original_name
from qcompile.graph.qdq import (
    keep_columns,
    quantize_attention,
    quantize_linear_weight,
    quantize_per_token,
    quantize_static,
    quantize_table,
    table_of,
)
from qcompile.graph.sites import ATTENTIONS, Linear, find_embeddings, find_linears
from qcompile.graph.functions import is_op
from qcompile.graph.workspace import Workspace
from qcompile.quant.numerics import QuantizedWeight, quantize_weight
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Recipe

SMALL_TABLE = 1 << 16  # elements; a smaller embedding is not worth codes


@dataclasses.dataclass(frozen=True)
class Choice:
    """Schemes by name: weights by linear or table, activations by the value that is read, attention by node."""

    weights: Mapping[str, WeightScheme]
    activations: Mapping[str, ActivationScheme]
    attention: Mapping[str, ActivationScheme]

    def with_activation(self, changes: Mapping[str, ActivationScheme | None], readers: Mapping[str, list[str]]) -> Choice:
        """The choice with some activations changed; None makes the linears that read it float altogether."""
        activations, weights = dict(self.activations), dict(self.weights)
        for name, scheme in changes.items():
            if scheme is not None:
                activations[name] = scheme
                continue
            activations.pop(name, None)
            for linear in readers.get(name, []):
                weights.pop(linear, None)
        return Choice(weights, activations, self.attention)


class Draft:
    """Builds quantised models from one float model."""

    def __init__(self, model: ir.Model, recipe: Recipe, workspace: Workspace) -> None:
        self.model, self._workspace = model, workspace
        self.ranges = Ranges({}, {})
        self.left: list[tuple[str, str, str]] = []  # (site, reason, node): what the recipe leaves float
        self._codes: dict[tuple[str, WeightScheme], QuantizedWeight] = {}
        self.choice = self._choose(recipe)

    def readers(self) -> dict[str, list[str]]:
        """For each quantised activation the linears that read it."""
        found: dict[str, list[str]] = {}
        for linear in find_linears(self.model.graph):
            if linear.x.name in self.choice.activations:
                found.setdefault(str(linear.x.name), []).append(linear.name)
        return found

    def build(self, choice: Choice | None = None, alpha: float = 1.0) -> ir.Model:
        """A quantised clone of the float model."""
        clone = self.model.clone()
        self.apply(clone, choice or self.choice, alpha)
        return clone

    def apply(self, model: ir.Model, choice: Choice, alpha: float) -> int:
        """Write ``choice`` into ``model``; returns the number of linears and tables quantised."""
        linears = find_linears(model.graph)
        tables = self._tables(model, choice)
        count = sum(self._weight(model, linear, choice) for linear in linears if not linear.transposed)
        self._activations(model, linears, choice, alpha)
        for node in list(model.graph):
            scheme = choice.attention.get(str(node.outputs[0].name)) if is_op(node, *ATTENTIONS) else None
            if scheme is not None:
                quantize_attention(model, node, [self.ranges.affine(n, scheme, alpha) for n in _operands(node)], self._workspace)
        return count + tables

    # ----------------------------------------------------------------- what the recipe says

    def _choose(self, recipe: Recipe) -> Choice:
        weights: dict[str, WeightScheme] = {}
        activations: dict[str, ActivationScheme] = {}
        for linear in find_linears(self.model.graph):
            rule = recipe.rule("head" if linear.is_head else "linear", linear.name)
            if rule is None or rule.weights is None:
                self.left.append((linear.name, "the recipe keeps it float", original_name(linear.node)))
                continue
            weights[str(table_of(linear).name) if linear.transposed else linear.name] = rule.weights
            if rule.activations is not None:
                activations.setdefault(str(linear.x.name), rule.activations)
        for node in find_embeddings(self.model.graph):
            self._choose_table(node, recipe, weights)
        attention = {
            str(node.outputs[0].name): rule.activations
            for node in self.model.graph
            if is_op(node, *ATTENTIONS) and (rule := recipe.rule("attention", original_name(node))) is not None and rule.activations
        }
        return Choice(weights, activations, attention)

    def _choose_table(self, node: ir.Node, recipe: Recipe, weights: dict[str, WeightScheme]) -> None:
        table = node.inputs[0]
        assert table is not None
        rule = recipe.rule("embedding", original_name(table))
        size = int(np.prod(table.shape.numpy())) if table.shape is not None else 0
        if rule is None or rule.weights is None:
            self.left.append((original_name(table), "the recipe keeps it float", original_name(node)))
        elif size < SMALL_TABLE:
            self.left.append((original_name(table), f"a table of {size} elements is too small to matter", original_name(node)))
        else:
            weights.setdefault(str(table.name), rule.weights)

    # ----------------------------------------------------------------- writing it

    def codes(self, name: str, w: np.ndarray, scheme: WeightScheme, energy: np.ndarray | None) -> QuantizedWeight:
        """The quantised weight, made once for each scheme and kept in the workspace."""
        key = (name, scheme)
        if key not in self._codes:
            made = quantize_weight(w, scheme, energy)
            held = self._workspace.tensor(made.codes, name).numpy()
            self._codes[key] = dataclasses.replace(made, codes=held)
        return self._codes[key]

    def _weight(self, model: ir.Model, linear: Linear, choice: Choice) -> int:
        scheme = choice.weights.get(linear.name)
        if scheme is None:
            return 0
        w, x = np.asarray(linear.w, np.float32), str(linear.x.name)
        activation = choice.activations.get(x)
        if activation is not None and activation.outlier_threshold is not None:
            columns = outlier_columns(self.ranges.observers[x], activation.outlier_threshold)
            w = keep_columns(model, linear, columns, w, self._workspace)
        quantize_linear_weight(model, linear, self.codes(linear.name, w, scheme, self.ranges.energy(x)), self._workspace)
        return 1

    def _tables(self, model: ir.Model, choice: Choice) -> int:
        names = {str(t.name) for n in find_embeddings(model.graph) if (t := n.inputs[0]) is not None}
        count = 0
        for name in sorted(names & set(choice.weights)):
            table = model.graph.initializers[name]
            array = constant_array(table)
            assert array is not None
            quantize_table(model, table, self.codes(name, array.T, choice.weights[name], None), self._workspace)
            count += 1
        return count

    def _activations(self, model: ir.Model, linears: list[Linear], choice: Choice, alpha: float) -> None:
        groups: dict[str, list[Linear]] = {}
        for linear in linears:
            groups.setdefault(str(linear.x.name), []).append(linear)
        for name, found in groups.items():
            scheme = choice.activations.get(name)
            if scheme is None:
                continue
            readers = [(linear.node, 0) for linear in found]
            if scheme.dynamic:
                quantize_per_token(model, found[0].x, readers, scheme)
                continue
            affine = self.ranges.affine(name, scheme, alpha)
            axis = None if affine.scale.size == 1 else len(found[0].x.shape or ()) - 1
            if axis is not None and axis < 0:
                raise ContractError(f"rank of '{name}' is unknown")
            quantize_static(model, found[0].x, readers, affine, self._workspace, axis)


def _operands(node: ir.Node) -> list[str]:
    return [str(v.name) for v in node.inputs[:3] if v is not None]
