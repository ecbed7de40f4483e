"""Small graphs whose activations are known, and one pass run on them: the ground of the passes' tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompile.calibration.runner import OrtRunner
from qcompile.calibration.samples import Sample, load_samples
from qcompile.capture.onnx_file import load_onnx
from qcompile.graph.provenance import remember
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Entry, Ledger
from qcompile.pipeline import Context, Pass, Target, make_pass, split_passes
from qcompile.recipe import by_name

WIDTH, OUT = 32, 24
Array = np.ndarray


@dataclasses.dataclass
class Bench:
    """A model and what its passes are given."""

    model: ir.Model
    ctx: Context

    def run(self, one: str | Pass) -> Entry:
        """Run a pass (as the command line writes it) with an entry of its own in the ledger."""
        made = one if isinstance(one, Pass) else make_pass(*split_passes(one)[0])
        entry = self.ctx.ledger.open(made.name, made.spec, made.preserves)
        entry.rewrites = made.run(self.model, self.ctx)
        return entry

    def outputs(self) -> list[Array]:
        """Every output on every sample, masked positions left out."""
        names = [str(v.name) for v in self.model.graph.outputs]
        found = []
        for sample, values in self.ctx.runner.stream(self.model, self.ctx.samples, names):
            for name in names:
                value, mask = values[name], sample.mask
                known = mask is not None and mask.shape == value.shape[:2]
                found.append(np.array(value[mask.astype(bool)] if known else value))
        return found

    def constant(self, name: str) -> Array:
        """An initializer, wherever a fold has put its copy."""
        held = self.model.graph.initializers
        found = held.get(f"{name}_own") or held[name]
        assert found.const_value is not None
        return found.const_value.numpy()


def difference(before: Sequence[Array], after: Sequence[Array]) -> float:
    """max|after - before| / max|before|, the worst output."""
    return max(float(np.abs(b - a).max() / np.abs(b).max()) for a, b in zip(after, before, strict=True))


@contextmanager
def bench(
    model: ir.Model | Path, samples: Sequence[Sample] = (), recipe: str = "w8a8_static"
) -> Iterator[Bench]:
    """``model`` (canonicalised if it is a file, on random inputs if no samples are given) with a context."""
    with Workspace() as workspace:
        loaded = load_onnx(model, workspace) if isinstance(model, Path) else model
        remember(loaded)
        given = list(samples) or list(load_samples(loaded, None, None, max_samples=4, max_length=16))
        target, runner = Target("plain", "onnxruntime", ""), OrtRunner(workspace, threads=1)
        ctx = Context(workspace, Ledger(), by_name(recipe), target, given, runner)
        found = Bench(loaded, ctx)
        if isinstance(model, Path):
            found.run("canonicalise")
        yield found


def normed(
    gamma: Array, beta: Array, *, readers: int = 1, residual: bool = False, seed: int = 0, width: int = OUT
) -> ir.Model:
    """x [batch, seq, C] -> LayerNorm ``norm`` -> linears ``fc0``, ``fc1`` ... -> Neg, so that none is a head.

    ``residual``: an Add reads the norm as well.
    """
    generator = np.random.default_rng(seed)
    channels = len(gamma)
    weights = {"norm.weight": gamma, "norm.bias": beta}
    nodes = [
        helper.make_node("LayerNormalization", ["x", *weights], ["normed"], "norm", axis=-1, epsilon=1e-5)
    ]
    outputs = []
    for i in range(readers):
        weights[f"fc{i}.weight"] = generator.standard_normal((channels, width)) / np.sqrt(channels)
        weights[f"fc{i}.bias"] = generator.standard_normal(width)
        nodes.append(helper.make_node("MatMul", ["normed", f"fc{i}.weight"], [f"product{i}"], f"fc{i}"))
        nodes.append(helper.make_node("Add", [f"product{i}", f"fc{i}.bias"], [f"sum{i}"], f"fc{i}.add"))
        nodes.append(helper.make_node("Neg", [f"sum{i}"], [f"y{i}"], f"neg{i}"))
        outputs.append((f"y{i}", width))
    if residual:
        nodes.append(helper.make_node("Add", ["normed", "x"], ["sum"], "residual"))
        outputs.append(("sum", channels))
    return _model(nodes, weights, channels, outputs)


def wide(act: str, up: Array, down: Array) -> ir.Model:
    """x [batch, seq, C] -> linear ``up`` -> ``act`` -> linear ``down``."""
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["before"], "up"),
        helper.make_node(act, ["before"], ["active"], "act"),
        helper.make_node("MatMul", ["active", "down.weight"], ["y"], "down"),
    ]
    return _model(nodes, {"up.weight": up, "down.weight": down}, len(up), [("y", down.shape[1])])


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, Array], channels: int, outputs: list[tuple[str, int]]
) -> ir.Model:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", channels])
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "seq", c]) for n, c in outputs]
    held = [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "planted", [x], results, held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def inputs(
    count: int = 3, length: int = 24, channels: int = WIDTH, seed: int = 1, symmetric: bool = False
) -> list[Sample]:
    """Normal x, one sequence a sample; ``symmetric``: each and its negative, so that centres are 0."""
    generator = np.random.default_rng(seed)
    drawn = [generator.standard_normal((1, length, channels)).astype(np.float32) for _ in range(count)]
    drawn += [-x for x in drawn] if symmetric else []
    return [Sample({"x": x}) for x in drawn]


def outlier_norm(seed: int = 2, channels: int = WIDTH) -> tuple[Array, Array]:
    """gamma and beta that give three outliers: one far negative, one far positive, one wide and centred."""
    generator = np.random.default_rng(seed)
    gamma, beta = generator.uniform(0.7, 1.3, channels), generator.normal(0, 0.2, channels)
    gamma[[3, 11, 20]], beta[[3, 11, 20]] = [6.0, 6.0, 9.0], [-70.0, 25.0, 0.0]
    return gamma, beta
