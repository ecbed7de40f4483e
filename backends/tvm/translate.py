"""The quantised IR as a Relax module: a walk over its nodes, in order.

rewrite:  nodes -> expressions; what is read twice, a view, a product or a row of sums -> one kernel each
needs:    the canonical or quantised form, functions of the project's own domain as calls or written out
ensures:  ONNX's arithmetic, integers exactly; dynamic dims stay dynamic; constants are parameters
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx

from qcompile.backends.base import Kernel
from qcompile.backends.tvm.notes import Activation, Rows, Weight
from qcompile.backends.tvm.operation import DTYPES, Operation, attributes_of, constant_of
from qcompile.backends.tvm.operators import CONVERTERS, ELEMENTWISE, OWN
from qcompile.backends.tvm.operators.rows import in_one_kernel
from qcompile.backends.tvm.scopes import Program, Scope
from qcompile.backends.tvm.values import Dim, Known, Tensor, Value
from qcompile.errors import UserError
from qcompile.graph.functions import DOMAIN
from qcompile.graph.provenance import layer_name
from qcompile.progress import track

STANDARD = ("", "ai.onnx")
_VIEWS = ("Constant", "Identity", "Shape", "Split", "Concat", "Gather", "Unsqueeze", "Squeeze")
_INLINE = frozenset((*_VIEWS, *ELEMENTWISE))  # what a function written out among the operators may hold


def translate(model: ir.Model, *, tiles: bool = True) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """``main`` of the program, and its parameters in the order in which they follow the inputs.

    ``main`` takes the inputs of the graph, then the parameters, and gives its outputs, as a tuple where there are
    several. ``tiles``: products are laid out for a CPU; without, they are plain sums for a GPU's schedules.
    Raises UserError for an operator that has no translation, before anything is built.
    """
    found = translated(model, tiles=tiles)
    return found.module, found.parameters


@dataclasses.dataclass(frozen=True)
class Translation:
    """A module, its parameters by name in their order, and how each product of the model runs in it."""

    module: tvm.IRModule
    parameters: dict[str, np.ndarray]
    products: list[Kernel]


def translated(model: ir.Model, *, tiles: bool = True, target: Any = None, accuracy_level: int = 1) -> Translation:
    """As ``translate``, and what it made of each product.

    ``target``: linear layers take its low-bit kernels, None for loops; ``accuracy_level``: of weight-only ones
    """
    return _Walker(model, Program(tiles, target, accuracy_level)).run()


def check(model: ir.Model) -> None:
    """Raise UserError for the first operator of ``model`` that has no translation."""
    _Walker(model, Program()).refuse_unknown()


class _Walker:
    def __init__(self, model: ir.Model, program: Program) -> None:
        self._model = model
        self._values: dict[ir.Value, Value | None] = {}
        self._program = program
        self._functions = {function.name: function for function in model.functions.values()}
        self._inline: dict[str, bool] = {}

    def run(self) -> Translation:
        graph, program = self._model.graph, self._program
        self.refuse_unknown()
        inputs = [self._input(value) for value in graph.inputs]
        for value in graph.initializers.values():
            self._values[value] = _initializer(value)
        nodes = list(graph)
        with program.builder.function("main"):
            with program.builder.dataflow():
                for node in track(nodes, "translating"):
                    self._node(program, node)
                ends = [self._output(program, value) for value in graph.outputs]
            result = ends[0] if len(ends) == 1 else relax.Tuple(ends)
            used = program.used_parameters()
            held = [program.leaves[name].leaf for name in used]
            program.builder.emit_func_output(result, params=[*inputs, *held])
        module = program.builder.finalize()
        module.update_func(
            module.get_global_var("main"), module["main"].with_attr("num_input", len(inputs))
        )
        return Translation(module, {name: program.parameters[name] for name in used}, program.products)

    # ----------------------------------------------------------------------- ends

    def _input(self, value: ir.Value) -> relax.Var:
        dtype = DTYPES.get(value.dtype) if value.dtype is not None else None
        if dtype is None or value.shape is None:
            what = f"TVM: input '{value.name}' has type {value.dtype} and shape {value.shape}"
            raise UserError(what, hint="declare its type and rank in the graph, or compile with --target cpu")
        shape = tuple(self._dim(side, f"{value.name}_{n}") for n, side in enumerate(value.shape))
        variable = relax.Var(re.sub(r"\W", "_", str(value.name)), relax.TensorType(list(shape), dtype))
        self._values[value] = Tensor(shape, dtype, leaf=variable)
        return variable

    def _dim(self, side: Any, place: str) -> Dim:
        if isinstance(side, int):
            return side
        name = re.sub(r"\W", "_", str(getattr(side, "value", None) or place))
        return self._program.dims.setdefault(name, tirx.Var(name, "int64"))

    def _output(self, program: Program, value: ir.Value) -> Any:
        held = program.force(self._read(value))
        block_output = program.builder.emit_output(held.leaf)
        return block_output

    # ----------------------------------------------------------------------- nodes

    def _read(self, value: ir.Value) -> Value:
        found = self._values[value]
        assert found is not None
        return found

    def _node(self, program: Program, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain in STANDARD:
            array = constant_of(attributes_of(node, {}))
            self._values[node.outputs[0]] = Known(array, array.dtype.name, str(node.outputs[0].name))
            return
        inputs = [None if value is None else self._values[value] for value in node.inputs]
        where = layer_name(node)
        results = self._convert(program, node, inputs, {}, where)
        for value, result in zip(node.outputs, results, strict=False):
            result = _declared(result, value)
            if isinstance(result, Tensor):
                result.uses = len(value.uses())
                if _is_shared(result, value):
                    result = program.force(result)
            self._values[value] = result

    def _convert(
        self, scope: Scope, node: ir.Node, inputs: Sequence[Value | None], given: Mapping[str, Any], where: str
    ) -> Sequence[Value]:
        attributes = attributes_of(node, given)
        operation = Operation(node.op_type, inputs, attributes, len(node.outputs), where)
        converter = CONVERTERS.get(node.op_type) if node.domain in STANDARD else OWN.get(node.op_type)
        if converter is None:
            return self._function(scope, operation)
        found = converter(scope, operation)
        return found if isinstance(found, list | tuple) else [found]

    # ----------------------------------------------------------------------- functions

    def _function(self, scope: Scope, call: Operation) -> Sequence[Value]:
        """A call of a function: among the operators where its body is elementwise, else as one kernel."""
        function = self._functions[call.kind]
        given = {a.name: a.value for a in function.attributes.values() if a.value is not None} | dict(call.attributes)
        if not isinstance(scope, Program) or self._is_inline(call.kind):
            return self._body(scope, function, call.inputs, given, call.where)
        if self._has_product(function):
            return self._body(scope, function, call.inputs, given, call.where)
        tensors = [scope.force(value) for value in call.inputs if value is not None]

        def build(inner: Scope, leaves: list[Tensor]) -> list[Tensor]:
            rest = iter(leaves)
            inputs = [None if value is None else next(rest) for value in call.inputs]
            return [inner.tensor(value) for value in self._body(inner, function, inputs, given, call.where)]

        key = (call.kind, str(sorted(given.items())), tuple(value is None for value in call.inputs))
        return in_one_kernel(scope, key, tensors, build, call.kind.lower())

    def _body(
        self, scope: Scope, function: ir.Function, inputs: Sequence[Value | None], given: Mapping[str, Any], where: str
    ) -> list[Value]:
        known: dict[ir.Value, Value | None] = dict.fromkeys(function.inputs)
        known.update(zip(function.inputs, inputs, strict=False))
        for node in function:
            if node.op_type == "Constant" and node.domain in STANDARD:
                array = constant_of(attributes_of(node, given))
                known[node.outputs[0]] = Known(array, array.dtype.name)
                continue
            read = [None if value is None else known[value] for value in node.inputs]
            for value, result in zip(
                node.outputs, self._convert(scope, node, read, given, where), strict=False
            ):
                result = _declared(result, value)
                if isinstance(result, Tensor):
                    result.uses = len(value.uses())
                known[value] = result
        ends = [known[output] for output in function.outputs]
        return [end for end in ends if end is not None]

    def _is_inline(self, name: str) -> bool:
        if name not in self._inline:
            self._inline[name] = all(
                node.op_type in _INLINE if node.domain in STANDARD else self._is_inline(node.op_type)
                for node in self._functions[name]
            )
        return self._inline[name]

    def _has_product(self, function: ir.Function) -> bool:
        return any(node.op_type == "MatMul" for node in function)

    def refuse_unknown(self) -> None:
        """UserError for the first operator that has no translation."""
        for node in self._model.graph:
            self._check(node, layer_name(node))

    def _check(self, node: ir.Node, where: str) -> None:
        if node.domain in STANDARD and (node.op_type in CONVERTERS or node.op_type == "Constant"):
            return
        if node.domain == DOMAIN and node.op_type in OWN:
            return
        function = self._functions.get(node.op_type)
        if function is None or node.domain in STANDARD:
            raise Operation(_spelled(node), [], {}, 0, where).unsupported("this backend does not know it")
        for inner in function:
            self._check(inner, where)


def _spelled(node: ir.Node) -> str:
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def _declared(result: Value, value: ir.Value) -> Value:
    """Dims have 64 bits, but 32 where the model was narrowed to them."""
    if isinstance(result, Known) and result.dtype == "int64" and value.dtype == ir.DataType.INT32:
        return Known(result.array if result.is_symbolic else result.array.astype(np.int32), "int32", result.name)
    return result


def _is_shared(result: Tensor, value: ir.Value) -> bool:
    """Whether ``result`` is computed once for all that read it, instead of by each."""
    several = len(value.uses()) > 1 or value.is_graph_output()
    is_codes = isinstance(result.note, Activation | Rows | Weight)
    return several and result.cost > 0 and result.leaf is None and not is_codes


def _initializer(value: ir.Value) -> Known:
    held = value.const_value
    assert held is not None
    array = held.numpy()
    if held.dtype not in DTYPES:  # 2 and 4 bits are held as bytes
        array = array.astype(np.uint8 if "U" in held.dtype.name else np.int8)
    return Known(array, array.dtype.name, str(value.name))
