"""A graph of the canonical IR as a ``torch.fx.GraphModule`` that can be differentiated.

Every ONNX node becomes one call of the function that ``ops.OPS`` names for it. Constants become parameters and
buffers under the names that they had in the user's model. Shapes are computed when the module runs, so one
module serves every batch and length.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.block import layout
from qcompile.block.ops import OPS, Op
from qcompile.errors import ContractError, UserError
from qcompile.graph.edits import constant_array
from qcompile.graph.provenance import is_anonymous, layer_name, original_name

SHAPE_SIZE = 64  # an integer constant of at most so many elements belongs to the arithmetic of shapes
_TYPES = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.DOUBLE: torch.float64, ir.DataType.FLOAT16: torch.float16,
    ir.DataType.INT64: torch.int64, ir.DataType.INT32: torch.int32, ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8, ir.DataType.UINT16: torch.uint16,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT4: torch.int8, ir.DataType.UINT4: torch.uint8,
}  # fmt: skip
_PACKED = {ir.DataType.INT4: np.int8, ir.DataType.UINT4: np.uint8}  # torch has no such types
_TYPE_ATTRIBUTES = ("to", "dtype")
_HINT = "leave this block out of the passes that learn; the rest of the model still compiles"


@dataclasses.dataclass(frozen=True)
class TorchGraph:
    """``module`` maps ``inputs`` in order to a tuple of ``outputs``, tensors named as in the IR.

    ``parameters``: the name of each constant of the IR -> the qualified name of its parameter or buffer. Parameters
    are frozen: what learns replaces them through ``run``, or asks for their gradient itself.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, str]
    nodes: Mapping[int, fx.Node] = dataclasses.field(repr=False)

    def run(self, feeds: Mapping[str, Tensor], instead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The outputs for ``feeds``; ``instead`` gives tensors to use in place of constants, by their names in the IR.

        Gradients reach the tensors of both.
        """
        arguments = tuple(feeds[name] for name in self.inputs)
        changed = {self.parameters[name]: tensor for name, tensor in (instead or {}).items()}
        results = torch.func.functional_call(self.module, changed, arguments) if changed else self.module(*arguments)
        return dict(zip(self.outputs, results, strict=True))

    def constant(self, name: str) -> Tensor:
        """The parameter or buffer that the constant ``name`` of the IR became."""
        path = self.parameters[name]
        holder, _, field = path.rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(holder), field)
        return found

    def read_through(self, readers: Sequence[tuple[ir.Node, int]], change: torch.nn.Module, name: str) -> None:
        """Let ``readers`` (node, index of the input), which read one value, read ``change`` of it."""
        users = [self.nodes[id(node)] for node, _ in readers]
        value = users[0].args[readers[0][1]]
        assert isinstance(value, fx.Node)
        target = f"changes.{_part(name)}"
        self.module.add_submodule(target, change)
        first = min(users, key=list(self.module.graph.nodes).index)
        with self.module.graph.inserting_before(first):
            changed = self.module.graph.call_module(target, (value,))
        for user, (_, index) in zip(users, readers, strict=True):
            assert user.args[index] is value
            user.update_arg(index, changed)
        self.module.recompile()


def to_torch(model: ir.Model, name: str = "", dtype: torch.dtype = torch.float32) -> TorchGraph:
    """Translate ``model``; ``dtype`` is what float32 becomes (float64 checks gradients).

    Raises UserError for an operator that has no differentiable translation; it names the node, the operator and
    the block, ``name``.
    """
    return _Translation(model, name, dtype).finish()


class _Translation:
    """One pass over the nodes; ``_values`` holds what each value of the IR became."""

    def __init__(self, model: ir.Model, name: str, dtype: torch.dtype) -> None:
        self._model, self._name, self._dtype = model, name, dtype
        self._graph = fx.Graph()
        self._values: dict[int, fx.Node] = {}
        self._host: set[fx.Node] = set()  # values on the CPU, wherever the module is
        self._moved: dict[fx.Node, fx.Node] = {}
        self._tensors: dict[str, Tensor] = {}
        self._parameters: dict[str, str] = {}
        self._nodes: dict[int, fx.Node] = {}

    def finish(self) -> TorchGraph:
        graph = self._model.graph
        for value in graph.inputs:
            self._values[id(value)] = self._graph.placeholder(_part(str(value.name)))
        for node in graph:
            if node.op_type != "Constant":
                self._translate(node)
        self._graph.output(tuple(self._operand(value) for value in graph.outputs))
        self._graph.lint()
        module = fx.GraphModule(self._tensors, self._graph, _part(self._name or "block"))
        inputs, outputs = (tuple(str(v.name) for v in values) for values in (graph.inputs, graph.outputs))
        return TorchGraph(module.eval(), inputs, outputs, self._parameters, self._nodes)

    # ------------------------------------------------------------------ nodes

    def _translate(self, node: ir.Node) -> None:
        op = OPS.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
        if op is None:
            raise self._refused(node, "it has no differentiable translation")
        if reason := op.refuse(node):
            raise self._refused(node, f"{reason} has no differentiable translation")
        inputs = [self._integers(v) if i in op.integers else self._operand(v) for i, v in enumerate(node.inputs)]
        data = [x for i, x in enumerate(inputs) if isinstance(x, fx.Node) and i not in op.integers]
        device = next((x for x in data if x not in self._host), None)
        if device is not None and not op.on_host:
            inputs = [x if i in op.integers else self._beside(x, device) for i, x in enumerate(inputs)]
        made = self._graph.create_node(
            "call_function", op.call, tuple(inputs), self._attributes(node, op), _part(original_name(node))
        )
        self._nodes[id(node)] = made
        self._take_outputs(node, made, on_host=op.on_host or device is None)

    def _take_outputs(self, node: ir.Node, made: fx.Node, on_host: bool) -> None:
        several = len(node.outputs) > 1 and node.op_type in ("Split", "TopK")
        if not several and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            raise self._refused(node, "its second output has no differentiable translation")
        for index, value in enumerate(node.outputs if several else node.outputs[:1]):
            result = self._graph.call_function(_item, (made, index)) if several else made
            self._values[id(value)] = result
            if on_host:
                self._host.add(result)

    def _attributes(self, node: ir.Node, op: Op) -> dict[str, Any]:
        try:
            known = inspect.signature(op.call).parameters
        except ValueError:  # torch's own functions
            known = {}  # type: ignore[assignment]
        for name in node.attributes:
            if name not in known or known[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                raise self._refused(node, f"its attribute '{name}' has no differentiable translation")
        return {name: self._attribute(node, attribute) for name, attribute in node.attributes.items()}

    def _attribute(self, node: ir.Node, attribute: ir.Attr) -> Any:
        if attribute.name in _TYPE_ATTRIBUTES:
            return self._known_type(node, ir.DataType(attribute.as_int()))
        if attribute.type == ir.AttributeType.TENSOR:
            held = attribute.as_tensor()
            return held.numpy().reshape(-1)[0].item(), self._known_type(node, held.dtype)
        return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value

    def _known_type(self, node: ir.Node, kind: ir.DataType) -> torch.dtype:
        dtype = self._type(kind)
        if dtype is None:
            raise self._refused(node, f"values of type {kind} have no differentiable translation")
        return dtype

    def _type(self, kind: ir.DataType) -> torch.dtype | None:
        return self._dtype if kind == ir.DataType.FLOAT else _TYPES.get(kind)

    def _refused(self, node: ir.Node, reason: str) -> UserError:
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        return UserError(f"operator {op} cannot be learned through: {reason}", where=self._place(node), hint=_HINT)

    def _place(self, item: ir.Node | ir.Value) -> str:
        return f"{self._name}: {original_name(item)}" if self._name else original_name(item)

    # ------------------------------------------------------------------ values

    def _operand(self, value: ir.Value | None) -> fx.Node | None:
        if value is None:
            return None
        if id(value) not in self._values:
            self._values[id(value)] = self._constant(value)
        return self._values[id(value)]

    def _integers(self, value: ir.Value | None) -> fx.Node | tuple[int, ...] | None:
        array = constant_array(value)
        return self._operand(value) if array is None else tuple(int(n) for n in array.reshape(-1))

    def _beside(self, x: Any, device: fx.Node) -> Any:
        """``x``, brought to where ``device`` is when it comes from the arithmetic of shapes."""
        if x not in self._host:
            return x
        if x not in self._moved:
            self._moved[x] = self._graph.call_function(layout.on_device_of, (x, device))
        return self._moved[x]

    def _constant(self, value: ir.Value) -> fx.Node:
        array = constant_array(value)
        if array is None:
            raise ContractError(f"'{value.name}' is neither computed in this graph nor given to it", where=self._name)
        kind = ir.DataType.from_numpy(array.dtype)
        dtype = self._type(kind)
        if dtype is None:
            message = f"a constant of type {kind} cannot be learned through"
            raise UserError(message, where=self._place(value), hint=_HINT)
        if array.ndim == 0 or (array.size <= SHAPE_SIZE and not dtype.is_floating_point):
            made = self._graph.call_function(layout.constant, (array.tolist(), dtype))
            self._host.add(made)
            return made
        path = self._free_path(_weight_name(value))
        tensor = torch.tensor(array.astype(_PACKED.get(kind, array.dtype)), dtype=dtype)
        self._tensors[path] = torch.nn.Parameter(tensor, requires_grad=False) if dtype.is_floating_point else tensor
        self._parameters[str(value.name)] = path
        return self._graph.get_attr(path)

    def _free_path(self, name: str) -> str:
        """``name`` as a path of modules that no other constant takes or passes through."""
        path = plain = ".".join(_part(part) for part in name.split(".") if part) or "constant"
        number = 0
        while any(f"{path}.".startswith(f"{p}.") or f"{p}.".startswith(f"{path}.") for p in self._tensors):
            number += 1
            path = f"{plain.replace('.', '_')}_{number}"
        return path


def _item(results: Sequence[Tensor], index: int) -> Tensor:
    return results[index]


def _weight_name(value: ir.Value) -> str:
    """The name of a constant in the user's model; that of the layer that reads it where the exporter lost it."""
    reader = next(iter(value.uses()), None)
    if reader is None or not is_anonymous(value):
        return original_name(value)
    return f"{layer_name(reader.node)}.{'bias' if reader.idx == 2 or reader.node.op_type == 'Add' else 'weight'}"


def _part(name: str) -> str:
    """One part of a qualified name: no dots or signs, and nothing that a module already has."""
    plain = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "_"
    return f"{plain}_" if hasattr(fx.GraphModule, plain) else plain
