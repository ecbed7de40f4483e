"""A plan of what is quantised how, and the graph that follows from it: built again for every trial.

A trial is a clone of the float model (tensors are references to files, so a clone is small) with one choice
of schemes; weights are quantised once and reused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompile.calibration.ranges import Ranges, outlier_columns
from qcompile.errors import ContractError
from qcompile.graph.caches import find_caches
from qcompile.graph.edits import constant_array, naming
from qcompile.graph.functions import is_op
from qcompile.graph.grids import grid_of
from qcompile.graph.learned import describe, learned_grid
from qcompile.graph.provenance import original_name
from qcompile.graph.qdq import (
    keep_columns,
    quantize_attention,
    quantize_cache,
    quantize_linear_weight,
    quantize_per_token,
    quantize_static,
    quantize_table,
    switch,
    table_of,
)
from qcompile.graph.sites import ATTENTIONS, Linear, find_embeddings, find_experts, find_linears
from qcompile.graph.workspace import Workspace
from qcompile.quant.numerics import QuantizedWeight, quantize_weight
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Op, Recipe

SMALL_TABLE = 1 << 16  # elements; a smaller embedding is not worth codes
NOTHING = np.zeros(0, np.int64)
SWITCHES = "qcompile.switches"
Steps = Mapping[str, ActivationScheme | None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Schemes by name: weights by linear or table, activations by the value read, attention by its output, caches by
    the input that brings the past."""

    weights: Mapping[str, WeightScheme]
    activations: Mapping[str, ActivationScheme]
    attention: Mapping[str, ActivationScheme]
    caches: Mapping[str, ActivationScheme] = dataclasses.field(default_factory=dict)

    def with_activation(
        self, changes: Mapping[str, ActivationScheme | None], readers: Mapping[str, list[str]]
    ) -> Choice:
        """The choice with some activations changed; None makes the linears that read it float altogether."""
        activations, weights = dict(self.activations), dict(self.weights)
        for name, scheme in changes.items():
            if scheme is not None:
                activations[name] = scheme
                continue
            activations.pop(name, None)
            for linear in readers.get(name, []):
                weights.pop(linear, None)
        return Choice(weights, activations, self.attention, self.caches)


class Draft:
    """Builds quantised models from one float model."""

    def __init__(self, model: ir.Model, recipe: Recipe, workspace: Workspace) -> None:
        self.model, self._workspace = model, workspace
        self.ranges = Ranges({}, {})
        self.centres: dict[str, np.ndarray] = {}  # of caches of keys in few bits
        self.left: list[tuple[str, str, str]] = []  # (site, reason, node): what the recipe leaves float
        self._float_inputs: set[str] = set()  # linears whose activation stays as it is
        self.learned: dict[str, str] = {}  # by linear: the grid that its activation came with
        self._codes: dict[tuple[str, WeightScheme, bytes], QuantizedWeight] = {}
        self._solved = {linear.name: linear.weight for linear in find_linears(model.graph)}
        self.choice = self._choose(recipe)

    def inputs(self) -> list[str]:
        """The inputs of all linears whose weights are quantised and whose codes no pass has chosen yet."""
        schemes = self.choice.weights
        linears = [linear for linear in find_linears(self.model.graph) if linear.name in schemes]
        open_ones = [x for x in linears if self._grid(x.name, schemes[x.name], NOTHING) is None]
        return list(dict.fromkeys(str(linear.x.name) for linear in open_ones))

    def readers(self) -> dict[str, list[str]]:
        """For each quantised activation the linears that read it."""
        found: dict[str, list[str]] = {}
        for linear in find_linears(self.model.graph):
            if linear.x.name in self.choice.activations and linear.name not in self._float_inputs:
                found.setdefault(str(linear.x.name), []).append(linear.name)
        return found

    def names(self) -> dict[Op, list[str]]:
        """The names that a rule's scope is held against, by kind of operator."""
        found: dict[Op, list[str]] = {"linear": [], "head": [], "embedding": [], "attention": [], "cache": []}
        for linear in find_linears(self.model.graph):
            found["head" if linear.is_head else "linear"].append(linear.name)
        tables = (node.inputs[0] for node in find_embeddings(self.model.graph))
        found["embedding"] = [original_name(table) for table in tables if table is not None]
        found["attention"] = [original_name(node) for node in self.model.graph if is_op(node, *ATTENTIONS)]
        found["cache"] = [cache.name for cache in find_caches(self.model.graph)]
        return found

    def build(self, choice: Choice | None = None, alpha: float = 1.0) -> ir.Model:
        """A quantised clone of the float model."""
        clone = self.model.clone()
        self.apply(clone, choice or self.choice, alpha)
        self._workspace.let_go(self.model)  # the clone has the codes
        return clone

    def build_switched(self, alpha: float, steps: Steps) -> ir.Model:
        """A quantised clone with one more input, SWITCHES, bool (len(steps)).

        Where it is set, the activation of that place in ``steps`` has the scheme given there (None: float). Weights
        stay as they are.
        """
        clone = self.model.clone()
        flags = ir.Value(name=SWITCHES, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([len(steps)]))
        clone.graph.inputs.append(flags)
        with naming(clone):
            self._apply(clone, self.choice, alpha, steps)
        return clone

    def apply(self, model: ir.Model, choice: Choice, alpha: float) -> int:
        """Write ``choice`` into ``model``; returns the number of linears and tables quantised."""
        with naming(model):
            return self._apply(model, choice, alpha, {})

    def _apply(self, model: ir.Model, choice: Choice, alpha: float, steps: Steps) -> int:
        linears = find_linears(model.graph)
        tables = self._tables(model, choice)
        count = sum(self._weight(model, linear, choice) for linear in linears if not linear.transposed)
        self._activations(model, linears, choice, alpha, steps)
        for node in list(model.graph):
            scheme = choice.attention.get(str(node.outputs[0].name)) if is_op(node, *ATTENTIONS) else None
            if scheme is not None:
                operands = [self.ranges.affine(name, scheme, alpha) for name in _operands(node)]
                quantize_attention(model, node, operands, self._workspace)
        return count + tables + self._caches(model, choice)

    def _caches(self, model: ir.Model, choice: Choice) -> int:
        """Quantise what joins each cache; its past has been quantised by the steps before."""
        count = 0
        for cache in list(find_caches(model.graph)):
            scheme = choice.caches.get(cache.name)
            if scheme is not None:
                centre = self.centres.get(cache.name)
                quantize_cache(model, cache, scheme, centre, self._workspace)
                count += 1
        return count

    # ----------------------------------------------------------------- what the recipe says

    def _choose(self, recipe: Recipe) -> Choice:
        weights: dict[str, WeightScheme] = {}
        activations: dict[str, ActivationScheme] = {}
        for linear in find_linears(self.model.graph):
            rule = recipe.for_linear(linear)
            if rule is None or rule.weights is None:
                self.left.append((linear.name, "the recipe keeps it float", original_name(linear.node)))
                self._float_inputs.add(linear.name)
                continue
            weights[str(table_of(linear).name) if linear.transposed else linear.name] = rule.weights
            grid = learned_grid(linear.x)
            if grid is not None:
                self.learned[linear.name] = describe(grid)
            if rule.activations is None or grid is not None:
                self._float_inputs.add(linear.name)
            elif activations.setdefault(str(linear.x.name), rule.activations) != rule.activations:
                why = f"its input is read as {activations[str(linear.x.name)]}, as another linear's rule says"
                self.left.append((linear.name, why, original_name(linear.node)))
        for experts in find_experts(self.model.graph):
            rule = recipe.rule("linear", experts.name)
            why = "its matrices are experts chosen for each token, which stay float"
            if rule is None or rule.weights is None:
                why = "the recipe keeps it float"
            self.left.append((experts.name, why, original_name(experts.node)))
        for node in find_embeddings(self.model.graph):
            self._choose_table(node, recipe, weights)
        return Choice(weights, activations, self._choose_attention(recipe), self._choose_caches(recipe))

    def _choose_attention(self, recipe: Recipe) -> dict[str, ActivationScheme]:
        found = {}
        for node in self.model.graph:
            rule = recipe.rule("attention", original_name(node)) if is_op(node, *ATTENTIONS) else None
            if rule is not None and rule.activations is not None:
                found[str(node.outputs[0].name)] = rule.activations
        return found

    def _choose_caches(self, recipe: Recipe) -> dict[str, ActivationScheme]:
        found = {}
        for cache in find_caches(self.model.graph):
            rule = recipe.rule("cache", cache.name)
            if rule is None or rule.activations is None:
                continue
            if cache.width is None or cache.width % 2:
                why = "the width of a head is odd or not known"
                self.left.append((cache.name, why, original_name(cache.node)))
            else:
                found[cache.name] = rule.activations
        return found

    def _choose_table(self, node: ir.Node, recipe: Recipe, weights: dict[str, WeightScheme]) -> None:
        table = node.inputs[0]
        assert table is not None
        rule = recipe.rule("embedding", original_name(table))
        size = int(np.prod(table.shape.numpy())) if table.shape is not None else 0
        if rule is None or rule.weights is None:
            self.left.append((original_name(table), "the recipe keeps it float", original_name(node)))
        elif size < SMALL_TABLE:
            why = f"a table of {size} elements is too small to matter"
            self.left.append((original_name(table), why, original_name(node)))
        else:
            weights.setdefault(str(table.name), rule.weights)

    # ----------------------------------------------------------------- writing it

    def codes(
        self,
        name: str,
        w: np.ndarray,
        scheme: WeightScheme,
        energy: np.ndarray | None,
        zeroed: np.ndarray = NOTHING,
    ) -> QuantizedWeight:
        """The quantised weight, made once for each scheme and kept in the workspace.

        ``zeroed``: the rows of ``w`` that are zero since they are multiplied in float.
        """
        key = (name, scheme, zeroed.tobytes())
        if key not in self._codes:
            made = self._grid(name, scheme, zeroed) or quantize_weight(w, scheme, energy)
            held = self._workspace.tensor(made.codes, name).numpy()
            self._codes[key] = dataclasses.replace(made, codes=held)
        return self._codes[key]

    def _grid(self, name: str, scheme: WeightScheme, zeroed: np.ndarray) -> QuantizedWeight | None:
        """The codes that a pass has chosen for a linear's weight, with the rows ``zeroed`` at their zero points."""
        grid = grid_of(self._solved[name], scheme) if name in self._solved else None
        if grid is None or not zeroed.size:
            return grid
        codes, zero = grid.codes.copy(), grid.zero_point
        codes[zeroed] = zero if grid.group_size is None else zero[zeroed // grid.group_size]
        return dataclasses.replace(grid, codes=codes)

    def _weight(self, model: ir.Model, linear: Linear, choice: Choice) -> int:
        scheme = choice.weights.get(linear.name)
        if scheme is None:
            return 0
        w, x = np.asarray(linear.w, np.float32), str(linear.x.name)
        columns = NOTHING
        if linear.name not in self._float_inputs:
            columns = self._outliers(x, choice.activations.get(x))
            w = keep_columns(model, linear, columns, w, self._workspace)
        codes = self.codes(linear.name, w, scheme, self.ranges.energy(x), columns)
        quantize_linear_weight(model, linear, codes, self._workspace)
        return 1

    def _outliers(self, x: str, scheme: ActivationScheme | None) -> np.ndarray:
        """The channels of ``x`` that are multiplied in float."""
        if scheme is None or scheme.outlier_threshold is None:
            return NOTHING
        return outlier_columns(self.ranges.observers[x], scheme.outlier_threshold)

    def _tables(self, model: ir.Model, choice: Choice) -> int:
        names = {str(t.name) for n in find_embeddings(model.graph) if (t := n.inputs[0]) is not None}
        count = 0
        for name in sorted(names & set(choice.weights)):
            table = model.graph.initializers[name]
            array = constant_array(table)
            assert array is not None
            codes = self.codes(name, array.T, choice.weights[name], None)
            quantize_table(model, table, codes, self._workspace)
            count += 1
        return count

    def _activations(
        self, model: ir.Model, linears: list[Linear], choice: Choice, alpha: float, steps: Steps
    ) -> None:
        groups: dict[str, list[Linear]] = {}
        for linear in linears:
            if linear.name not in self._float_inputs and linear.x.name in choice.activations:
                groups.setdefault(str(linear.x.name), []).append(linear)
        places = {name: place for place, name in enumerate(steps)}
        for name, found in groups.items():
            x, readers = found[0].x, [(linear.node, 0) for linear in found]
            self._activation(model, x, readers, choice.activations[name], alpha)
            if name in steps:
                self._switch(model, x, readers, steps[name], places[name], alpha)

    def _switch(
        self,
        model: ir.Model,
        x: ir.Value,
        readers: list[tuple[ir.Node, int]],
        step: ActivationScheme | None,
        place: int,
        alpha: float,
    ) -> None:
        """Let the readers of quantised ``x`` take it as ``step`` in a run whose switch is set."""
        now, other = readers[0][0].inputs[0], x
        if step is not None:
            self._activation(model, x, readers, step, alpha)
            other = readers[0][0].inputs[0]  # type: ignore[assignment]
            for value in (other, other.producer().inputs[0]):  # type: ignore[union-attr]
                if value is not None and value is not x:  # ``now`` may be made by nodes of the same names
                    value.name = f"{value.name}.step"
        flags = next(value for value in model.graph.inputs if value.name == SWITCHES)
        assert now is not None
        switch(model, readers, (now, other), (flags, place), self._workspace)

    def _activation(
        self, model: ir.Model, x: ir.Value, readers: list[tuple[ir.Node, int]], scheme: ActivationScheme, alpha: float
    ) -> None:
        name = str(x.name)
        if not scheme.dynamic:
            affine = self.ranges.affine(name, scheme, alpha)
            axis = None if affine.scale.size == 1 else len(x.shape or ()) - 1
            if axis is not None and axis < 0:
                raise ContractError(f"rank of '{name}' is unknown")
            quantize_static(model, x, readers, affine, self._workspace, axis)
            return
        outliers, ordinary = self._outliers(name, scheme), None
        if outliers.size:
            ordinary = ~np.isin(np.arange(self.ranges.observers[name].absmax.size), outliers)
        quantize_per_token(model, x, readers, scheme, self._workspace, ordinary)


def _operands(node: ir.Node) -> list[str]:
    return [str(v.name) for v in node.inputs[:3] if v is not None]
