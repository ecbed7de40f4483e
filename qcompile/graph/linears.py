"""Linear layers of the canonical graph: MatMul with a constant matrix, or with one of a table of experts."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import is_op
from qcompile.graph.provenance import layer_name

# Operators of one input that keep the last axis as it is: a per-channel edit commutes with them.
VIEWS = ("Identity", "Unsqueeze", "Squeeze", "Dropout")


@dataclasses.dataclass(frozen=True)
class Linear:
    """y = x W + b with x (..., K), W (K, N) constant and b (N) or absent.

    ``transposed``: W is ``Transpose`` of a table (N, K) that is an embedding as well (a tied head).
    ``chosen``: W is (E, K, N), and a Gather picks a matrix for each token (a mixture of experts).
    """

    node: ir.Node
    name: str
    add: ir.Node | None
    transposed: bool = False
    chosen: bool = False

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def holder(self) -> tuple[ir.Node, int]:
        """The node and input where the constant is read."""
        if not (self.transposed or self.chosen):
            return self.node, 1
        producer = match.producer(self.node.inputs[1])
        assert producer is not None
        return producer, 0

    @property
    def weight(self) -> ir.Value:
        node, index = self.holder
        value = node.inputs[index]
        assert value is not None
        return value

    @property
    def w(self) -> np.ndarray:
        """W as (K, N), mapped; (E, K, N) when it is chosen from a table."""
        array = constant_array(self.weight)
        assert array is not None
        return array.T if self.transposed else array

    @property
    def rows(self) -> int:
        """K."""
        return int(self.w.shape[-2])

    @property
    def columns(self) -> int:
        """N."""
        return int(self.w.shape[-1])

    @property
    def bias(self) -> np.ndarray | None:
        return constant_array(self.add.inputs[1]) if self.add is not None else None

    @property
    def output(self) -> ir.Value:
        return (self.add or self.node).outputs[0]

    @property
    def is_head(self) -> bool:
        """Whether the result is the model's output: the language-model head or a classifier."""
        return self.transposed or _reaches_output(self.output)


def _reaches_output(value: ir.Value) -> bool:
    while not value.is_graph_output():
        node = match.only_consumer(value, "Cast", "Tanh", "Mul", "Div", *VIEWS)
        if node is None:
            return False
        value = node.outputs[0]
    return True


def find_linears(graph: ir.Graph) -> list[Linear]:
    """Every MatMul with a constant matrix on its right, in graph order.

    Names are unique: where one module holds several (torch's MultiheadAttention), the second is ``name#2``.
    """
    found: list[Linear] = []
    seen: dict[str, int] = {}
    for node in graph:
        linear = as_linear(node)
        if linear is None:
            continue
        seen[linear.name] = count = seen.get(linear.name, 0) + 1
        found.append(linear if count == 1 else dataclasses.replace(linear, name=f"{linear.name}#{count}"))
    return found


def find_experts(graph: ir.Graph) -> list[Linear]:
    """Every MatMul whose matrix a Gather picks from a constant table (E, K, N)."""
    return [experts for node in graph if (experts := as_experts(node)) is not None]


def as_linear(node: ir.Node) -> Linear | None:
    if not is_op(node, "MatMul") or node.inputs[0] is None or constant_array(node.inputs[0]) is not None:
        return None
    array, transposed = constant_array(node.inputs[1]), False
    if array is None:
        transpose = match.producer(node.inputs[1], "Transpose")
        array = constant_array(transpose.inputs[0]) if transpose is not None else None
        transposed = True
    if array is None or array.ndim != 2 or array.dtype != np.float32:
        return None
    return Linear(node, layer_name(node), _bias_add(node, array.shape[0 if transposed else 1]), transposed)


def as_experts(node: ir.Node) -> Linear | None:
    if not is_op(node, "MatMul") or node.inputs[0] is None:
        return None
    gather = match.producer(node.inputs[1], "Gather")
    if (
        gather is None
        or match.int_attribute(gather, "axis", 0)
        or match.only_consumer(gather.outputs[0]) is not node
    ):
        return None
    table = constant_array(gather.inputs[0])
    return (
        Linear(node, layer_name(node), None, chosen=True) if table is not None and table.ndim == 3 else None
    )


def _bias_add(product: ir.Node, width: int) -> ir.Node | None:
    add = match.only_consumer(product.outputs[0], "Add")
    if add is None or add.inputs[0] is not product.outputs[0]:
        return None
    bias = constant_array(add.inputs[1])
    return add if bias is not None and bias.shape == (width,) else None


def find_embeddings(graph: ir.Graph) -> list[ir.Node]:
    """Gathers of whole rows from a constant table (V, C)."""
    found = []
    for node in graph:
        table = constant_array(node.inputs[0]) if is_op(node, "Gather") else None
        if table is None or match.int_attribute(node, "axis", 0):
            continue
        if table.ndim == 2 and table.dtype == np.float32 and table.shape[0] > 1:
            found.append(node)
    return found
