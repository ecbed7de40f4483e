"""Small quantised graphs in ONNX's text form, brought to integers, and both run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

from qcompile.calibration.runner import OrtRunner, open_session
from qcompile.calibration.samples import Sample
from qcompile.graph import functions
from qcompile.graph.provenance import remember
from qcompile.graph.workspace import Workspace
from qcompile.integer.convert import Converter, Settings, convert
from qcompile.integer.emit import Emitter
from qcompile.integer.rules import RULES
from qcompile.ledger import Ledger, Skip
from qcompile.pipeline import Context, Target
from qcompile.recipe import by_name

Array = np.ndarray
Feeds = dict[str, Array]
HEADER = '<ir_version: 10, opset_import: ["": 21, "qcompile": 1]>\n'
FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16}


def parsed(text: str, constants: Mapping[str, Any] | None = None) -> ir.Model:
    """``g (inputs) => (outputs) { nodes }`` with initializers and the project's functions that it uses."""
    proto = onnx.parser.parse_model(HEADER + text)
    for name, array in (constants or {}).items():
        held = np.asarray(array)
        held = held.astype(np.float32) if held.dtype == np.float64 else held
        proto.graph.initializer.append(numpy_helper.from_array(held, name))
    for op in {node.op_type for node in proto.graph.node if node.domain == functions.DOMAIN}:
        model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
        functions.use(model, op)
        known = {function.name for function in proto.functions}
        added = [ir.to_proto(function) for function in model.functions.values()]
        proto.functions.extend(function for function in added if function.name not in known)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False)
    return ir.from_proto(inferred)


@contextmanager
def context(samples: Sequence[Feeds] = ()) -> Iterator[Context]:
    with Workspace() as workspace:
        runner = OrtRunner(workspace, threads=1)
        given = [Sample(feeds) for feeds in samples]
        yield Context(workspace, Ledger(), by_name("w8a8_static"), Target("plain", "onnxruntime", ""), given, runner)


@contextmanager
def emitter(model: ir.Model) -> Iterator[Emitter]:
    """Of nodes in front of the last one of ``model``."""
    with context() as ctx:
        found = Emitter(model, ctx.workspace)
        found.node = model.graph[-1]
        yield found


@dataclasses.dataclass
class Outcome:
    """A graph in integers beside itself in floats."""

    converter: Converter
    before: bytes
    after: bytes
    skips: list[Skip]

    def step(self, name: str = "y") -> float:
        """One unit of the grid of the value ``name``."""
        return float(2.0 ** -self.converter.grids.places[name])

    def ops(self) -> list[str]:
        return [node.op_type for node in self.converter.model.graph]

    def inside(self) -> list[str]:
        """Operators on floats but those at the boundary of what comes in and goes out."""
        edge = ("Mul", "Clip", "Round", "Cast", "DequantizeLinear")
        return [
            node.op_type
            for node in self.converter.model.graph
            if node.op_type not in edge and any(v.dtype in FLOATS for v in node.outputs)
        ]

    def run(self, feeds: Feeds) -> tuple[list[Array], list[Array]]:
        """The outputs in floats, and in integers."""
        one, two = (open_session(model, threads=1, literal_qdq=True) for model in (self.before, self.after))
        return one.run(None, feeds), two.run(None, feeds)

    def error(self, feeds: Feeds) -> float:
        """max|integer - float|, the worst output."""
        pairs = zip(*self.run(feeds), strict=True)
        return max(float(np.abs(a.astype(np.float64) - b).max(initial=0)) for a, b in pairs)


def converted(
    text: str,
    constants: Mapping[str, Any] | None = None,
    samples: Sequence[Feeds] = (),
    settings: Settings | None = None,
    model: ir.Model | None = None,
) -> Outcome:
    model = parsed(text, constants) if model is None else model
    remember(model)
    before = ir.to_proto(model).SerializeToString()
    with context(samples) as ctx:
        ctx.ledger.open("int_only", "int_only", "approximation")
        done = convert(model, ctx, settings or Settings(positions=64), RULES)
        ir.external_data.load_to_model(model)
        after = ir.to_proto(model).SerializeToString()
        return Outcome(done, before, after, list(ctx.ledger.current.skips))


def drawn(*shape: int, reach: float = 4.0, seed: int = 0) -> Array:
    """Numbers of which the largest in size is ``reach``."""
    found = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(found * (reach / np.abs(found).max()), np.float32)
