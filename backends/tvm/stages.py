"""Expressions become loops: one TE stage for each forced tensor, one PrimFunc for each kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import te, tirx
from tvm.s_tir import renew_defs

from qcompile.backends.tvm.values import Dim, Index, Tensor, simplified, walk

ROW = "r"  # the name of a stage that combines what lies along rows of one tensor
COMBINE: dict[str, Callable[..., Any]] = {"sum": te.sum, "max": te.max, "min": te.min}
JOIN: dict[str, Callable[[Any, Any], Any]] = {"sum": lambda a, b: a + b, "max": tirx.max, "min": tirx.min}
LANES = 16  # of a reduction of floats that a CPU does as vectors
IN_LANES, TAIL = "lanes", "tail"  # names of its stages, which schedules know


def opaque(value: Any, dtype: str) -> Any:
    """``value``, its bounds hidden: TVM analyses a Let again in each context and stumbles over bounds that differ."""
    if dtype not in ("int32", "int64"):
        return value
    wide = tirx.Cast("int64", value)  # what stands in an index becomes int64 later, and no bits may be cut then
    return tirx.Cast(dtype, tirx.call_intrin("int64", "tirx.reinterpret", wide))


def wide(dims: Sequence[Dim]) -> tuple[Any, ...]:
    """``dims`` as 64-bit numbers, so that loops count in them; TVM's own widening breaks numbers that index a table."""
    return tuple(tirx.const(dim, "int64") if isinstance(dim, int) else dim for dim in dims)


class Writer:
    """Writes one element of ``roots`` down: what several others read is computed once, in a Let."""

    def __init__(self, roots: Sequence[Tensor], stages: dict[int, te.Tensor]) -> None:
        self._stages = stages
        self._uses: Counter[int] = Counter(id(root) for root in roots)
        for tensor in walk(roots):
            if tensor.leaf is None:
                self._uses.update(id(operand) for operand in tensor.operands)
        self._memo: dict[tuple[Any, ...], Any] = {}
        self._held: list[Any] = []  # what the keys of the memo are the ids of
        self._lets: list[tuple[tirx.Var, Any]] = []

    def at(self, tensor: Tensor, index: Index) -> Any:
        """The element of ``tensor`` at ``index``."""
        stage = self._stages.get(id(tensor))
        if stage is not None:
            return stage(*index)
        key = (id(tensor), *(i if isinstance(i, int) else id(i) for i in index))
        if key not in self._memo:
            assert tensor.make is not None
            found = tensor.make(lambda n, i: self.at(tensor.operands[n], i), index)
            if self._uses[id(tensor)] > 1 and tensor.cost:
                variable = tirx.Var(f"v{len(self._lets)}", tensor.dtype)
                self._lets.append((variable, opaque(found, tensor.dtype)))
                found = variable
            self._memo[key] = found
            self._held.append(index)
        return self._memo[key]

    def closed(self, expression: Any) -> Any:
        """``expression`` inside the Lets that it reads."""
        for variable, value in reversed(self._lets):
            expression = tirx.Let(variable, value, expression)
        return expression


class Kernel:
    """A PrimFunc in the making: its stages, and the tensors that it reads. ``vectors``: floats are reduced in lanes."""

    def __init__(self, dims: Mapping[str, tirx.Var], vectors: bool = False) -> None:
        self._known_dims, self._vectors = dims, vectors
        self.stages: dict[int, te.Tensor] = {}
        self.inputs: list[Tensor] = []
        self._placeholders: list[te.Tensor] = []
        self._alive: list[Tensor] = []  # ids are keys

    def read(self, tensor: Tensor) -> None:
        """Make ``tensor``, a leaf of the program, an input."""
        if id(tensor) not in self.stages:
            held = te.placeholder(wide(tensor.shape), tensor.dtype, name=f"x{len(self.inputs)}")
            self.stages[id(tensor)] = held
            self.inputs.append(tensor)
            self._placeholders.append(held)
            self._alive.append(tensor)

    def compute(self, tensor: Tensor, name: str = "y") -> te.Tensor:
        """A stage with every element of ``tensor``."""
        self._open([tensor])

        def element(*index: Any) -> Any:
            writer = Writer([tensor], self.stages)
            return writer.closed(writer.at(tensor, tuple(index)))

        return self.put(tensor, te.compute(wide(tensor.shape), element, name=name))

    def reduce(self, kind: str, result: Tensor, source: Tensor, axes: Sequence[int], name: str = ROW) -> te.Tensor:
        """A stage ``result``: ``source`` combined over ``axes``, which stay as dims of one."""
        self._open([source])
        if self._vectors and list(axes) == [source.rank - 1] and source.dtype.startswith("float"):
            return self._reduce_in_lanes(kind, result, source)
        over = {axis: te.reduce_axis(wide((0, source.shape[axis])), name=f"k{axis}") for axis in axes}

        def element(*index: Any) -> Any:
            writer = Writer([source], self.stages)
            place = tuple(over[axis].var if axis in over else at for axis, at in enumerate(index))
            read = writer.at(source, place)
            return COMBINE[kind](writer.closed(read), axis=list(over.values()))

        return self.put(result, te.compute(wide(result.shape), element, name=name))

    def _reduce_in_lanes(self, kind: str, result: Tensor, source: Tensor) -> te.Tensor:
        """Every 16th element of a row, its tail, and all of these: a compiler may not reorder sums of floats itself."""
        side = source.shape[-1]
        start = simplified(side // LANES * LANES)

        def part(name: str, count: Dim, width: int, place: Callable[[Any, Any], Any]) -> te.Tensor:
            k = te.reduce_axis(wide((0, count)), name="k")

            def element(*index: Any) -> Any:
                writer = Writer([source], self.stages)
                read = writer.at(source, (*index[:-1], place(k.var, index[-1])))
                return COMBINE[kind](writer.closed(read), axis=k)

            return te.compute(wide((*source.shape[:-1], width)), element, name=name)

        lanes = part(IN_LANES, simplified(side // LANES), LANES, lambda k, lane: k * LANES + lane)
        tail = part(TAIL, simplified(side % LANES), 1, lambda k, _: start + k)
        k = te.reduce_axis(wide((0, LANES)), name="k")
        shape = wide(result.shape)
        whole = te.compute(shape, lambda *i: COMBINE[kind](lanes(*i[:-1], k.var), axis=k), name="whole")
        if isinstance(side, int) and side % LANES == 0:
            return self.put(result, whole)
        return self.put(result, te.compute(shape, lambda *i: JOIN[kind](whole(*i), tail(*i)), name="r"))

    def product(self, result: Tensor, element: Callable[..., Any], size: Any, name: str = "matmul") -> te.Tensor:
        """A stage ``result``: the sum of ``element(index, k)`` over ``size`` values of k."""
        k = te.reduce_axis(wide((0, size)), name="k")
        stage = te.compute(wide(result.shape), lambda *index: te.sum(element(index, k.var), axis=k), name=name)
        return self.put(result, stage)

    def finish(self, outputs: Sequence[Tensor]) -> tuple[tirx.PrimFunc, list[tirx.Var]]:
        """The PrimFunc, and the dynamic dims that it takes as numbers between its inputs and its outputs."""
        ends = [self.stages[id(output)] for output in outputs]
        bound = {dim for held in (*self._placeholders, *ends) for dim in held.shape if isinstance(dim, tirx.Var)}
        function = te.create_prim_func([*self._placeholders, *ends])
        free = [v for v in self._dims(function) if v not in bound]
        if free:
            function = te.create_prim_func([*self._placeholders, *free, *ends])
        return renew_defs(function).without_attr("global_symbol"), free

    def _dims(self, function: tirx.PrimFunc) -> list[tirx.Var]:
        """The dynamic dims that ``function`` speaks of."""
        held = [dim for stage in self.stages.values() for dim in stage.shape]
        parts = [function.body, *(dim for dim in held if isinstance(dim, tirx.Expr))]
        names = {v.name for part in parts for v in tirx.analysis.undefined_vars(part)}
        return [variable for name, variable in self._known_dims.items() if name in names]

    def put(self, tensor: Tensor, stage: te.Tensor) -> te.Tensor:
        """Let ``stage`` be what ``tensor`` is read from."""
        self.stages[id(tensor)] = stage
        self._alive.append(tensor)
        return stage

    def _open(self, roots: Sequence[Tensor]) -> None:
        for tensor in walk(roots):
            if tensor.leaf is not None:
                self.read(tensor)
