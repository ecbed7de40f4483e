"""Safe edits of constants: own before you change, name without clashes, read without copying."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.errors import ContractError
from qcompile.graph.provenance import ORIGIN
from qcompile.graph.workspace import Workspace

_LAYOUT = ("Transpose", "Identity")
_NAMES = "qcompile.names"  # while ``naming``: all names of values
_WITH_SUBGRAPHS = ("If", "Loop", "Scan", "SequenceMap")


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant, mapped and not to be written to; None when ``value`` is not constant.

    Looks through Identity and Constant nodes; a graph input with a default value is no constant.
    """
    tensor = _constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def own_initializer(model: ir.Model, node: ir.Node, input_index: int) -> ir.Value:
    """The initializer at ``node.inputs[input_index]``, made this input's alone.

    Exporters share equal tensors (norm gains of one, zero biases, tied embeddings); writing to a shared one
    would change other layers. Raises ContractError when the input is not a constant.
    """
    value = node.inputs[input_index]
    tensor = _constant_tensor(value)
    if value is None or tensor is None:
        raise ContractError(f"input {input_index} is no constant", where=str(node.name))
    if value.is_initializer() and len(list(value.uses())) == 1 and not value.is_graph_output():
        return value
    owned = _register(model, f"{value.name}_own", _renamed(tensor))
    owned.metadata_props.update(value.metadata_props)
    owned.metadata_props.setdefault(ORIGIN, value.name or "")
    node.replace_input_with(input_index, owned)
    return owned


def replace_constant(value: ir.Value, array: np.ndarray, workspace: Workspace) -> None:
    """Give an initializer a new content; every user of ``value`` sees it (``own_initializer`` first)."""
    if not value.is_initializer():
        raise ContractError(f"'{value.name}' is no initializer")
    _assign(value, workspace.tensor(array, value.name or ""))


def new_initializer(model: ir.Model, name_hint: str, array: np.ndarray, workspace: Workspace) -> ir.Value:
    """A registered initializer named ``name_hint``, or ``name_hint_1``, ``_2`` ... when that is taken."""
    return _register(model, name_hint, workspace.tensor(array, name_hint))


class Constants:
    """New initializers of a model, each content once."""

    def __init__(self, model: ir.Model, workspace: Workspace) -> None:
        self._model, self._workspace = model, workspace
        self._held: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def get(self, array: np.ndarray, hint: str) -> ir.Value:
        """The initializer with the content of ``array``; a new one is named by ``hint``."""
        digest = hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8).data).digest()
        key = (str(array.dtype), array.shape, digest)
        if key not in self._held:
            self._held[key] = new_initializer(self._model, hint, array, self._workspace)
        return self._held[key]


@contextlib.contextmanager
def naming(model: ir.Model) -> Iterator[None]:
    """Inside, names are looked up in one set instead of in the whole graph each time: for many edits in a row.

    Nodes that are added inside must give their outputs names that no initializer added after them asks for.
    """
    model.meta[_NAMES] = _value_names(model)
    try:
        yield
    finally:
        del model.meta[_NAMES]


def unique_name(model: ir.Model, hint: str) -> str:
    """``hint`` when no value of the model has that name, else the first free ``hint_N``."""
    taken = model.meta.get(_NAMES) or _value_names(model)
    if hint not in taken:
        return hint
    number = 1
    while f"{hint}_{number}" in taken:
        number += 1
    return f"{hint}_{number}"


def is_tied(value: ir.Value) -> bool:
    """Whether one constant is an embedding table (Gather) and a linear weight (MatMul, Gemm) at once."""
    operators = _consumer_operators(value)
    return "Gather" in operators and bool(operators & {"MatMul", "Gemm"})


def _consumer_operators(value: ir.Value) -> set[str]:
    found: set[str] = set()
    for node, _ in value.uses():
        if node.op_type in _LAYOUT:
            found |= _consumer_operators(node.outputs[0])
        else:
            found.add(node.op_type)
    return found


def _constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    while value is not None:
        if value.is_initializer():
            return None if value.is_graph_input() else value.const_value
        producer = value.producer()
        if producer is None or producer.domain != "":
            return None
        if producer.op_type == "Constant":
            return ir.convenience.get_const_tensor(value)
        if producer.op_type != "Identity":
            return None
        value = producer.inputs[0]
    return None


def _renamed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A second handle on the same content: saving writes a value's name into its tensor."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()), name=tensor.name, base_dir=tensor.base_dir,
        )  # fmt: skip
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _register(model: ir.Model, hint: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=unique_name(model, hint))
    _assign(value, tensor)
    model.graph.register_initializer(value)
    if _NAMES in model.meta:
        model.meta[_NAMES].add(value.name)
    return value


def _assign(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    tensor.name = value.name
    value.const_value = tensor
    value.dtype = tensor.dtype
    value.shape = ir.Shape(tensor.shape.numpy())


def _value_names(model: ir.Model) -> set[str | None]:
    names: set[str | None] = set()
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        names.update(value.name for value in graph.inputs)
        names.update(graph.initializers)
        for node in graph:
            names.update(output.name for output in node.outputs)
            if node.op_type in _WITH_SUBGRAPHS:
                pending.extend(_subgraphs(node))
    return names


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    found = (a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH)
    return [attribute.as_graph() for attribute in found]
