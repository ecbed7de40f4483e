"""Small graphs written as text, quantised and lowered for ONNX Runtime: the ground of the backend's tests."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
from onnx import numpy_helper

from qcompile.backends.base import Kernel
from qcompile.backends.onnxruntime_cpu import OnnxRuntimeCpu
from qcompile.calibration.runner import OrtRunner, open_session
from qcompile.graph import functions, qdq
from qcompile.graph.linears import find_linears
from qcompile.graph.provenance import remember
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Entry, Ledger
from qcompile.pipeline import Context
from qcompile.quant.numerics import affine_from_range, quantize_weight
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import by_name

Array = np.ndarray
Feeds = dict[str, Array]
HEADER = '<ir_version: 10, opset_import: ["" : 21, "qcompile" : 1]>\n'
INT8 = WeightScheme(bits=8, clip="minmax")


def graph(text: str, **constants: Array) -> ir.Model:
    """The model that ``text`` spells (ONNX's text form, without header), with shapes inferred."""
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    model = ir.from_proto(proto)
    for node in list(model.graph):
        if node.domain == functions.DOMAIN:
            functions.use(model, node.op_type)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))
    remember(model)
    return model


@dataclasses.dataclass
class Program:
    """A model before lowering, and the program that came out of it."""

    before: Path
    folder: Path
    entry: Entry

    @property
    def path(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def kernels(self) -> list[Kernel]:
        return OnnxRuntimeCpu().kernels_of(self.path)

    @property
    def written(self) -> ir.Model:
        return ir.load(self.path)

    def operators(self) -> dict[str, int]:
        """Operators of the graph that ONNX Runtime runs, after its own optimisation."""
        target = self.folder / "optimised.onnx"
        open_session(self.path, optimised_path=target)
        return collections.Counter(node.op_type for node in onnx.load(target).graph.node)

    def difference(self, feeds: Feeds, keep: Array | None = None) -> float:
        """max|after - before| / max|before|, the worst output; ``keep`` picks the positions that count."""
        before = open_session(self.before, threads=1, literal_qdq=True).run(None, feeds)
        after = open_session(self.path, threads=1).run(None, feeds)
        pairs = [(a, b) if keep is None else (a[keep], b[keep]) for a, b in zip(after, before, strict=True)]
        assert all(a.shape == b.shape for a, b in pairs)
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)

    def reasons(self) -> set[str]:
        return {skip.reason for skip in self.entry.skips}


def lower(
    model: ir.Model,
    folder: Path,
    quantise: Callable[[ir.Model, Workspace], None] | None = None,
    backend: OnnxRuntimeCpu = OnnxRuntimeCpu(),  # noqa: B008 - frozen
) -> Program:
    """Quantise and lower ``model``, and write both sides below ``folder``."""
    folder.mkdir(exist_ok=True)
    workspace = Workspace(folder)
    ledger = Ledger()
    ctx = Context(workspace, ledger, by_name("float"), backend.target, [], OrtRunner(workspace))
    if quantise is not None:
        quantise(model, workspace)
    before = workspace.save(model, "before")
    entry = ledger.open("lower", "lower", "approximation")
    entry.rewrites = backend.lower(model, ctx)
    package = folder / "package"
    package.mkdir()
    backend.package(model, package)
    return Program(before, package, entry)


def static(bits: int = 8, weights: WeightScheme = INT8) -> Callable[[ir.Model, Workspace], None]:
    """Every linear: static activations on [-3, 4], weights by ``weights``."""

    def quantise(model: ir.Model, workspace: Workspace) -> None:
        affine = affine_from_range(np.array(-3.0), np.array(4.0), bits, symmetric=False, signed=False)
        for x, linears in _by_input(model).items():
            readers = [(linear.node, 0) for linear in linears]
            _weights(model, linears, weights, workspace)
            qdq.quantize_static(model, x, readers, affine, workspace)

    return quantise


def per_token(bits: int, symmetric: bool, weights: WeightScheme = INT8) -> Callable[[ir.Model, Workspace], None]:
    """Every linear: the range of each row."""

    def quantise(model: ir.Model, workspace: Workspace) -> None:
        scheme = ActivationScheme(bits=bits, granularity="per_token", symmetric=symmetric)
        for x, linears in _by_input(model).items():
            readers = [(linear.node, 0) for linear in linears]
            _weights(model, linears, weights, workspace)
            qdq.quantize_per_token(model, x, readers, scheme, workspace)

    return quantise


def weight_only(weights: WeightScheme) -> Callable[[ir.Model, Workspace], None]:
    def quantise(model: ir.Model, workspace: Workspace) -> None:
        for linears in _by_input(model).values():
            _weights(model, linears, weights, workspace)

    return quantise


def _by_input(model: ir.Model) -> dict[ir.Value, list]:  # type: ignore[type-arg]
    found: dict[ir.Value, list] = {}  # type: ignore[type-arg]
    for linear in find_linears(model.graph):
        found.setdefault(linear.x, []).append(linear)
    return found


def _weights(model: ir.Model, linears: list, scheme: WeightScheme, workspace: Workspace) -> None:  # type: ignore[type-arg]
    for linear in linears:
        if linear.transposed:
            codes = quantize_weight(linear.w, INT8)
            qdq.quantize_table(model, qdq.table_of(linear), codes, workspace)
        else:
            qdq.quantize_linear_weight(model, linear, quantize_weight(linear.w, scheme), workspace)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
