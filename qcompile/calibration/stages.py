"""A model's values on all samples, computed linear by linear: each node runs once, with the weights of that moment.

The graph is cut before every stage (the linears that read one value); what crosses the cut is kept on disk, so that
solving weights one stage after the other costs one run of the model, not one for each stage.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.calibration.observers import not_finite, sequences, unreached
from qcompile.graph.linears import Linear, find_linears
from qcompile.graph.qdq import quantize_per_token
from qcompile.pipeline import Arrays, Context
from qcompile.quant.numerics import fake_quantize_per_token
from qcompile.quant.schemes import ActivationScheme

IN_MEMORY = 1 << 16  # bytes; a larger array goes to a file


@dataclasses.dataclass(frozen=True)
class Stage:
    """Linears in a row that read the same value."""

    linears: tuple[Linear, ...]

    @property
    def x(self) -> ir.Value:
        return self.linears[0].x


def find_stages(linears: Sequence[Linear]) -> list[Stage]:
    """``linears`` in graph order, those in a row that read one value together."""
    return [Stage(tuple(found)) for _, found in itertools.groupby(linears, key=lambda linear: id(linear.x))]


class Stream:
    """The inputs of each stage in turn: a context manager that removes its files at the end.

    ``activations``: by the name of a linear's input, the scheme it is quantised with at run time; the stream sees
    what the program will see.
    """

    def __init__(
        self, ctx: Context, model: ir.Model, stages: Sequence[Stage], activations: Mapping[str, ActivationScheme]
    ) -> None:
        self._ctx, self._model, self._stages, self._activations = ctx, model, stages, activations
        self._shelf = _Shelf(Path(tempfile.mkdtemp(prefix="stream-", dir=ctx.workspace.root)))
        self._crossing = _crossings(model.graph, stages)
        self._place = -1

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._shelf.close()

    def advance(self) -> None:
        """Run up to the next stage."""
        before = self._crossing[self._place] if self._place >= 0 else self._inputs()
        self._place += 1
        after = self._crossing[self._place]
        missing = [value for name, value in after.items() if name not in before]
        if missing:
            self._run(list(before.values()), missing)
        self._shelf.keep(set(after))

    def rows(self) -> Iterator[np.ndarray]:
        """The real rows (tokens, K) of the stage's input, sequence by sequence, quantised where the program does it.

        Raises UserError where one is not finite, or where there is none.
        """
        name = str(self._stages[self._place].x.name)
        scheme = self._activations.get(name)
        empty = True
        for number, sample in enumerate(self._ctx.samples):
            for rows in sequences(self._get(number, sample.feeds, name), sample.mask):
                if not np.isfinite(rows).all():
                    raise not_finite(self._model, name, rows)
                if rows.size:
                    empty = False
                    yield rows if scheme is None else fake_quantize_per_token(rows, scheme.bits, scheme.symmetric)
        if empty:
            raise unreached(self._model, name)

    def _inputs(self) -> dict[str, ir.Value]:
        return {str(v.name): v for v in self._model.graph.inputs if not v.is_initializer()}

    def _get(self, number: int, feeds: Arrays, name: str) -> np.ndarray:
        return feeds[name] if name in feeds else self._shelf.get(number, name)

    def _run(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> None:
        segment = self._segment(inputs, outputs)
        wanted = [str(v.name) for v in inputs]
        with self._ctx.runner.opened(segment, [str(v.name) for v in outputs]) as run:
            for number, sample in enumerate(self._ctx.samples):
                results = run({name: self._get(number, sample.feeds, name) for name in wanted})
                for name, array in results.items():
                    self._shelf.put(number, name, array)

    def _segment(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        """The part of the graph between ``inputs`` and ``outputs``, with the activations of its linears quantised."""
        graph = ir.convenience.extract(self._model.graph, inputs, outputs)
        functions = list(self._model.functions.values())
        segment = ir.Model(graph, ir_version=self._model.ir_version, functions=functions)
        for value in graph.inputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        readers: dict[str, list[Linear]] = {}
        for linear in find_linears(graph):
            readers.setdefault(str(linear.x.name), []).append(linear)
        for name, linears in readers.items():
            if name in self._activations:
                nodes = [(linear.node, 0) for linear in linears]
                quantize_per_token(segment, linears[0].x, nodes, self._activations[name], self._ctx.workspace)
        return segment


class _Shelf:
    """Arrays by sample and name; large ones in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, dict[int, np.ndarray | Path]] = {}
        self._count = itertools.count()

    def put(self, sample: int, name: str, array: np.ndarray) -> None:
        held: np.ndarray | Path = array
        if array.nbytes > IN_MEMORY:
            held = self._folder / f"{next(self._count)}.npy"
            np.save(held, array, allow_pickle=False)
        self._held.setdefault(name, {})[sample] = held

    def get(self, sample: int, name: str) -> np.ndarray:
        held = self._held[name][sample]
        array: np.ndarray = np.load(held) if isinstance(held, Path) else held
        return array

    def keep(self, names: set[str]) -> None:
        """Drop everything but ``names``."""
        for name in self._held.keys() - names:
            for held in self._held.pop(name).values():
                if isinstance(held, Path):
                    held.unlink()

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


# --------------------------------------------------------------------------- cutting the graph


def _crossings(graph: ir.Graph, stages: Sequence[Stage]) -> list[dict[str, ir.Value]]:
    """For each stage the values made before it that it, or what leads to a later stage, reads."""
    place = {id(node): index for index, node in enumerate(graph)}
    cuts = [place[id(stage.linears[0].node)] for stage in stages]
    last: dict[int, int] = {id(stage.x): cut for stage, cut in zip(stages, cuts, strict=True)}
    values: dict[int, ir.Value] = {id(stage.x): stage.x for stage in stages}
    pending = [stage.x for stage in stages]
    seen: set[int] = set()
    while pending:
        node = pending.pop().producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        for value in _operands(node):
            producer = value.producer()
            if id(producer) in place or (producer is None and value.is_graph_input()):
                values[id(value)] = value
                last[id(value)] = max(last.get(id(value), -1), place[id(node)])
                pending.append(value)
    made = {key: -1 if (node := v.producer()) is None else place[id(node)] for key, v in values.items()}
    return [{str(v.name): v for key, v in values.items() if made[key] < cut <= last[key]} for cut in cuts]


def _operands(node: ir.Node) -> Iterator[ir.Value]:
    """What the node reads, also inside its subgraphs."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _operands(inner)
