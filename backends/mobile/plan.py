"""The plan of a program: which kernels run in which order on which memory, for shapes that are known when it runs.

``encode`` writes the file that ``qcompile_plan.c`` reads: 8-byte little-endian integers, texts padded to whole ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from qcompile.calibration.inputs import UNLIMITED
from qcompile.errors import UserError

MOST_ARGUMENTS, RANK = 64, 8  # of a step and of a tensor, in qcompile_plan.h
MAGIC = int.from_bytes(b"QCPLAN02", "little")
LEAST = 2**16  # bytes of a parameter that is worth deriving from another
ALIGNMENT = 64  # bytes: of parameters and of intermediate results

Place = Literal["input", "parameter", "temporary", "view", "derived"]
PLACES: tuple[Place, ...] = ("input", "parameter", "temporary", "view", "derived")
_TYPE_CODES = {"int": 0, "uint": 1, "float": 2, "bool": 6}  # as DLPack counts them
ARGUMENTS = ("tensor", "dim", "int32", "uint32", "uint64")  # a dim has 64 bits
OPERATIONS = ("number", "variable", "+", "-", "*", "//", "%", "max", "min")

# In postfix order: ("number", 3), ("variable", 0), ("+", 0)
Code = tuple[tuple[str, int], ...]


@dataclasses.dataclass
class Slot:
    """One tensor. ``source``: of an input its number, of a parameter its place in the file, of a view its tensor.

    A derived tensor of bytes is a parameter, tensor ``source``, transposed, with ``addend`` (below 256) on each byte:
    an embedding that is also the last product's matrix is in the file once.

    dims:  numbers of expressions
    first, last: the steps between which a temporary is alive
    """

    place: Place
    source: int
    dtype: str
    dims: tuple[int, ...]
    first: int = -1
    last: int = -1
    addend: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One call: of kernel number ``kernel`` on ("tensor", number) and ("dim", number of an expression).

    Of a launch on a GPU, dims may have another type, ``grid`` is the expression of its blocks, ``block`` the threads.
    """

    kernel: int
    arguments: tuple[tuple[str, int], ...]
    grid: int = 0
    block: int = 0


@dataclasses.dataclass
class Plan:
    """``variables``: (number of an input, axis) that gives each; ``parameters``: by place in the file.

    rows: by input, of the table that its ids are of; longest: tokens that there are positions for
    """

    variables: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    expressions: list[Code] = dataclasses.field(default_factory=list)
    slots: list[Slot] = dataclasses.field(default_factory=list)
    inputs: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    outputs: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    kernels: list[str] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    parameters: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    longest: int = UNLIMITED

    @property
    def parameter_bytes(self) -> int:
        return max((place + array.nbytes for place, array in self.parameters.items()), default=0)

    def root(self, slot: int) -> int:
        """The tensor whose memory ``slot`` is."""
        while self.slots[slot].place == "view":
            slot = self.slots[slot].source
        return slot

    def set_lifetimes(self) -> None:
        """From the step that makes each temporary to the last that reads it; outputs live to the end."""
        for number, step in enumerate(self.steps):
            for kind, one in step.arguments:
                if kind == "tensor":
                    self._extend(one, number)
        for _, one in self.outputs:
            self._extend(one, len(self.steps))

    def _extend(self, slot: int, step: int) -> None:
        held = self.slots[self.root(slot)]
        held.first = step if held.first < 0 else held.first
        held.last = step

    def place_parameters(self, arrays: Mapping[int, np.ndarray]) -> None:
        """Give each parameter, by its slot, its place in the file; equal ones share it."""
        end = 0
        known: dict[tuple[object, ...], int] = {}
        for slot, (table, addend) in _derived(arrays).items():
            self.slots[slot] = dataclasses.replace(self.slots[slot], place="derived", source=table, addend=addend)
        for slot, array in arrays.items():
            if self.slots[slot].place == "derived":
                continue
            content = np.asarray(array, order="C")
            key = (content.dtype.str, content.shape, hashlib.sha256(content.tobytes()).digest())
            if key not in known:
                known[key] = end
                self.parameters[end] = content
                end += -(-max(content.nbytes, 1) // ALIGNMENT) * ALIGNMENT
            self.slots[slot].source = known[key]

    def pieces(self) -> Iterator[bytes]:
        """The file of parameters, piece by piece."""
        end = 0
        for place, array in sorted(self.parameters.items()):
            yield bytes(place - end)
            yield array.tobytes()
            end = place + array.nbytes

    def values(self, shapes: Sequence[Sequence[int]]) -> list[int]:
        """Every expression where the inputs have ``shapes``."""
        variables = [shapes[number][axis] for number, axis in self.variables]
        return [evaluate(code, variables) for code in self.expressions]


def _derived(arrays: Mapping[int, np.ndarray]) -> dict[int, tuple[int, int]]:
    """By slot, the earlier or later one that it is the transpose of, and what is added to each byte."""
    found: dict[int, tuple[int, int]] = {}
    wide = {slot: array for slot, array in arrays.items() if _is_table(array)}
    for slot, array in wide.items():
        for table, other in wide.items():
            if table in found or table == slot or other.shape != array.shape[::-1] or slot in found:
                continue
            addend = (array.view(np.uint8)[0, 0] - other.view(np.uint8)[0, 0].astype(np.int16)) % 256
            if np.array_equal(array.view(np.uint8), other.view(np.uint8).T + np.uint8(addend)):
                if other.shape[0] < other.shape[1]:  # the wide one is read by columns, the tall one by rows
                    found[table] = (slot, int(-addend % 256))
                else:
                    found[slot] = (table, int(addend))
    return found


def _is_table(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.itemsize == 1 and array.dtype != np.bool_ and array.size > LEAST


def derived(table: np.ndarray, addend: int) -> np.ndarray:
    """The bytes of a derived tensor, from its parameter."""
    return np.ascontiguousarray(table.view(np.uint8).T + np.uint8(addend))


def evaluate(code: Code, variables: Sequence[int]) -> int:
    """The number that ``code`` makes of ``variables``."""
    stack: list[int] = []
    for operation, operand in code:
        if operation in ("number", "variable"):
            stack.append(operand if operation == "number" else variables[operand])
            continue
        b, a = stack.pop(), stack.pop()
        found = {"+": a + b, "-": a - b, "*": a * b, "max": max(a, b), "min": min(a, b)}
        stack.append(found[operation] if operation in found else a // b if operation == "//" else a % b)
    return stack[0]


def encode(plan: Plan, target: str, digest: str) -> bytes:
    """``plan`` as a file; ``target``: whom the kernels are for, ``digest``: SHA-256 of the file of parameters."""
    _check(plan)
    words = [MAGIC, *_text(target), *_text(digest), plan.parameter_bytes, plan.longest]
    words += _listed((number, axis) for number, axis in plan.variables)
    words.append(len(plan.expressions))
    for code in plan.expressions:
        words += _listed((OPERATIONS.index(operation), operand) for operation, operand in code)
    words.append(len(plan.slots))
    for slot in plan.slots:
        first = slot.addend if slot.place == "derived" else slot.first
        words += [PLACES.index(slot.place), slot.source, *type_of(slot.dtype), first, slot.last]
        words += _listed((dim,) for dim in slot.dims)
    for ports in (plan.inputs, plan.outputs):
        words += _listed((*_text(name), slot, plan.rows.get(name, 0)) for name, slot in ports)
    words += _listed(tuple(_text(name)) for name in plan.kernels)
    words.append(len(plan.steps))
    for step in plan.steps:
        words += [step.kernel, step.grid, step.block]
        words += _listed((ARGUMENTS.index(kind), number) for kind, number in step.arguments)
    return np.array(words, "<i8").tobytes()


def _check(plan: Plan) -> None:
    """UserError where the loader has no room for ``plan``."""
    most = max((len(step.arguments) for step in plan.steps), default=0)
    rank = max((len(slot.dims) for slot in plan.slots), default=0)
    if most > MOST_ARGUMENTS or rank > RANK:
        what = f"a kernel takes {most} tensors and numbers, a tensor has {rank} axes"
        hint = f"phones' packages have room for {MOST_ARGUMENTS} and {RANK}; take runtime=onnxruntime"
        raise UserError(what, hint=hint)


def _listed(rows: Iterable[tuple[int, ...]]) -> list[int]:
    held = list(rows)
    return [len(held), *(word for row in held for word in row)]


def _text(text: str) -> list[int]:
    data = text.encode()
    padded = data + bytes(-len(data) % 8)
    return [len(data), *np.frombuffer(padded, "<i8").tolist()]


def type_of(dtype: str) -> tuple[int, int]:
    """``int32`` -> DLPack's code and the bits of an element."""
    if dtype == "bool":
        return _TYPE_CODES["bool"], 8
    name = dtype.rstrip("0123456789")
    return _TYPE_CODES[name], int(dtype[len(name) :])
