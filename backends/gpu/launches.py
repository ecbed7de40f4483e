"""Calls of PrimFuncs become launches: grids, blocks and arguments over the dims of the program's inputs.

rewrite:  step of a plan  ->  the launches of its PrimFunc, as TVM's split into host and device code has them
needs:    host code that only names buffers, computes dims, sets scratch aside and launches
ensures:  nothing of the host code is left: a loader needs the plan and the driver
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.instrument import pass_instrument
from tvm.target import Target

from qcompile.backends.mobile.plan import Code, Plan, Slot
from qcompile.backends.tvm.dims import Numbers, coded
from qcompile.backends.tvm.kernels.cuda.products import FEW, Product, library
from qcompile.backends.tvm.on_gpu import product_of, products_of
from qcompile.backends.tvm.schedule import SLOW
from qcompile.errors import ContractError

_LAUNCH = "call_ffi_kernel"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of step ``step``. ``arguments``: ("tensor", slot) or (dtype, expression); ``grid``, ``block``: x.

    work: number of the expression that counts the innermost steps of its loops
    """

    step: int
    kernel: str
    grid: int
    block: int
    arguments: tuple[tuple[str, int], ...]
    work: int


@pass_instrument
class _Split:
    """Keeps the module as it is where host and device code part."""

    def run_after_pass(self, module: Any, info: Any) -> None:
        if info.name.endswith("SplitHostDevice"):
            self.module = module


def compiled(module: tvm.IRModule, kernels: Sequence[str], target: Target) -> tuple[str, tvm.IRModule]:
    """The source of the PrimFuncs ``kernels``, and as TIR the functions that launch what TVM wrote of it."""
    products = products_of(module)
    own = [name for name in kernels if product_of(module[name]) is None]
    functions = {name: module[name].with_attr("global_symbol", name) for name in own}
    split = _Split()
    with tvm.transform.PassContext(instruments=[split], config={"tirx.disable_assert": True}, disabled_pass=[SLOW]):
        made = tvm.compile(tvm.IRModule(functions), target=target)
    theirs = [code.inspect_source() for code in made.mod.imports]  # none where all is ours
    written = (library(products), *(product.source for product in products)) if products else ()
    return "\n".join((*theirs, *written)), split.module


def launches_of(plan: Plan, module: tvm.IRModule, host: tvm.IRModule) -> list[Launch]:
    """Every launch of ``plan`` in order; scratch of the host code becomes temporaries of ``plan``."""
    reader = _Reader(plan)
    found: list[Launch] = []
    for number, step in enumerate(plan.steps):
        name = plan.kernels[step.kernel]
        product = product_of(module[name])
        if product is not None:
            found += reader.product(number, product, step.arguments)
        else:
            found += reader.read(number, module[name], host[name], step.arguments)
    return found


class _Reader:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._numbers = Numbers(plan.expressions)

    def read(self, step: int, function: Any, host: Any, arguments: Sequence[tuple[str, int]]) -> list[Launch]:
        """``function``: before the lowering, whose buffers have shapes; ``host``: what launches it."""
        self._dims: dict[str, Code] = {}
        self._tensors: dict[Any, int] = {}
        self._step, self._found, self._nests = step, list[Launch](), _nests(function.body)
        for before, after, (kind, one) in zip(function.params, host.params, arguments, strict=True):
            if kind == "dim":
                self._dims[after.name] = self._plan.expressions[one]
                continue
            self._tensors[after] = one
            for side, dim in zip(before.shape, self._plan.slots[one].dims, strict=True):
                if isinstance(side, tirx.Var):
                    self._dims[side.name] = self._plan.expressions[dim]
        self._statement(host.body)
        return self._found

    def product(self, step: int, product: Product, arguments: Sequence[tuple[str, int]]) -> list[Launch]:
        """Its kernel for few rows and its kernel for many: at every size the grid of one of them is empty."""
        slots = [slot for _, slot in arguments]
        *batch, m, n = (self._plan.expressions[dim] for dim in self._plan.slots[slots[-1]].dims)
        k = self._plan.expressions[self._plan.slots[slots[0]].dims[-1]]
        one = _number(1)
        many = _joined("min", one, _joined("//", m, _number(FEW + 1)))
        work = self._numbers.of(functools.reduce(lambda a, b: _joined("*", a, b), [*batch, m, n, k]))
        operands, sizes = [("tensor", slot) for slot in slots], [m] if product.k else [m, n, k]
        found = []
        for kernel in product.kernels:
            choice = _joined("-", one, many) if kernel.few else many
            tiles = [_tiles(m, kernel.rows), _tiles(n, kernel.columns)]
            grid = functools.reduce(lambda a, b: _joined("*", a, b), [*batch, *tiles], choice)
            if product.kind == "w4":  # each kernel reads the codes in an order of its own
                left_out = 2 if kernel.few else 1
                operands = [("tensor", slot) for place, slot in enumerate(slots) if place != left_out]
            given = [*operands, *(("int32", self._numbers.of(size)) for size in sizes)]
            found.append(Launch(step, kernel.name, self._numbers.of(grid), kernel.threads, tuple(given), work))
        return found

    def _statement(self, found: Any) -> None:
        kind = type(found).__name__
        if kind == "SeqStmt":
            for one in found.seq:
                self._statement(one)
        elif kind == "DeclBuffer":
            self._tensors[found.buffer] = self._tensors[found.data.args[0]]
        elif kind == "Bind":
            self._dims[found.var.name] = self._code(found.value)
        elif kind == "AllocBuffer":
            self._tensors[found.buffer] = self._scratch(found.buffer)
        elif kind == "Evaluate" and str(getattr(found.value.op, "name", "")).endswith(_LAUNCH):
            self._launch(found.value)
        elif kind != "Evaluate" or not isinstance(found.value, tirx.IntImm):
            raise ContractError(f"host code has a {kind}", where="the launches of the program")

    def _scratch(self, buffer: Any) -> int:
        dims = tuple(self._numbers.of(self._code(side)) for side in buffer.shape)
        self._plan.slots.append(Slot("temporary", 0, str(buffer.dtype), dims, self._step, self._step))
        return len(self._plan.slots) - 1

    def _launch(self, call: Any) -> None:
        name, *given = call.args
        *values, grid, block = given
        if [str(one) for one in call.attrs["launch_params"]] != ["blockIdx.x", "threadIdx.x"]:
            raise ContractError("a launch has more than a grid and a block in x", where=str(name.value))
        arguments = [self._argument(one) for one in values]
        steps = (self._code(extent) for extent in self._nests[len(self._found)])
        work = self._numbers.of(functools.reduce(lambda a, b: _joined("*", a, b), steps, _number(1)))
        number = self._numbers.of(self._code(grid))
        self._found.append(Launch(self._step, str(name.value), number, int(block), tuple(arguments), work))

    def _argument(self, one: Any) -> tuple[str, int]:
        if type(one).__name__ == "Call":  # the place of a buffer
            return "tensor", self._tensors[one.args[0]]
        return str(one.ty.dtype), self._numbers.of(self._code(one))

    def _code(self, dim: Any) -> Code:
        return coded(dim, lambda variable: self._dims[variable.name], _unknown)


def _nests(body: Any) -> list[list[Any]]:
    """The extents of the loops of each stage, outermost first."""
    while type(body).__name__ == "SBlockRealize":
        body = body.block.body
    return [_extents(one) for one in (body.seq if isinstance(body, tirx.SeqStmt) else [body])]


def _extents(found: Any) -> list[Any]:
    """Of the deepest of the nests in ``found``."""
    if isinstance(found, tirx.For):
        return [found.extent, *_extents(found.body)]
    if isinstance(found, tirx.SeqStmt):
        return max(map(_extents, found.seq), key=len)
    return []


def _unknown(what: str) -> ContractError:
    return ContractError(f"host code computes {what}", where="the launches of the program")


def _number(value: int) -> Code:
    return (("number", value),)


def _joined(operation: str, a: Code, b: Code) -> Code:
    return (*a, *b, (operation, 0))


def _tiles(size: Code, step: int) -> Code:
    return size if step == 1 else _joined("//", _joined("+", size, _number(step - 1)), _number(step))
