"""What a transform search minimises: the error at the next linears' inputs, computed on real activations.

The region between a site's linears and the inputs of the linears after it (attention with its masks and rotary
embedding, the gate of SwiGLU) is cut out of the graph and run by ONNX Runtime, so that no architecture is
assumed. Sources: Outlier Suppression+ (arXiv 2304.09145) Eq. 6 and 7 and Algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.calibration.runner import matmul, open_session
from qcompile.graph.functions import is_op
from qcompile.graph.sites import ATTENTIONS, Linear, Site, find_linears
from qcompile.quant.numerics import affine_from_range, fake_quantize, fake_quantize_per_token, fake_quantize_weight
from qcompile.quant.schemes import ActivationScheme, WeightScheme

MOST_COLUMNS = 8192  # of a linear that are looked at
Turn = Callable[[np.ndarray], np.ndarray]
MAX_REGION = 400  # nodes; a larger region is not the inside of one block


@dataclasses.dataclass
class Region:
    """The nodes between linears' outputs and the next linears' inputs, as a model of its own.

    Values are held by the names they had when the region was cut: a later fold may rename them in the graph.
    """

    inputs: list[str]  # outputs of the site's linears
    extra: list[str]  # values that come from elsewhere: masks, cos, sin, shapes
    kind: str
    model: bytes


def cut_region(model: ir.Model, site: Site) -> Region | None:
    """The region behind a norm site, when it holds an attention or a gate; None for the plain linear objective."""
    outputs = [linear.output for linear in site.linears]
    stops = {id(linear.node) for linear in find_linears(model.graph)}
    dependent, joins = _forward(outputs, stops)
    inside = [n for n in dependent if _leads_to(n, joins)]
    attention = any(is_op(n, *ATTENTIONS, "Softmax") for n in inside)
    gated = any(is_op(n, "Mul") and all(_from(v, inside, outputs) for v in n.inputs) for n in inside)
    if not joins or not (attention or gated) or len(inside) > MAX_REGION:
        return None
    extra = _outside(inside, outputs)
    return Region(
        [str(v.name) for v in outputs],
        [str(v.name) for v in extra],
        "attention" if attention else "gated",
        _extract(model, inside, outputs + extra, joins),
    )


def _forward(starts: Sequence[ir.Value], stops: set[int]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that depend on ``starts`` up to the linears ``stops``, in graph order, and the values that enter those."""
    seen: dict[int, ir.Node] = {}
    joins: dict[int, ir.Value] = {}
    pending = list(starts)
    while pending and len(seen) <= MAX_REGION:
        value = pending.pop()
        for use in value.uses():
            if id(use.node) in stops:
                if use.idx == 0:
                    joins[id(value)] = value
            elif id(use.node) not in seen:
                seen[id(use.node)] = use.node
                pending.extend(use.node.outputs)
    order = list(next(iter(starts)).producer().graph)  # type: ignore[union-attr, arg-type]
    position = {id(n): i for i, n in enumerate(order)}
    starting = {id(s) for s in starts}
    found = [j for j in joins.values() if id(j) not in starting]
    return sorted(seen.values(), key=lambda n: position.get(id(n), 0)), found


def _leads_to(node: ir.Node, joins: list[ir.Value]) -> bool:
    goal, pending = {id(j) for j in joins}, list(node.outputs)
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in goal:
            return True
        for use in value.uses():
            if (
                id(use.node) not in seen
                and len(seen) < MAX_REGION
                and not is_op(use.node, "MatMul", "LayerNormalization", "RMSNormalization")
            ):
                seen.add(id(use.node))
                pending.extend(use.node.outputs)
    return False


def _from(value: ir.Value | None, inside: list[ir.Node], outputs: list[ir.Value]) -> bool:
    producer = value.producer() if value is not None else None
    return any(value is o for o in outputs) or any(producer is n for n in inside)


def _outside(inside: list[ir.Node], outputs: list[ir.Value]) -> list[ir.Value]:
    own = {id(o) for n in inside for o in n.outputs} | {id(o) for o in outputs}
    found: dict[int, ir.Value] = {}
    for node in inside:
        for value in node.inputs:
            if value is not None and id(value) not in own and not value.is_initializer():
                found[id(value)] = value
    return list(found.values())


def _extract(model: ir.Model, inside: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> bytes:
    mapping: dict[int, ir.Value] = {}
    initializers = []
    for value in inputs:
        mapping[id(value)] = ir.Value(name=value.name, type=value.type or ir.TensorType(ir.DataType.FLOAT))
    for node in inside:
        for source in node.inputs:
            if source is not None and id(source) not in mapping and source.is_initializer():
                mapping[id(source)] = _constant_copy(source)
                initializers.append(mapping[id(source)])
    nodes = []
    for node in inside:
        copy = ir.Node(
            node.domain, node.op_type, [mapping[id(v)] if v is not None else None for v in node.inputs],
            list(node.attributes.values()), num_outputs=len(node.outputs),
        )  # fmt: skip
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = old.name, old.type
            mapping[id(old)] = new
        nodes.append(copy)
    graph = ir.Graph(
        [mapping[id(v)] for v in inputs], [mapping[id(v)] for v in outputs], nodes=nodes, initializers=initializers,
        opset_imports=dict(model.graph.opset_imports), name="region",
    )  # fmt: skip
    proto: bytes = ir.to_proto(
        ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    ).SerializeToString()
    return proto


def _constant_copy(value: ir.Value) -> ir.Value:
    assert value.const_value is not None
    held = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return ir.Value(name=value.name, const_value=held, type=ir.TensorType(held.dtype), shape=value.shape)


@dataclasses.dataclass
class Objective:
    """The error of one site as a function of its transform.

    ``x``: the linears' input for each search sequence, shapes (..., channels); ``extra``: the region's other
    inputs for each sequence, as the graph gave them; ``masks``: (tokens,), which tokens are real (None: all).
    ``relative`` weights each token's error by its own size (the paper sums absolute errors). ``by_energy`` weights the
    rows of W where their clip is searched, as ``quantise`` does.
    """

    linears: tuple[Linear, ...]
    weights: WeightScheme | None
    activations: ActivationScheme | None
    x: list[np.ndarray]
    region: Region | None
    extra: list[dict[str, np.ndarray]]
    masks: list[np.ndarray | None]
    relative: bool = True
    by_energy: bool = False

    def __post_init__(self) -> None:
        steps = [1 if self.region is not None else -(-linear.columns // MOST_COLUMNS) for linear in self.linears]
        found = [_sampled(linear, step) for linear, step in zip(self.linears, steps, strict=True)]
        self._w = np.concatenate([w for w, _ in found], axis=1)
        self._b = np.concatenate([b for _, b in found])
        self._columns = np.cumsum([b.size for _, b in found])[:-1]
        self._shapes = [x.shape[:-1] for x in self.x]
        counts = [int(np.prod(shape)) for shape in self._shapes]
        self._tokens = sum(n if mask is None else int(mask.sum()) for n, mask in zip(counts, self.masks, strict=True))
        self._rows = np.cumsum([int(np.prod(shape)) for shape in self._shapes])[:-1]
        self._x = np.concatenate([x.reshape(-1, x.shape[-1]) for x in self.x]).astype(np.float32)
        self._session = open_session(self.region.model) if self.region is not None else None
        self._target = self._through(matmul(self._x, self._w) + self._b)
        self._token_weights = self._weigh()
        self.x = []

    def loss(self, scale: np.ndarray, shift: np.ndarray, limits: tuple[float, float] | None = None) -> float:
        """Mean over tokens of the (relative) summed squared error with the real quantisers.

        ``scale`` and ``shift`` are per row of W; ``limits`` is the static range of x~ (its own extremes when
        None).
        """
        w = self._w * scale[:, None]
        bias = self._b + shift @ self._w if shift.any() else self._b
        return self._error((self._x - shift) / scale, w, bias, limits)

    def turned_loss(self, turn: Turn, back: Turn) -> float:
        """The same when x is multiplied by a matrix T and W by its inverse.

        ``turn``: rows (n, channels) times T; ``back``: rows times T^-T, which is ``turn`` where T is orthogonal.
        """
        w = back(self._w.T).T.astype(np.float32)
        return self._error(turn(self._x).astype(np.float32), w, self._b, None)

    def _error(self, x: np.ndarray, w: np.ndarray, bias: np.ndarray, limits: tuple[float, float] | None) -> float:
        if self.weights is not None:
            w = fake_quantize_weight(w, self.weights, self._energy(x) if self.by_energy else None)
        x = self._quantized(x, limits)
        total = 0.0
        for index, results in enumerate(self._through(matmul(x, w) + bias)):
            for result, target, weight in zip(results, self._target[index], self._token_weights[index], strict=True):
                square = _token_squares(result - target) * weight
                mask = self.masks[index]
                total += float((square if mask is None or mask.size != square.size else square[mask]).sum())
        return total / max(self._tokens, 1)

    def energy(self, shift: np.ndarray) -> np.ndarray:
        """Root mean square of every channel of x - shift, tokens brought to length one: (channels,)."""
        root: np.ndarray = np.sqrt(self._energy(self._x - shift))
        return root

    def unit_rows(self, shift: np.ndarray | float = 0.0) -> np.ndarray:
        """x - shift for all real tokens, each brought to length one: (tokens, channels)."""
        return self._unit(self._x - shift)

    def _energy(self, x: np.ndarray) -> np.ndarray:
        """Mean square of every channel of x, tokens brought to length one, as ``ChannelEnergy`` has it."""
        mean: np.ndarray = np.square(self._unit(x)).mean(axis=0)
        return mean

    def _unit(self, x: np.ndarray) -> np.ndarray:
        """The real tokens of x, each brought to length one."""
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-20)
        if any(mask is not None for mask in self.masks):
            sizes = [int(np.prod(shape)) for shape in self._shapes]
            x = x[
                np.concatenate([np.ones(n, bool) if m is None else m for m, n in zip(self.masks, sizes, strict=True)])
            ]
        return x

    @property
    def weights_of_rows(self) -> np.ndarray:
        """W of all linears side by side, (channels, columns)."""
        return self._w

    @property
    def is_static(self) -> bool:
        """Whether one range, fixed at calibration, serves all tokens."""
        return self.activations is not None and not self.activations.dynamic

    @property
    def weight_size(self) -> np.ndarray:
        """Root mean square of every row of W: (channels,)."""
        root: np.ndarray = np.sqrt(np.square(self._w).mean(axis=1))
        return root

    def _weigh(self) -> list[list[np.ndarray]]:
        """Each token's weight: 1 / (its squared norm + the median one), and with dynamic ranges + 1 / the mean one.

        The first part keeps a sink token, thousands of times the others' size, from owning the sum; the second
        keeps it from being lost in it, for all later tokens attend to it. Where all tokens share a range, saving the
        sink would cost every other token its precision.
        """
        norms = [[_token_squares(t) for t in found] for found in self._target]
        if not self.relative:
            return [[np.ones_like(n) for n in found] for found in norms]
        joined = [np.concatenate(parts) for parts in zip(*norms, strict=True)]
        sizes = [(float(np.median(n)), np.inf if self.is_static else max(float(n.mean()), 1e-20)) for n in joined]
        return [
            [1 / np.maximum(n + middle, 1e-20) + 1 / mean for n, (middle, mean) in zip(found, sizes, strict=True)]
            for found in norms
        ]

    def _quantized(self, x: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
        scheme = self.activations
        if scheme is None:
            return x
        if scheme.dynamic:
            return fake_quantize_per_token(x, scheme.bits, scheme.symmetric)
        lo, hi = limits if limits is not None else (float(x.min()), float(x.max()))
        return fake_quantize(
            x, affine_from_range(np.float32(lo), np.float32(hi), scheme.bits, scheme.symmetric, signed=False)
        )

    def _through(self, y: np.ndarray) -> list[list[np.ndarray]]:
        """The region's outputs for each sequence; the linears' own output where there is no region."""
        parts = np.split(y, self._rows)
        if self._session is None or self.region is None:
            return [[part] for part in parts]
        results = []
        for part, shape, extra in zip(parts, self._shapes, self.extra, strict=True):
            feeds = dict(extra)
            for name, columns in zip(self.region.inputs, np.split(part, self._columns, axis=1), strict=True):
                feeds[name] = columns.reshape(*shape, -1)
            results.append(self._session.run(None, feeds))
        return results


def _sampled(linear: Linear, step: int) -> tuple[np.ndarray, np.ndarray]:
    """W and b, every ``step``-th column: some thousand logits speak for a vocabulary."""
    bias = linear.bias
    b = np.zeros(linear.columns, np.float32) if bias is None else bias
    return linear.w[:, ::step], b[::step]


def _token_squares(values: np.ndarray) -> np.ndarray:
    """Squared norm of every row over the last axis, (tokens,): cross-attention has other tokens out than in."""
    squares: np.ndarray = np.square(values).sum(axis=-1).reshape(-1)
    return squares
