"""Where tensors are forced: in the program, each by a kernel of its own, or as a stage inside one kernel."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx

from qcompile.backends import base
from qcompile.backends.tvm.stages import Kernel
from qcompile.backends.tvm.values import Dim, Known, Tensor, Value, expression, immediate, same, spelled, walk


class Scope(abc.ABC):
    """What the converters of operators are given."""

    @abc.abstractmethod
    def force(self, value: Value) -> Tensor:
        """``value`` as a leaf: it is computed here if it is an expression."""

    @abc.abstractmethod
    def constant(self, known: Known) -> Tensor:
        """``known`` as a leaf."""

    @abc.abstractmethod
    def reduce(self, kind: str, source: Tensor, axes: Sequence[int]) -> Tensor:
        """``source`` combined over ``axes``, which stay as dims of one."""

    @abc.abstractmethod
    def contract(
        self, shape: Sequence[Dim], dtype: str, operands: Sequence[Tensor], element: Callable[..., Any], size: Dim,
        key: Hashable,
    ) -> Tensor:  # fmt: skip
        """The sum over k < ``size`` of ``element(read, index, k)``; the operands are forced."""

    @abc.abstractmethod
    def reshape(self, source: Tensor, shape: Sequence[Dim]) -> Tensor:
        """``source`` in another shape."""

    @property
    @abc.abstractmethod
    def program(self) -> Program: ...

    def tensor(self, value: Value) -> Tensor:
        """``value`` as a tensor."""
        return value if isinstance(value, Tensor) else self.constant(value)

    def scalar(self, known: Known) -> Any | None:
        """The only element of ``known`` as an expression; None where it is better read from memory."""
        return immediate(known.ints()[0] if known.is_symbolic else known.array.reshape(-1)[0], known.dtype)


@dataclasses.dataclass(frozen=True)
class Built:
    """A kernel that is in the module: the dims it takes, and where its inputs come from.

    sources: a position among the arguments, or a constant
    """

    function: Any
    dims: list[tirx.Var]
    sources: list[int | Tensor]


class Body(Scope):
    """Inside of one kernel."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.kernel = Kernel(program.dims, program.tiles)

    @property
    def program(self) -> Program:
        return self._program

    def force(self, value: Value) -> Tensor:
        tensor = self.tensor(value)
        if tensor.leaf is None:
            self.kernel.compute(tensor)
            tensor.leaf = "stage"
        return tensor

    def constant(self, known: Known) -> Tensor:
        return self._program.constant(known)

    def reduce(self, kind: str, source: Tensor, axes: Sequence[int]) -> Tensor:
        result = _reduced(source, axes)
        self.kernel.reduce(kind, result, source, axes)
        result.leaf = "stage"
        return result

    def contract(
        self, shape: Sequence[Dim], dtype: str, operands: Sequence[Tensor], element: Callable[..., Any], size: Dim,
        key: Hashable,
    ) -> Tensor:  # fmt: skip
        result = Tensor(tuple(shape), dtype, key=key)
        for operand in operands:
            self.force(operand)
            if id(operand) not in self.kernel.stages:
                self.kernel.read(operand)
        stages = [self.kernel.stages[id(operand)] for operand in operands]
        self.kernel.product(result, lambda index, k: element(lambda n, i: stages[n](*i), index, k), size)
        result.leaf = "stage"
        return result

    def reshape(self, source: Tensor, shape: Sequence[Dim]) -> Tensor:
        return refolded(source, shape)


class Program(Scope):
    """The function ``main`` in the making, and the parameters that it takes.

    tiles: products are written in tiles for a CPU, not as plain sums
    target: of the low-bit kernels that linear layers may take; None for none of them
    accuracy_level: of weight-only linears: 1 multiplies floats, 4 rounds their inputs to 8 bits, block by block
    """

    def __init__(self, tiles: bool = True, target: Any = None, accuracy_level: int = 1) -> None:
        self.tiles, self.target, self.accuracy_level = tiles, target, accuracy_level
        self.builder = relax.BlockBuilder()
        self.dims: dict[str, tirx.Var] = {}
        self.parameters: dict[str, np.ndarray] = {}
        self.leaves: dict[str, Tensor] = {}
        self.products: list[base.Kernel] = []
        self._contents: dict[bytes, Tensor] = {}
        self._kernels: dict[Hashable, Built] = {}
        self._written: dict[Hashable, Any] = {}
        self._shapes: dict[Hashable, list[tuple[tuple[Dim, ...], str]]] = {}
        self._used: set[str] = set()
        self._reshaped: dict[tuple[int, str], Tensor] = {}

    @property
    def program(self) -> Program:
        return self

    @property
    def kernel_count(self) -> int:
        return len(self._kernels)

    def constant(self, known: Known) -> Tensor:
        if known.is_symbolic:
            return self._symbolic(known)
        digest = hashlib.blake2b(np.ascontiguousarray(known.array).view(np.uint8).reshape(-1).data, digest_size=16)
        digest.update(f"{known.dtype}{known.array.shape}".encode())
        key = digest.digest()
        if key not in self._contents:
            self._contents[key] = self.parameter(known.name or "constant", known.array, known.dtype)
        return self._contents[key]

    def parameter(self, name: str, array: np.ndarray, dtype: str) -> Tensor:
        """A tensor that is bound when the program is loaded."""
        plain = re.sub(r"\W", "_", name) or "p"
        unique, count = plain, 0
        while unique in self.parameters:
            count += 1
            unique = f"{plain}_{count}"
        self.parameters[unique] = array
        shape = tuple(int(side) for side in array.shape)
        self.leaves[unique] = Tensor(shape, dtype, leaf=relax.Var(unique, relax.TensorType(shape, dtype)))
        return self.leaves[unique]

    def scalar(self, known: Known) -> Any | None:
        if known.name and not known.is_symbolic:
            value = known.array.reshape(-1)[0]
            whole = known.dtype.startswith(("int", "uint"))
            if known.dtype.startswith("float") or (whole and (int(value) & (int(value) - 1)) != 0):
                return None  # layers differ in it, and share a kernel where it is read from memory
        return super().scalar(known)

    def force(self, value: Value) -> Tensor:
        tensor = self.tensor(value)
        if tensor.leaf is None:
            leaves = [below for below in walk([tensor]) if below.leaf is not None]
            key = ("expression", describe([tensor]))
            if key not in self._kernels:
                body = Body(self)
                for leaf in leaves:
                    body.kernel.read(leaf)
                body.kernel.compute(tensor)
                self._add(key, body, leaves, [tensor], _hint(tensor))
            tensor.leaf = self._call(key, leaves, [tensor])[0]
        return tensor

    def reduce(self, kind: str, source: Tensor, axes: Sequence[int]) -> Tensor:
        result = _reduced(source, axes)
        leaves = [below for below in walk([source]) if below.leaf is not None]
        key = (kind, tuple(axes), describe([source]))
        if key not in self._kernels:
            body = Body(self)
            for leaf in leaves:
                body.kernel.read(leaf)
            body.kernel.reduce(kind, result, source, axes)
            self._add(key, body, leaves, [result], kind)
        result.leaf = self._call(key, leaves, [result])[0]
        return result

    def contract(
        self, shape: Sequence[Dim], dtype: str, operands: Sequence[Tensor], element: Callable[..., Any], size: Dim,
        key: Hashable,
    ) -> Tensor:  # fmt: skip
        forced = [self.force(operand) for operand in operands]

        def build(body: Body) -> list[Tensor]:
            return [body.contract(shape, dtype, forced, element, size, key)]

        return self.kernel(("contract", key, spelled(shape), dtype), forced, build, "matmul")[0]

    def kernel(
        self, key: Hashable, arguments: Sequence[Tensor], build: Callable[[Body], list[Tensor]], hint: str
    ) -> list[Tensor]:
        """What ``build`` computes from leaves, all in one kernel; ``key`` says what it does."""
        full = (key, tuple((spelled(leaf.shape), leaf.dtype) for leaf in arguments))
        if full not in self._kernels:
            body = Body(self)
            for leaf in arguments:
                body.kernel.read(leaf)
            ends = build(body)
            outputs = [body.force(_fresh(end, arguments)) for end in ends]
            self._add(full, body, arguments, outputs, hint)
            self._shapes[full] = [(output.shape, output.dtype) for output in outputs]
        results = [Tensor(shape, dtype) for shape, dtype in self._shapes[full]]
        for result, leaf in zip(results, self._call(full, arguments, results), strict=True):
            result.leaf = leaf
        return results

    def note(self, site: str, kernel: str, reason: str = "") -> None:
        """Keep on record how the product at ``site`` runs; ``reason``: why not in low bits."""
        self.products.append({"site": site, "kernel": kernel, "low_bit": not reason, "reason": reason})

    def used_parameters(self) -> list[str]:
        """The names of the parameters that a kernel reads, in order."""
        return [name for name in self.parameters if name in self._used]

    def written(
        self, key: Hashable, make: Callable[[], Any], arguments: Sequence[Tensor], shape: Sequence[Dim], dtype: str
    ) -> Tensor:
        """The result of the PrimFunc that ``make`` writes out, once for a ``key``, from leaves."""
        if key not in self._written:
            self._written[key] = self.builder.add_func(make(), str(key[0]) if isinstance(key, tuple) else str(key))
        given = [argument.leaf for argument in arguments]
        self._used.update(leaf.name for leaf in given if leaf.name in self.parameters)
        call = relax.call_tir(self._written[key], given, relax.TensorType(list(shape), dtype))
        return Tensor(tuple(shape), dtype, leaf=self.builder.emit(call))

    def reshape(self, source: Tensor, shape: Sequence[Dim]) -> Tensor:
        if len(shape) == source.rank and all(map(same, shape, source.shape)):
            return source
        held = self.force(source)
        key = (id(held.leaf), spelled(shape))
        if key not in self._reshaped:
            self._reshaped[key] = self._in_shape(held, shape)
        return self._reshaped[key]

    def _in_shape(self, held: Tensor, shape: Sequence[Dim]) -> Tensor:
        """The same memory, a leaf, in another shape."""
        self._used.update({held.leaf.name} & self.parameters.keys())
        kind = relax.TensorType(list(shape), held.dtype)
        given = [held.leaf, relax.ShapeExpr(list(shape))]
        call = relax.Call(relax.ExternFunc("vm.builtin.reshape"), given, ty_args=[kind])
        return Tensor(tuple(shape), held.dtype, operands=(held,), leaf=self.builder.emit(call))

    def _symbolic(self, known: Known) -> Tensor:
        values = [immediate(value, known.dtype) for value in known.ints()]
        flat = expression((len(values),), known.dtype, [], lambda _, i: _chosen(values, i), ("dims", str(values)), 1)
        return flat if known.array.ndim == 1 else refolded(flat, known.array.shape)

    def _add(
        self, key: Hashable, body: Body, arguments: Sequence[Tensor], outputs: Sequence[Tensor], hint: str
    ) -> None:
        function, dims = body.kernel.finish(outputs)
        places = {id(argument): place for place, argument in enumerate(arguments)}
        sources: list[int | Tensor] = [places.get(id(leaf), leaf) for leaf in body.kernel.inputs]
        self._kernels[key] = Built(self.builder.add_func(function, hint), dims, sources)

    def _call(self, key: Hashable, arguments: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Any]:
        built = self._kernels[key]
        given = [arguments[s].leaf if isinstance(s, int) else s.leaf for s in built.sources]
        self._used.update(leaf.name for leaf in given if leaf.name in self.parameters)
        kinds = [relax.TensorType(list(output.shape), output.dtype) for output in outputs]
        call = relax.call_tir(built.function, [*given, *built.dims], kinds if len(kinds) > 1 else kinds[0])
        made = self.builder.emit(call)
        if len(kinds) == 1:
            return [made]
        return [self.builder.emit(relax.TupleGetItem(made, place)) for place in range(len(kinds))]


def describe(roots: Sequence[Tensor]) -> Hashable:
    """What computes ``roots``, as data."""
    numbers: dict[int, int] = {}
    found: list[Hashable] = []
    for tensor in walk(roots):
        numbers[id(tensor)] = len(numbers)
        if tensor.leaf is not None:
            found.append((spelled(tensor.shape), tensor.dtype))
        else:
            found.append((tensor.key, tensor.dtype, *(numbers[id(operand)] for operand in tensor.operands)))
    return (*found, *((numbers[id(root)], spelled(root.shape)) for root in roots))


def refolded(source: Tensor, shape: Sequence[Dim]) -> Tensor:
    """``source`` in another shape, as an expression."""
    if len(shape) == source.rank and all(map(same, shape, source.shape)):
        return source

    def make(read: Any, index: Any) -> Any:
        flat: Any = tirx.const(0, "int64")
        for at, side in zip(index, shape, strict=True):
            flat = flat * side + at
        place = []
        for side in reversed(source.shape):
            place.append(tirx.floormod(flat, side))
            flat = tirx.floordiv(flat, side)
        return read(0, tuple(reversed(place)))

    return expression(shape, source.dtype, [source], make, ("reshape", spelled(shape)))


def _reduced(source: Tensor, axes: Sequence[int]) -> Tensor:
    return Tensor(tuple(1 if axis in axes else side for axis, side in enumerate(source.shape)), source.dtype)


def _fresh(end: Tensor, arguments: Sequence[Tensor]) -> Tensor:
    """``end``, or a copy where it is an argument or otherwise no stage."""
    if end.leaf == "stage" or end.leaf is None:
        return end
    return expression(end.shape, end.dtype, [end], lambda read, i: read(0, i), "copy")


def _chosen(values: Sequence[Any], index: Any) -> Any:
    found = values[-1]
    for place in range(len(values) - 2, -1, -1):
        found = tirx.Select(index[0] == place, values[place], found)
    return found


def _hint(tensor: Tensor) -> str:
    """A name for a kernel from what it computes last."""
    name = tensor.key[0] if isinstance(tensor.key, tuple) else tensor.key
    return re.sub(r"\W", "_", str(name)).lower() or "kernel"


