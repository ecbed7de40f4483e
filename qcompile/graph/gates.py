"""Gates: a scale of each channel can move from one factor of SwiGLU to the other.

    silu(g) * u  =  (g' sigmoid(g' / s)) * u'   with g' = g s, u' = u / s

Both sides are columns of projections, so it folds but for the division inside the sigmoid: one multiplication by a
constant at run time. Source: I-LLM (arXiv 2405.17849), the activation-smooth pair of its FSBR.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import new_initializer
from qcompile.graph.fold import renewed, scale_columns
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear, find_linears
from qcompile.graph.workspace import Workspace
from qcompile.quant.schemes import ActivationScheme

FACTOR = ActivationScheme(bits=8, granularity="per_token")  # of both factors, as integer-only programs have it


@dataclasses.dataclass(frozen=True)
class Gate:
    """``product`` multiplies ``silu`` of what ``gate`` gives with what ``up`` gives, its input ``index``."""

    silu: ir.Node
    product: ir.Node
    index: int
    gate: Linear
    up: Linear

    @property
    def name(self) -> str:
        return f"gate:{self.gate.name}"


def find_gates(model: ir.Model) -> Iterator[Gate]:
    """The gates whose two projections give their factors directly, and to nobody else."""
    makers = {id(linear.output): linear for linear in find_linears(model.graph)}
    for silu in model.graph:
        product = match.only_consumer(silu.outputs[0], "Mul") if is_op(silu, "Silu") else None
        if product is None:
            continue
        index = 1 if product.inputs[0] is silu.outputs[0] else 0
        factors = silu.inputs[0], product.inputs[index]
        gate, up = (makers.get(id(value)) for value in factors)
        alone = all(value is not None and match.only_consumer(value) is not None for value in factors)
        if gate is not None and up is not None and alone and gate is not up and gate.columns == up.columns:
            yield Gate(silu, product, index, gate, up)


def fold_gate(model: ir.Model, found: Gate, scale: np.ndarray, workspace: Workspace) -> int:
    """Multiply the gate by ``scale`` (C,) and divide the other factor; returns the number of nodes added."""
    s = np.asarray(scale, np.float64)
    none = np.zeros_like(s)
    scale_columns(model, renewed(found.gate), 1 / s, none, workspace)
    scale_columns(model, renewed(found.up), s, none, workspace)
    silu, x = found.silu, found.silu.inputs[0]
    assert x is not None
    held = new_initializer(model, f"{found.gate.name}.smooth", (1 / s).astype(np.float32), workspace)
    plain = match.new_node("", "Mul", [x, held], {}, [silu])
    share = match.new_node("", "Sigmoid", [plain.outputs[0]], {}, [silu])
    result = match.new_node("", "Mul", [x, share.outputs[0]], {}, [silu])
    for node, suffix in ((plain, "plain"), (share, "share")):
        node.outputs[0].name, node.outputs[0].type = f"{silu.outputs[0].name}.{suffix}", x.type
        node.outputs[0].shape = x.shape
    graph = silu.graph
    assert graph is not None
    graph.insert_before(silu, [plain, share])
    match.put_instead(silu, result)
    return 2
