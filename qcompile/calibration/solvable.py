"""Which weights a solver may choose codes for, and how it hands them in: shared by ``rtn`` and ``gptq``."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.graph.edits import own_initializer
from qcompile.graph.grids import grid_of, remember_grid
from qcompile.graph.linears import Linear, as_linear, find_linears
from qcompile.graph.provenance import original_name
from qcompile.pipeline import Context
from qcompile.quant.numerics import QuantizedWeight
from qcompile.quant.schemes import WeightScheme


def solvable(ctx: Context, model: ir.Model) -> list[tuple[Linear, WeightScheme]]:
    """The linears whose codes can be chosen, in graph order; the others are left with a reason."""
    found: list[tuple[Linear, WeightScheme]] = []
    schemes: dict[int, WeightScheme] = {}
    for linear in find_linears(model.graph):
        rule = ctx.recipe.for_linear(linear)
        scheme = None if rule is None else rule.weights
        if scheme is None:
            ctx.ledger.skip(linear.name, "the recipe keeps it float", original_name(linear.node))
            continue
        reason = _obstacle(linear, scheme)
        if not reason and not linear.weight.is_initializer():
            own_initializer(model, linear.node, 1)
        if not reason and schemes.setdefault(id(linear.weight), scheme) != scheme:
            reason = "another linear has the same matrix in another format"
        if reason:
            ctx.ledger.skip(linear.name, reason, original_name(linear.node))
        else:
            found.append((linear, scheme))
    return found


def _obstacle(linear: Linear, scheme: WeightScheme) -> str:
    if linear.transposed:
        return "its matrix is an embedding's table as well, which quantise rounds"
    if scheme.granularity == "per_tensor":
        return "one scale for the whole matrix leaves nothing to choose for a column"
    if grid_of(linear.weight, scheme) is not None:
        return "its codes are chosen already"
    uses = list(linear.weight.uses())
    if any(use.idx != 1 or as_linear(use.node) is None for use in uses) or linear.weight.is_graph_output():
        return "its matrix is read by more than linears"
    return ""


def hand_in(
    ctx: Context, linear: Linear, weight: QuantizedWeight, scheme: WeightScheme, before: float, after: float
) -> None:
    """Put the values of ``weight`` into the graph, keep its codes for ``quantise``, and record the errors of the
    linear's output: ``before``, as a share of the output, with the scheme's plain rounding."""
    remember_grid(linear.weight, weight, scheme, ctx.workspace)
    ctx.ledger.record(linear.name, weights=str(scheme), error_before=before, error_after=after)
